"""DeepSpeed as the engine: one process or many, ZeRO 0 to 3, CPU or GPU.

Knows how to start it, take a step, and bring whole tensors together; knows nothing about data or
files. What trains is float32 and is its own master copy, what is frozen stays in the compute dtype,
and autocast joins them: so every ZeRO stage computes the same numbers (docs/log.md).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt import dist
from vlm_adapt.choices import nearest
from vlm_adapt.config.schema import Train
from vlm_adapt.errors import UserError
from vlm_adapt.train.optim import Group, parameter_groups

Gradient = Callable[[nn.Parameter], Tensor | None]
MOMENTS = ("exp_avg", "exp_avg_sq")
NAMES = [f"zero{stage}{more}" for stage in range(4) for more in ("", "_offload") if stage or not more]


def zero_settings(name: str) -> dict[str, Any]:
    """DeepSpeed's configuration for `zero0` … `zero3_offload`, or for a JSON file of one's own.

    Raises:
        UserError: unknown name, missing file, or no JSON.
    """
    if name in NAMES:
        zero: dict[str, Any] = {"stage": int(name[4])}
        if name.endswith("_offload"):
            zero["offload_optimizer"] = {"device": "cpu"}
            if zero["stage"] == 3:
                zero["offload_param"] = {"device": "cpu"}
        return {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"train.deepspeed '{name}' is no JSON file and none of {', '.join(NAMES)}{nearest(name, NAMES)}"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from error
    # The run's own configuration decides these: a second opinion in the JSON could only disagree.
    if not isinstance(settings, dict):
        raise UserError(
            f"'{path}' holds {type(settings).__name__}, and must hold DeepSpeed's settings by name"
        )
    for ours in ("bf16", "fp16", "optimizer", "scheduler", "train_batch_size", "gradient_clipping"):
        settings.pop(ours, None)
    return {"zero_force_ds_cpu_optimizer": False} | settings


class Engine:
    """A model under DeepSpeed.

    Args:
        model: maps a batch to (sum of losses, losses of the targets).
        groups: part, learning rate and named parameters of what trains.
        dtype: compute dtype of autocast.
    """

    def __init__(self, model: nn.Module, groups: list[Group], train: Train, dtype: torch.dtype):
        import deepspeed

        deepspeed.utils.logger.setLevel(logging.ERROR)
        # Its shared-memory all-reduce is compiled at start (20 s, needs a compiler); gloo serves as well.
        if not torch.cuda.is_available():
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
        dist.start()
        self.device, self.dtype, self.train = dist.device(), dtype, train
        settings = zero_settings(train.deepspeed)
        settings |= {
            "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "gradient_clipping": train.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        self.names = {id(p): name for _, _, parameters in groups for name, p in parameters}
        optimizer = torch.optim.AdamW(
            parameter_groups(groups, train),
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            fused="offload_optimizer" not in settings.get("zero_optimization", {}),
        )
        self.base_optimizer = optimizer
        model.to(self.device)
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings
        )
        self.stage = int(self.engine.zero_optimization_stage())
        self.module: nn.Module = self.engine.module

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The compute dtype for a forward pass; nothing to do in float32."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def forward_backward(self, batch: Any, divisor: float) -> tuple[float, Tensor]:
        """One microbatch.

        Args:
            divisor: learned tokens of the whole step, over all ranks and microbatches: the loss is a
                mean over tokens, divided once.

        Returns:
            (sum of losses, losses of the targets)
        """
        with self.autocast():
            loss_sum, losses_N = self.engine(batch)
        # DeepSpeed averages gradients over ranks; the sum over tokens wants them added.
        self.engine.backward(loss_sum * (dist.world_size() / max(1.0, divisor)), scale_wrt_gas=False)
        return float(loss_sum.detach()), losses_N

    def step(self, factor: float, boundary: bool, before: Callable[[Gradient], None] | None = None) -> float:
        """After a microbatch: at the last one, clip, update and clear the gradients.

        Args:
            before: called at the last one with the way to a parameter's whole gradient.

        Returns:
            The gradient norm before clipping (0.0 before the boundary).
        """
        norm = 0.0
        if boundary:
            for group in self.optimizer.param_groups:
                group["lr"] = group["rate"] * factor
            if self.stage == 0:
                grads = [
                    p.grad for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None
                ]
                norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
            if before is not None:
                before(self._gradient)
        self.engine.step()
        if boundary and self.stage:
            norm = float(self.engine.get_global_grad_norm())
        return norm

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole gradient of a parameter before the step, averaged over ranks; all ranks call it."""
        if self.stage == 0:
            return parameter.grad
        from deepspeed.utils import safe_get_full_grad

        found: Tensor | None = safe_get_full_grad(parameter)
        return found

    def rates(self) -> dict[str, float]:
        """The learning rate of each part at the last step."""
        return {group["part"]: group["lr"] for group in self.optimizer.param_groups}

    # Whole tensors -------------------------------------------------------------------------------

    def whole(self, parameter: nn.Parameter) -> Tensor | None:
        """A parameter's values on the CPU, on the main rank; None on the others. All ranks call it."""
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().cpu().clone() if dist.is_main() else None
        return parameter.detach().cpu().clone() if dist.is_main() else None

    def moments(self) -> tuple[dict[str, Tensor], int]:
        """Adam's moments by parameter name (main rank), and its step count. All ranks call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        found: dict[str, Tensor] = {}
        for parameter, name in self._trained():
            for key in MOMENTS:
                if self.stage:
                    value = safe_get_full_optimizer_state(parameter, key)
                else:
                    value = self.base_optimizer.state[parameter][key]
                if dist.is_main():
                    found[f"{name}#{key}"] = value.detach().reshape(_shape(parameter)).cpu().clone()
        states = list(self._base().state.values())
        return found, int(states[0]["step"]) if states else 0

    def load_moments(self, moments: dict[str, Tensor], step: int) -> None:
        """Put Adam's moments back, whatever the world size and ZeRO stage were when they were saved."""
        base = self._base()
        for flat in self._flat():
            base.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device if base.defaults["fused"] else None),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        self._link()
        for parameter, name in self._trained():
            for key in MOMENTS:
                self._set_moment(parameter, key, moments[f"{name}#{key}"].to(self.device))

    def _link(self) -> None:
        """Let ZeRO 1 and 2 find every group's moments: it links all groups after the first one's step."""
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 0:
            self.base_optimizer.state[parameter][key].copy_(value)
        elif self.stage == 3:
            # DeepSpeed's own setter does not pad the last rank's share; so hand each rank its share.
            share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = torch.zeros(share * dist.world_size(), device=self.device)
            padded[: value.numel()] = value.flatten()
            mine = padded[dist.rank() * share : (dist.rank() + 1) * share]
            safe_set_local_optimizer_state(parameter, mine, key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def _trained(self) -> list[tuple[nn.Parameter, str]]:
        return [(p, self.names[id(p)]) for p in self.module.parameters() if id(p) in self.names]

    def _base(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if self.stage else self.base_optimizer

    def _flat(self) -> list[Tensor]:
        if self.stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [p for group in self._base().param_groups for p in group["params"]]


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
