"""The contract of trainability: declared = requires_grad = what got a gradient = what moved.

Knows parameters and checksums; knows nothing about methods. A difference is an error that names the
parameters, since a run that trains something else than it says is worth nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from vlm_adapt import dist
from vlm_adapt.errors import UserError

FROZEN_AFTER = 3  # optimizer steps after which frozen weights are compared bit by bit
MOVED_AFTER = 100  # LoRA's A waits for B, and a connector for the first image: give them time


class Contract:
    """Watches a stage's first steps.

    Args:
        model: all parameters.
        declared: names and parameters that the plan says train.

    Raises:
        UserError: `requires_grad` is not what was declared.
    """

    def __init__(
        self,
        model: nn.Module,
        declared: Iterable[tuple[str, nn.Parameter]],
        frozen_after: int = FROZEN_AFTER,
        moved_after: int = MOVED_AFTER,
    ):
        self.declared = dict(declared)
        self.frozen_after, self.moved_after = frozen_after, moved_after
        wanted = {id(parameter) for parameter in self.declared.values()}
        self.frozen = {n: p for n, p in model.named_parameters() if id(p) not in wanted}
        extra = [name for name, parameter in self.frozen.items() if parameter.requires_grad]
        idle = [name for name, parameter in self.declared.items() if not parameter.requires_grad]
        if extra or idle:
            raise UserError(
                f"the plan and requires_grad differ: {_some(extra)} train unasked, {_some(idle)} do not"
            )
        self.steps = 0
        self.reached: set[str] = set()
        self.hooks = [
            parameter.register_hook(lambda grad, name=name: self.reached.add(name))
            for name, parameter in self.declared.items()
        ]
        self.frozen_before: dict[str, int] = {}
        self.trained_before: dict[str, int] = {}

    def start(self) -> None:
        """Remember every parameter; call once the engine holds the model."""
        self.frozen_before = {name: checksum(p) for name, p in self.frozen.items()}
        self.trained_before = {name: checksum(p) for name, p in self.declared.items()}

    def after_step(self) -> None:
        """Check after an optimizer step; does nothing on most of them.

        Raises:
            UserError: a frozen parameter moved, or a declared one got no gradient or stayed.
        """
        self.steps += 1
        if self.steps == 1:
            for hook in self.hooks:
                hook.remove()
            unreached = self._anywhere([name not in self.reached for name in self.declared], self.declared)
            if unreached:
                raise UserError(f"declared as trainable, but without a gradient: {_some(unreached)}")
        if self.steps == self.frozen_after:
            flags = [checksum(p) != self.frozen_before[n] for n, p in self.frozen.items()]
            moved = self._anywhere(flags, self.frozen)
            if moved:
                raise UserError(f"frozen parameters that moved in {self.steps} steps: {_some(moved)}")
        if self.steps == self.moved_after:
            flags = [checksum(p) != self.trained_before[n] for n, p in self.declared.items()]
            moved = self._anywhere(flags, self.declared)
            stayed = [name for name in self.declared if name not in moved]
            if stayed:
                raise UserError(
                    f"trainable parameters that did not move in {self.steps} steps: {_some(stayed)}"
                )

    @staticmethod
    def _anywhere(flags: Iterable[bool], names: Iterable[str]) -> list[str]:
        """The names flagged on any rank (under ZeRO-3 each sees its own share); all ranks agree."""
        summed = dist.total([float(flag) for flag in flags])
        return [name for name, flag in zip(names, summed, strict=True) if flag]


def checksum(parameter: nn.Parameter) -> int:
    """A sum over the bits of the values this rank holds; any changed bit changes it."""
    values = getattr(parameter, "ds_tensor", parameter).detach().flatten().contiguous()
    if values.storage_offset() * values.element_size() % 8:
        values = values.clone()  # behind a weight of an odd size, in ZeRO's one buffer
    words = len(values) * values.element_size() // 8 * 8 // values.element_size()
    # As 64-bit words it needs no copy; sums wrap around, which is as good.
    total = int(values[:words].view(torch.int64).sum()) if words else 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    rest = values[words:].view(kinds[values.element_size()])
    return total + int(rest.to(torch.int64).sum())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + more
