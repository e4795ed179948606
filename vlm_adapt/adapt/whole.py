"""Whole values of a parameter that trains, read and written under every ZeRO stage, between two steps.

Knows DeepSpeed's marks on a parameter; knows nothing about methods. What trains is float32 and is its own
master copy, but ZeRO keeps a flat copy beside it, which must change with it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def whole(parameter: nn.Parameter) -> Tensor:
    """A copy of all values; under ZeRO-3 all ranks call it."""
    with _together(parameter):
        return parameter.detach().clone()


def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Set all values; every rank calls it with the same ones."""
    if not hasattr(parameter, "ds_id"):
        parameter.data.copy_(value)
        if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: this rank's share of the flat copy
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)
        return
    # DeepSpeed's own setter does not pad the last rank's share; so each rank takes its share.
    from deepspeed.utils import safe_set_local_fp32_param

    holder: Any = parameter
    share_size = holder.ds_tensor.numel()
    world = torch.distributed.get_world_size(group=holder.ds_process_group)
    rank = torch.distributed.get_rank(group=holder.ds_process_group)
    padded = torch.zeros(share_size * world, dtype=value.dtype, device=holder.ds_tensor.device)
    padded[: value.numel()] = value.flatten()
    mine = padded[rank * share_size : (rank + 1) * share_size]
    holder.ds_tensor.data.copy_(mine)
    safe_set_local_fp32_param(parameter, mine)


def _together(parameter: nn.Parameter) -> Any:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
