"""Where a method is put: a part of the model, its blocks, and what of it the model does not use.

Knows parts by their `.blocks`, and how a configuration names blocks; knows nothing about methods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from vlm_adapt.errors import UserError

Chosen = int | str | Sequence[int] | None


@dataclass
class Place:
    """A part, and which of its blocks are meant.

    Attributes:
        where: `vision`, `connector` or `language`.
        part: the Tower, Connector or Language itself.
        unused: dotted names of modules of the part whose output the model does not use: nothing there gets
            a gradient, so nothing there is adapted.
        chosen: the blocks that the plan's line names; None for all that are used.
    """

    where: str
    part: nn.Module
    unused: set[str] = field(default_factory=set)
    chosen: Chosen = None

    @property
    def device(self) -> torch.device:
        """Where the part's weights are (`meta` when only counts are wanted)."""
        return next((p.device for p in self.part.parameters()), torch.device("cpu"))

    @property
    def inner(self) -> nn.Module:
        """The library's own model inside the part: names below it are those its users know."""
        for name in ("model", "visual", "trunk"):
            inner = getattr(self.part, name, None)
            if isinstance(inner, nn.Module):
                return inner
        return self.part

    def is_used(self, name: str) -> bool:
        """Whether a parameter or module of the part, by its dotted name, is used."""
        return not any(name == idle or name.startswith(idle + ".") for idle in self.unused)

    def blocks(self) -> list[tuple[int, str, nn.Module]]:
        """(number, dotted name below the part, module) of each block that is used and meant, in order.

        A part without blocks (a connector) is one block, number 0, named "".

        Raises:
            UserError: a block that is not there, is not used, or none at all.
        """
        modules = list(getattr(self.part, "blocks", None) or [self.part])
        names = {id(module): name for name, module in self.part.named_modules()}
        every = [(number, names[id(module)], module) for number, module in enumerate(modules)]
        used = [entry for entry in every if self.is_used(entry[1])]
        if self.chosen is None:
            return used
        numbers = choose(self.chosen, len(every), self.where)
        idle = [number for number in numbers if number not in {entry[0] for entry in used}]
        if idle:
            raise UserError(
                f"adapt: block {idle[0]} of '{self.where}' is not used (model.vision.layers ends before "
                f"it): choose among blocks 0 to {used[-1][0]}"
            )
        return [entry for entry in every if entry[0] in numbers]

    def inside(self) -> set[int]:
        """The ids of all used modules in the blocks that `blocks()` gives."""
        meant = {id(module) for _, _, block in self.blocks() for module in block.modules()}
        return {id(m) for name, m in self.part.named_modules() if id(m) in meant and self.is_used(name)}


def choose(chosen: Chosen, count: int, where: str) -> list[int]:
    """Block numbers from 0, ascending, for a number, a list of numbers, or a slice in words.

    Args:
        chosen: `3`, `-1`, `[0, 5]`, `"0:6"`, `"-4:"` (the last four), `"::2"` (every second).
        count: how many blocks there are.

    Raises:
        UserError: no such block, or words that are no slice.
    """
    if isinstance(chosen, str):
        pieces = re.fullmatch(r"\s*(-?\d*)\s*(?::\s*(-?\d*)\s*(?::\s*(\d*)\s*)?)?", chosen)
        if pieces is None or chosen.strip() in ("", "-"):
            raise UserError(
                f"adapt: blocks '{chosen}' of '{where}' is no choice of blocks: write a number, a list, or a "
                'slice such as "0:6" or "-4:"'
            )
        if ":" in chosen:
            first, last, step = (int(piece) if piece else None for piece in pieces.groups())
            if step == 0:
                raise UserError(f"adapt: blocks '{chosen}' of '{where}' steps by 0: leave the step out")
            numbers = list(range(count))[first:last:step]
            if not numbers:
                raise UserError(f"adapt: blocks '{chosen}' of '{where}' means none of its {count} blocks")
            return numbers
        chosen = int(chosen)
    listed = [chosen] if isinstance(chosen, int) else list(chosen or ())
    if not listed:
        raise UserError(f"adapt: blocks of '{where}' is an empty list: leave it out for all blocks")
    for number in listed:
        if not -count <= number < count:
            raise UserError(
                f"adapt: '{where}' has no block {number}: it has {count}, numbered 0 to {count - 1} "
                f"or -{count} to -1"
            )
    return sorted({number % count for number in listed})
