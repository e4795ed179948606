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

from vlm_adapt.adapt.ladder import Arguments, Ladder, Rung
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.prune import top, width_importance
from vlm_adapt.adapt.side_blocks import SideBlock, language_block, vision_block
from vlm_adapt.errors import UserError

Blocks = list[tuple[int, str, nn.Module]]


class SideTuning(Method):
    """A side network along all blocks, or along those that `blocks` names (the last one among them).

    Args:
        r: how many times narrower than the part; it must divide the part's width.
        temperature: T of the gates, sigmoid(alpha / T).
        drop: a rung at every second block only, counted from the last.
        start: `pruned` (from the part's weights) or `random`.

    Raises:
        UserError: the part is no stack of plain transformer blocks, or r does not fit it.
    """

    name = "side_tuning"
    summary = "a narrow network beside the frozen part trains; the part keeps no activations"
    paper = "Sung et al. 2022, arXiv 2206.06522"
    sides = ("vision", "language")
    alone = True
    identity = False
    example = {"r": 2}  # noqa: RUF012

    def __init__(self, r: int = 8, temperature: float = 0.1, drop: bool = False, start: str = "pruned"):
        super().__init__()
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise UserError(f"adapt: side_tuning takes a whole number r from 1, not {r!r}")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or temperature <= 0:
            raise UserError(f"adapt: side_tuning takes a temperature above 0, not {temperature!r}")
        if not isinstance(drop, bool):
            raise UserError(f"adapt: side_tuning's drop is true or false, not {drop!r}")
        if start not in ("pruned", "random"):
            raise UserError(f"adapt: side_tuning starts 'pruned' or 'random', not {start!r}")
        self.r, self.temperature, self.drop, self.start = r, float(temperature), drop, start
        self.ladders: list[Ladder] = []

    def attach(self, place: Place) -> None:
        """Build the side network and let it listen to the part's blocks."""
        part: Any = place.part
        self.part = part
        if getattr(part, "ladder", None) is not None:
            raise UserError(
                f"adapt: '{place.where}' has a side network already: give it one line of the plan"
            )
        every = _running(place)
        chosen = [number for number, _, _ in place.blocks()]
        stacks = _stacks(part, every) if place.where == "language" else [_plain(place, every)]
        width = _width(place)
        if width % self.r or width // self.r < 1:
            raise UserError(
                f"adapt: side_tuning's r {self.r} does not divide the width {width} of '{place.where}'"
            )
        made = [self._side_blocks(place, stack, chosen) for stack in stacks]
        channels_D = self._channels(place, [block for stack in stacks for _, _, block in stack], width)
        for ladder_blocks in made:
            for block in ladder_blocks.values():
                if channels_D is not None and self.start == "pruned":
                    block.prune(channels_D)
                elif not block.kept_heads:
                    block.kept_heads = tuple(range(block.side_heads.query))
        holder = nn.ModuleList()
        for stack, ladder_blocks in zip(stacks, made, strict=True):
            holder.append(self._ladder(place, stack, ladder_blocks, channels_D, holder))
        self.ladders = [ladder for ladder in holder if isinstance(ladder, Ladder)]
        part.ladder = Ladders(self.ladders)
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
        if self.start == "random":
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
        width = _width(place)
        reduced = width // self.r
        encoder = place.where == "language" and _is_encoder(place.part, stack[0][2])
        translate: Any = None
        if place.where == "language":
            translate = _as_is
            if _is_t5(stack[0][2]):
                translate = _T5Arguments(before[0] if len(before) else None)
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
    """The side networks of a part: one, or an encoder's and a decoder's."""

    def __init__(self, ladders: Sequence[Ladder]):
        super().__init__()
        self.ladders = nn.ModuleList(ladders)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in Ladder."""
        ladder: Any
        for ladder in self.ladders:
            ladder.set_activation_checkpointing(enabled)


def _running(place: Place) -> Blocks:
    """Every block that runs, whatever the plan's line chooses."""
    return Place(place.where, place.part, place.unused).blocks()


def _width(place: Place) -> int:
    """Channels of the residual stream (the embeddings of some OPTs are narrower)."""
    part: Any = place.part
    return int(part.config.hidden_size if place.where == "language" else part.width)


def _plain(place: Place, blocks: Blocks) -> Blocks:
    """The blocks of a plain ViT."""
    tower: Any = place.part
    plain = (
        getattr(getattr(tower, "image_spec", None), "native", None) is None
        and len(tower.block_names) == tower.depth
        and len(set(tower.widths(range(tower.depth)))) == 1
        and len(set(tower.grids(range(tower.depth)))) == 1
    )
    if not plain:
        raise UserError(
            "adapt: side_tuning on 'vision' takes plain ViTs of one image size, and this tower has stages, "
            "or images of their own sizes: choose another method (lora, adaptformer)"
        )
    return blocks


def _stacks(language: Any, blocks: Blocks) -> list[Blocks]:
    """The blocks of the encoder and those of the decoder, or all of them."""
    if not language.seq2seq:
        return [blocks]
    if not _is_t5(blocks[0][2]):
        raise UserError(
            "adapt: side_tuning takes the encoder-decoders of the T5 family, not "
            f"{type(language.model).__name__}: choose another method"
        )
    parts = ([b for b in blocks if _is_encoder(language, b[2])], [b for b in blocks if b[2].is_decoder])
    return [list(part) for part in parts]


def _is_t5(block: Any) -> bool:
    layers = getattr(block, "layer", None)
    return isinstance(layers, nn.ModuleList) and hasattr(layers[0], "SelfAttention")


def _is_encoder(language: Any, block: Any) -> bool:
    return bool(language.seq2seq) and not block.is_decoder


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


def _as_is(rung: Rung, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Arguments:
    """A block of the same class takes the same arguments: mask, rotary angles, cache."""
    dtype = rung.down.weight.dtype

    def fit(value: Any) -> Any:
        # A mask must have the queries' dtype. One that knows more than its values is left as it is.
        mask = type(value) is Tensor and value.ndim == 4 and value.is_floating_point()
        return value.to(dtype) if mask and not torch.is_autocast_enabled(value.device.type) else value

    return tuple(fit(value) for value in args[1:]), {name: fit(value) for name, value in kwargs.items()}


class _T5Arguments:
    """T5's blocks hand distances on by head, and the decoder's read the encoder."""

    def __init__(self, encoder: Any):
        self.encoders = [encoder]  # in a list, so that it is no part of anything else

    def __call__(self, rung: Rung, args: Any, kwargs: dict[str, Any], output: Any) -> Arguments:
        """(hidden, mask, distances, encoder's states, their mask, distances to them) of the side block."""
        args, kwargs = _as_is(rung, args, kwargs, output)
        mask, _, states, states_mask = (*args, None, None, None, None)[:4]
        distances = output[1][:, list(rung.heads)] if output[1] is not None else None
        if states is not None and self.encoders[0] is not None:
            states = self.encoders[0].result
        return (mask, distances, states, states_mask, None), kwargs


__all__ = ["Ladders", "SideTuning"]
