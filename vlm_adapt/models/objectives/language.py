"""Cross-entropy of the learned tokens: the loss of language modelling. Knows the road, nothing else."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_adapt.data.collate import Batch


def language(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum of token losses (float32 scalar) and each target's own loss [N], detached."""
    return model.language(model.inputs(batch), batch.predict_from_N, batch.targets_N)
