"""Visual prompt tuning of plain ViTs: learned tokens between the class token and the patches.

Jia et al. 2022, arXiv 2203.12119. Knows blocks that hand a sequence [N, T, D] on, and that patches are its
last tokens; knows nothing about libraries or connectors. Every position is counted from the end of the
sequence, so nothing is kept between blocks and a block may be computed twice.

    N images, T tokens, D channels, p prompts; P x P pixels a patch
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError

# What a library raises when its blocks cannot do with more tokens; a trial run turns it into a sentence.
CANNOT = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)


@dataclass(eq=False)
class Line:
    """The prompts of one method on a tower.

    Attributes:
        tokens: how many.
        first: the block before which they come in.
        patches: tokens that the sequence ends with.
        later: lines that came to the tower after this one; their prompts stand nearer to the patches.
    """

    tokens: int
    first: int
    patches: int
    active: bool = True
    later: list[Line] = field(default_factory=list)

    def behind(self, block: int) -> int:
        """Tokens after these prompts when block `block` begins."""
        others = sum(line.tokens for line in self.later if line.active and line.first < block)
        return self.patches + others


class Prompts(nn.Module):
    """p prompts for the input of one block, U(-bound, bound) at the start."""

    def __init__(self, line: Line, width: int, bound: float, rate: float, device: torch.device):
        super().__init__()
        self.line, self.rate = line, rate
        self.prompts = nn.Parameter(torch.empty(line.tokens, width, device=device))
        nn.init.uniform_(self.prompts, -bound, bound)

    def drawn(self, images: int, dtype: torch.dtype) -> Tensor:
        """prompts_NpD, with dropout of each image's own while they train."""
        prompts_NpD = self.prompts.expand(images, -1, -1)
        if self.training and self.rate and self.prompts.requires_grad:
            prompts_NpD = dropout(prompts_NpD, self.rate)
        return prompts_NpD.to(dtype)

    def forward(self, hidden_NTD: Tensor, behind: int, replace: bool) -> Tensor:
        """Put the prompts before the last `behind` tokens, in place of as many if `replace`.

        Raises:
            ValueError: no sequence of tokens, or one too short.
        """
        if hidden_NTD.ndim != 3 or hidden_NTD.shape[1] < behind:
            raise ValueError(f"a block's input has shape {tuple(hidden_NTD.shape)}")
        end = hidden_NTD.shape[1] - behind
        start = end - self.line.tokens if replace else end
        prompts_NpD = self.drawn(len(hidden_NTD), hidden_NTD.dtype)
        return torch.cat([hidden_NTD[:, :start], prompts_NpD, hidden_NTD[:, end:]], dim=1)


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
        undo: list[Callable[[], None]] = []
        for number, block in list(enumerate(part.blocks))[line.first :]:
            leaf = None
            if number in {entry[0] for entry in (chosen if self.deep else chosen[:1])}:
                leaf = free_name(block, self.name)
                prompts = Prompts(line, width, bound, self.dropout, place.device)
                block.add_module(leaf, prompts.train(part.training))
                self.parameters[f"{inner[id(block)]}.{self.name}.prompts"] = prompts.prompts
                undo.append(functools.partial(delattr, block, leaf))
            handle = block.register_forward_pre_hook(_hook(line, number, leaf), with_kwargs=True)
            undo.append(handle.remove)
        try:
            try_once(place)
        except CANNOT as error:
            for step in undo:
                step()
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


def _hook(line: Line, number: int, leaf: str | None) -> Callable[..., Any]:
    """What happens before block `number`: its prompts come in, if it has any."""

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not line.active:
            return None
        hidden_NTD, *more = args
        if leaf is not None:
            # Looked up, not held: a copy of the tower calls its own.
            prompts = block.get_submodule(leaf)
            hidden_NTD = prompts(hidden_NTD, line.behind(number), number > line.first)
        rope_TE = kwargs.get("rope")
        if isinstance(rope_TE, Tensor):  # timm's [sin, cos] for all tokens after class and registers
            unturned_pE = torch.zeros_like(rope_TE[..., :1, :]).repeat_interleave(line.tokens, -2)
            unturned_pE[..., rope_TE.shape[-1] // 2 :] = 1
            kwargs = kwargs | {"rope": torch.cat([unturned_pE, rope_TE], dim=-2)}
        return (hidden_NTD, *more), kwargs

    return before


def plain_patches(part: Any, name: str) -> tuple[int, float]:
    """Patches of an image, and pixels of a patch, where a tower is a plain ViT.

    Raises:
        UserError: it is not.
    """
    every = range(part.depth)
    grids, widths = set(part.grids(every)), set(part.widths(every))
    if part.image_spec.native is not None:
        raise UserError(
            f"adapt: '{name}' works on towers for images of one size: leave model.vision.options.native out, "
            "or choose another method such as lora"
        )
    rows, columns = part.grid
    if len(grids) > 1 or len(widths) > 1 or len(part.block_names) != part.depth:
        raise UserError(
            f"adapt: '{name}' is for plain ViTs, whose blocks all see the same tokens, and "
            f"{type(part).__name__} holds another kind of encoder: use image_prompt, a learned frame of "
            "pixels, or for Swin and TinyViT visual_prompt_windows"
        )
    height, width = part.image_spec.size
    return rows * columns, (height / rows) * (width / columns)


def free_name(module: nn.Module, name: str) -> str:
    """`name`, or with a number behind it where a module has one of that name."""
    taken = dict(module.named_children())
    return next(free for free in (name, *(f"{name}_{n}" for n in range(2, 99))) if free not in taken)


def try_once(place: Place) -> None:
    """Run the tower's used blocks on one grey image; where there are no values, on no more than shapes."""
    part: Any = place.part
    last = max(number for number, name in enumerate(part.block_names) if place.is_used(name))
    device = place.device
    layers = [part.block_layers[last]]
    if device.type == "meta":
        return
    pixels_NCHW = torch.zeros(1, len(part.image_spec.mean), *part.image_spec.size, device=device)
    with (
        torch.no_grad(),
        # Methods that came before may hold float32 beside a base in half precision.
        torch.autocast(device.type, part.dtype, enabled=part.dtype in (torch.bfloat16, torch.float16)),
    ):
        (features_NPD,) = part(pixels_NCHW.to(part.dtype), layers)
    if features_NPD.shape[1:] != (part.grid[0] * part.grid[1], part.widths(layers)[0]):
        raise ValueError(f"features have shape {tuple(features_NPD.shape)}")
