"""Which blocks of a part a ladder climbs, and what their calls say to the side network's.

Knows towers and languages by their blocks; knows nothing about side networks' weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.ladder import Arguments, Rung
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError

Blocks = list[tuple[int, str, nn.Module]]


def running(place: Place) -> Blocks:
    """Every block that runs, whatever the plan's line chooses."""
    return Place(place.where, place.part, place.unused).blocks()


def width_of(place: Place) -> int:
    """Channels of the residual stream (the embeddings of some OPTs are narrower)."""
    part: Any = place.part
    return int(part.config.hidden_size if place.where == "language" else part.width)


def plain(place: Place, blocks: Blocks) -> Blocks:
    """The blocks of a plain ViT."""
    tower: Any = place.part
    fits = (
        getattr(getattr(tower, "image_spec", None), "native", None) is None
        and len(tower.block_names) == tower.depth
        and len(set(tower.widths(range(tower.depth)))) == 1
        and len(set(tower.grids(range(tower.depth)))) == 1
    )
    if not fits:
        raise UserError(
            "adapt: side_tuning on 'vision' takes plain ViTs of one image size, and this tower has stages, "
            "or images of their own sizes: choose another method (lora, adaptformer)"
        )
    return blocks


def stacks_of(language: Any, blocks: Blocks) -> list[Blocks]:
    """The blocks of the encoder and those of the decoder, or all of them."""
    if not language.seq2seq:
        return [blocks]
    if not is_t5(blocks[0][2]):
        raise UserError(
            "adapt: side_tuning takes the encoder-decoders of the T5 family, not "
            f"{type(language.model).__name__}: choose another method"
        )
    parts = ([b for b in blocks if is_encoder(language, b[2])], [b for b in blocks if b[2].is_decoder])
    return [list(part) for part in parts]


def is_t5(block: Any) -> bool:
    """Whether a block is of the T5 family."""
    layers = getattr(block, "layer", None)
    return isinstance(layers, nn.ModuleList) and hasattr(layers[0], "SelfAttention")


def is_encoder(language: Any, block: Any) -> bool:
    """Whether a block is one of an encoder-decoder's encoder."""
    return bool(language.seq2seq) and not block.is_decoder


def as_is(rung: Rung, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Arguments:
    """A block of the same class takes the same arguments: mask, rotary angles, cache."""
    dtype = rung.down.weight.dtype

    def fit(value: Any) -> Any:
        # A mask must have the queries' dtype. One that knows more than its values is left as it is.
        mask = type(value) is Tensor and value.ndim == 4 and value.is_floating_point()
        return value.to(dtype) if mask and not torch.is_autocast_enabled(value.device.type) else value

    return tuple(fit(value) for value in args[1:]), {name: fit(value) for name, value in kwargs.items()}


class T5Arguments:
    """T5's blocks hand distances on by head, and the decoder's read the encoder."""

    def __init__(self, encoder: Any):
        self.encoders = [encoder]  # in a list, so that it is no part of anything else

    def __call__(self, rung: Rung, args: Any, kwargs: dict[str, Any], output: Any) -> Arguments:
        """(hidden, mask, distances, encoder's states, their mask, distances to them) of the side block."""
        args, kwargs = as_is(rung, args, kwargs, output)
        mask, _, states, states_mask = (*args, None, None, None, None)[:4]
        distances = output[1][:, list(rung.heads)] if output[1] is not None else None
        if states is not None and self.encoders[0] is not None:
            states = self.encoders[0].result
        return (mask, distances, states, states_mask, None), kwargs
