"""Visual prompt tuning of plain ViTs: learned tokens between the class token and the patches.

Jia et al. 2022, arXiv 2203.12119. Knows which towers are plain ViTs and which blocks get prompts; how these
come in is `visual_prompt_tokens`' matter, and `visual_prompt_packed`'s for images of many sizes.

    L blocks, D channels, p prompts; P x P pixels a patch
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.visual_prompt_packed import PackedPrompts, packed_hook
from vlm_adapt.adapt.visual_prompt_tokens import Line, Prompts, free_name, token_hook
from vlm_adapt.errors import UserError

# What a library raises when its blocks cannot do with more tokens; a trial run turns it into a sentence.
CANNOT = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)


def check_settings(name: str, tokens: Any, dropout: Any) -> None:
    """Raise UserError unless `tokens` and `dropout` can be what a method of prompts takes."""
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise UserError(f"adapt: {name} takes a whole number of tokens from 1, not {tokens!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise UserError(f"adapt: {name}'s dropout is a number from 0 and below 1, not {dropout!r}")


class VisualPrompt(Method):
    """Learned tokens in a frozen ViT, after class and register tokens, with no position.

    Shallow, p * D parameters come in once, before the first chosen block. Deep, every chosen block has p of
    its own, which take the place of those that the block before handed on: L * p * D parameters. Where a
    choice of blocks leaves some out, what was last put in passes through them. Features keep their shape:
    towers give the patches, which are the last tokens. Rotary positions leave prompts unturned.

    Each of the prompts is drawn from U(-b, b) with b = sqrt(6 / (3 P^2 + D)), as in the paper's code.

    Args:
        tokens: p.
        deep: whether every chosen block has prompts of its own.
        dropout: of the prompts while they train, drawn for each image.
    """

    name = "visual_prompt"
    summary = "learned tokens among a plain ViT's patches: before its first block, or deep in every block"
    paper = "Jia et al. 2022, arXiv 2203.12119"
    sides = ("vision",)
    identity = False
    example = {"tokens": 2}  # noqa: RUF012

    def __init__(self, tokens: int = 10, deep: bool = True, dropout: float = 0.0):
        super().__init__()
        check_settings(self.name, tokens, dropout)
        if not isinstance(deep, bool):
            raise UserError(f"adapt: {self.name}'s deep is true or false, not {deep!r}")
        self.tokens, self.deep, self.dropout = tokens, deep, float(dropout)
        self.line: Line | None = None

    def attach(self, place: Place) -> None:
        """Hang prompts on the chosen blocks, and see that the tower can do with them.

        Raises:
            UserError: no plain ViT, or one whose blocks take no more tokens than there are patches.
        """
        part: Any = place.part
        self.part = part
        patches, pixels = plain_patches(part, self.name)
        chosen = place.blocks()
        self.line = line = Line(self.tokens, chosen[0][0], patches)
        for other in {id(m.line): m.line for m in part.modules() if isinstance(m, Prompts)}.values():
            other.later.append(line)
        width = part.widths()[0]
        bound = math.sqrt(6.0 / (3 * pixels + width))
        inner = {id(module): name for name, module in place.inner.named_modules()}
        packed = part.image_spec.native is not None
        kind, hook = (PackedPrompts, packed_hook) if packed else (Prompts, token_hook)
        undo: list[Callable[[], None]] = []
        for number, block in list(enumerate(part.blocks))[line.first :]:
            leaf = None
            if number in {entry[0] for entry in (chosen if self.deep else chosen[:1])}:
                leaf = free_name(block, self.name)
                prompts = kind(line, width, bound, self.dropout, place.device)
                block.add_module(leaf, prompts.train(part.training))
                self.parameters[f"{inner[id(block)]}.{self.name}.prompts"] = prompts.prompts
                undo.append(functools.partial(delattr, block, leaf))
            handle = block.register_forward_pre_hook(hook(line, number, leaf), with_kwargs=True)
            undo.append(handle.remove)
        try:
            try_once(place)
        except CANNOT as error:
            for step in undo:
                step()
            self.parameters = {}
            for module in part.modules():
                if isinstance(module, Prompts) and line in module.line.later:
                    module.line.later.remove(line)
            raise UserError(
                f"adapt: '{self.name}' cannot give more tokens to {type(place.inner).__name__}, whose blocks "
                "count on its patches (relative positions, or a mixing over a fixed number of tokens): "
                "use image_prompt, a learned frame of pixels"
            ) from error

    def set_active(self, active: bool) -> None:
        """As in Method; without them no token comes in anywhere."""
        super().set_active(active)
        assert self.line is not None
        self.line.active = active


def plain_patches(part: Any, name: str) -> tuple[int, int]:
    """Patches of an image, and pixels of a patch, where a tower is a plain ViT.

    Raises:
        UserError: it is not.
    """
    every = range(part.depth)
    grids, widths = set(part.grids(every)), set(part.widths(every))
    rows, columns = part.grid
    if len(grids) > 1 or len(widths) > 1 or len(part.block_names) != part.depth:
        raise UserError(
            f"adapt: '{name}' is for plain ViTs, whose blocks all see the same tokens, and "
            f"{type(part).__name__} holds another kind of encoder: use image_prompt, a learned frame of "
            "pixels, or for Swin and TinyViT visual_prompt_windows"
        )
    if part.image_spec.native is not None:
        return 0, part.image_spec.native.patch**2  # each image has its own number; a layout knows it
    height, width = part.image_spec.size
    return rows * columns, (height // rows) * (width // columns)


def try_once(place: Place) -> None:
    """Run the tower's used blocks on one grey image; not where there are no values, nor our packed ones."""
    part: Any = place.part
    last = max(number for number, name in enumerate(part.block_names) if place.is_used(name))
    device = place.device
    layers = [part.block_layers[last]]
    if device.type == "meta" or part.image_spec.native is not None:
        return
    pixels_NCHW = torch.zeros(1, len(part.image_spec.mean), *part.image_spec.size, device=device)
    with (
        torch.no_grad(),
        # Methods that came before may hold float32 beside a base in half precision.
        torch.autocast(device.type, part.dtype, enabled=part.dtype in (torch.bfloat16, torch.float16)),
    ):
        (features_NPD,) = part(pixels_NCHW.to(part.dtype), layers)
    (rows, columns), (width,) = part.grids(layers)[0], part.widths(layers)
    if features_NPD.shape[1:] != (rows * columns, width):
        raise ValueError(f"features have shape {tuple(features_NPD.shape)}")
