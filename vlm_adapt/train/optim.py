"""AdamW's parameter groups and the learning-rate schedule.

Knows rates and steps; knows nothing about engines or models.
"""

from __future__ import annotations

import math

from torch import nn

from vlm_adapt.config.schema import Train

Group = tuple[str, float, list[tuple[str, nn.Parameter]]]


def parameter_groups(groups: list[Group], train: Train) -> list[dict[str, object]]:
    """Optimizer groups: per method, matrices with weight decay, vectors and biases without.

    Empty groups are dropped: DeepSpeed refuses them.
    """
    result: list[dict[str, object]] = []
    for part, rate, parameters in groups:
        for decays in (True, False):
            chosen = [p for _, p in parameters if (_dimensions(p) > 1) == decays]
            if chosen:
                decay = train.weight_decay if decays else 0.0
                result.append(
                    {"params": chosen, "lr": rate, "weight_decay": decay, "part": part, "rate": rate}
                )
    return result


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))


def rate_factor(step: int, total: int, train: Train) -> float:
    """What the learning rates are multiplied by at a step.

    Args:
        step: optimizer steps already taken (the first update sees 0).
        total: optimizer steps of the stage.

    Returns:
        Linear warm-up from 1/w to 1 over w steps, then cosine, linear or polynomial (power 0.9, as DeepLab
        and LSeg have it) to 0, or constant.
    """
    warmup = train.warmup_steps or math.ceil(train.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if train.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if train.lr_scheduler_type == "linear":
        return max(0.0, 1 - done)
    if train.lr_scheduler_type == "polynomial":
        return max(0.0, 1 - done) ** 0.9
    return 1.0
