"""Ladder side-tuning: a small network beside a frozen part trains; the part keeps no activations.

Sung et al. 2022, LST, arXiv 2206.06522: side blocks r times narrower, started from the part's own weights by
structured pruning; the library's final norm and head stay and read the side network's last state. Knows parts
by their blocks; knows nothing about engines or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.ladder import Ladder, Rung
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.prune import top, width_importance
from vlm_adapt.adapt.side_blocks import SideBlock, language_block, vision_block
from vlm_adapt.adapt.side_stacks import (
    Blocks,
    T5Arguments,
    as_is,
    is_encoder,
    is_t5,
    plain,
    running,
    stacks_of,
    width_of,
)
from vlm_adapt.errors import UserError


class SideTuning(Method):
    """A side network along all blocks, or along those that `blocks` names (the last one among them).

    Args:
        r: how many times narrower than the part; it must divide the part's width.
        temperature: T of the gates, sigmoid(alpha / T).
        drop: a rung at every second block only, counted from the last.
        init: `pruned` (from the part's weights) or `random`.

    Raises:
        UserError: the part is no stack of plain transformer blocks, or r does not fit it.
    """

    name = "side_tuning"
    summary = "a narrow network beside the frozen part trains; the part keeps no activations"
    paper = "Sung et al. 2022, arXiv 2206.06522"
    sides = ("vision", "language")
    alone = True
    alone_because = "has a side network stand in for all of it, and nothing in it gets a gradient"
    identity = False
    example = {"r": 2}  # noqa: RUF012

    def __init__(self, r: int = 8, temperature: float = 0.1, drop: bool = False, init: str = "pruned"):
        super().__init__()
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise UserError(f"adapt: side_tuning takes a whole number r from 1, not {r!r}")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature <= 0:
            raise UserError(f"adapt: side_tuning takes a temperature above 0, not {temperature!r}")
        if not isinstance(drop, bool):
            raise UserError(f"adapt: side_tuning's drop is true or false, not {drop!r}")
        if init not in ("pruned", "random"):
            raise UserError(f"adapt: side_tuning's init is 'pruned' or 'random', not {init!r}")
        self.r, self.temperature, self.drop, self.init = r, float(temperature), drop, init
        self.ladders: list[Ladder] = []

    def attach(self, place: Place) -> None:
        """Build the side network and let it listen to the part's blocks."""
        part: Any = place.part
        self.part = part
        every = running(place)
        chosen = [number for number, _, _ in place.blocks()]
        stacks = stacks_of(part, every) if place.where == "language" else [plain(place, every)]
        width = width_of(place)
        if width % self.r or width // self.r < 1:
            raise UserError(
                f"adapt: side_tuning's r {self.r} does not divide the width {width} of '{place.where}'"
            )
        made = [self._side_blocks(place, stack, chosen) for stack in stacks]
        channels_D = self._channels(place, [block for stack in stacks for _, _, block in stack], width)
        for ladder_blocks in made:
            for block in ladder_blocks.values():
                if channels_D is not None and self.init == "pruned":
                    block.prune(channels_D)
                elif not block.kept_heads:
                    block.kept_heads = tuple(range(block.side_heads.query))
        holder = nn.ModuleList()
        for stack, ladder_blocks in zip(stacks, made, strict=True):
            holder.append(self._ladder(place, stack, ladder_blocks, channels_D, holder))
        self.ladders = [ladder for ladder in holder if isinstance(ladder, Ladder)]
        if part.ladder is None:
            part.ladder = Ladders()
        part.ladder.ladders.extend(self.ladders)  # another adapter's may be there: one of them is active
        part.ladder.train(part.training)
        if place.where == "vision":
            self._follow_layers(part)
        self.parameters = self._names(stacks)

    def _side_blocks(self, place: Place, stack: Blocks, chosen: list[int]) -> dict[int, SideBlock]:
        """A side block for each block of a stack that has a rung."""
        numbers = [number for number, _, _ in stack if number in chosen]
        if not numbers or numbers[-1] != stack[-1][0]:
            raise UserError(
                f"adapt: side_tuning on '{place.where}' needs its last block, {stack[-1][0]}, among "
                "`blocks`: what the side network computes comes after it"
            )
        if self.drop:
            numbers = numbers[::-2][::-1]
        blocks = {number: block for number, _, block in stack}
        if place.where == "vision":
            return {number: vision_block(blocks[number], self.r, place.device) for number in numbers}
        first, count = stack[0][0], len(stack)
        return {
            number: language_block(
                blocks[number], number - first, count + number - first, self.r, place.device
            )
            for number in numbers
        }

    def _channels(self, place: Place, blocks: Sequence[nn.Module], width: int) -> Tensor | None:
        """The channels of the stream that the side network starts from; None where no values are known."""
        if place.device.type == "meta":
            return None
        if self.init == "random":
            return None
        if place.where == "vision":
            blocks = [vision_block(block, 1, place.device).source for block in blocks]
        return top(width_importance(blocks, width), width // self.r)

    def _ladder(
        self,
        place: Place,
        stack: Blocks,
        blocks: dict[int, SideBlock],
        channels_D: Tensor | None,
        before: nn.ModuleList,
    ) -> Ladder:
        width = width_of(place)
        reduced = width // self.r
        encoder = place.where == "language" and is_encoder(place.part, stack[0][2])
        translate: Any = None
        if place.where == "language":
            translate = as_is
            if is_t5(stack[0][2]):
                translate = T5Arguments(before[0] if len(before) else None)
        with torch.device(place.device):
            rungs = {
                number: Rung(width, reduced, block.module, self.temperature, block.kept_heads)
                for number, block in blocks.items()
            }
            end = _narrow_norm(place.part, reduced, channels_D) if encoder else None
            ladder = Ladder(width, reduced, rungs, translate, end)
        if channels_D is not None:
            # Pruned weights mean something in the channels that they were cut from.
            for layer in (ladder.start, *(rung.down for rung in rungs.values())):
                _select(layer, channels_D)
            if ladder.up is not None:
                _select(ladder.up, channels_D)
        ladder.wanted = set() if encoder else {stack[-1][0]}
        ladder.climb([(number, block) for number, _, block in stack])
        return ladder

    def _follow_layers(self, tower: Any) -> None:
        """Let the ladder know which layers a call asks for."""
        (ladder,) = self.ladders

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layers = kwargs.get("layers", args[1] if len(args) > 1 else None)
            ladder.wanted = set(tower.resolve(layers))

        tower.register_forward_pre_hook(before, with_kwargs=True)

    def _names(self, stacks: list[Blocks]) -> dict[str, nn.Parameter]:
        """File keys: the library's own names of the blocks, and where in the rung."""
        found: dict[str, nn.Parameter] = {}
        for index, (stack, ladder) in enumerate(zip(stacks, self.ladders, strict=True)):
            names = {str(number): name for number, name, _ in stack}
            side = f"side{index}" if len(stacks) > 1 else "side"
            for name, parameter in ladder.named_parameters():
                first, _, rest = name.partition(".")
                if first == "rungs":
                    number, _, rest = rest.partition(".")
                    found[f"{names[number]}.side.{rest}"] = parameter
                else:
                    found[f"{side}.{name}"] = parameter
        return found

    def set_active(self, active: bool) -> None:
        """Let the side network answer, or the part as it was."""
        super().set_active(active)
        for ladder in self.ladders:
            ladder.active = active


class Ladders(nn.Module):
    """The side networks of a part: one (or an encoder's and a decoder's) for each of its adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.ladders = nn.ModuleList()

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in Ladder."""
        ladder: Any
        for ladder in self.ladders:
            ladder.set_activation_checkpointing(enabled)


def _narrow_norm(language: Any, reduced: int, channels_D: Tensor | None) -> nn.Module:
    """The encoder's final norm for the side network's channels."""
    norm = language.model.get_encoder().final_layer_norm
    made = type(norm)(reduced).float()
    if channels_D is not None:
        with torch.no_grad():
            made.weight.copy_(norm.weight[channels_D])
    return made


@torch.no_grad()
def _select(layer: nn.Linear, channels_D: Tensor) -> None:
    """A layer that picks these channels (or puts its inputs into them, when it is the wider way)."""
    layer.weight.zero_()
    places = torch.arange(len(channels_D))
    if layer.out_features == len(channels_D):
        layer.weight[places, channels_D] = 1
    else:
        layer.weight[channels_D, places] = 1


__all__ = ["Ladders", "SideTuning"]
