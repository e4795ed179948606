"""Visual prompts for windowed encoders: learned tokens in every attention window of a block.

Jia et al. 2022, arXiv 2203.12119, as their code has it for Swin, deep. Knows the window attentions of timm's
Swin and TinyViT; knows nothing about connectors. An attention layer is replaced by one of the same class and
state that lets more tokens in: the library's own forward computes with them.

    N windows of all images, W tokens of a window, D channels of a stage, p prompts
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.tiny_vit import Attention as TinyVitAttention
from timm.models.tiny_vit import TinyVitBlock
from torch import Tensor, nn
from torch.nn.functional import dropout, pad

from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.visual_prompt import CANNOT, check_settings, try_once
from vlm_adapt.adapt.visual_prompt_tokens import free_name
from vlm_adapt.errors import UserError


class WindowPrompts(nn.Module):
    """p prompts of one block, the same in each of its windows."""

    def __init__(self, tokens: int, block: Any, width: int, bound: float, rate: float, device: torch.device):
        super().__init__()
        self.rate, self.active = rate, True
        # In a tuple, so that it is no part of this module. TinyViT's attention has a norm of its own.
        self.block = (block,)
        self.prompts = nn.Parameter(torch.empty(tokens, width, device=device))
        nn.init.uniform_(self.prompts, -bound, bound)

    def forward(self, x_NWD: Tensor) -> Tensor:
        """The windows with the prompts, normed as the block norms its tokens, at their end."""
        prompts_pD: Tensor = self.prompts
        if self.training and self.rate and prompts_pD.requires_grad:
            prompts_pD = dropout(prompts_pD, self.rate)
        prompts_pD = prompts_pD.to(x_NWD.dtype)
        if isinstance(self.block[0], SwinTransformerBlock):
            prompts_pD = self.block[0].norm1(prompts_pD).to(x_NWD.dtype)
        return torch.cat([x_NWD, prompts_pD.expand(len(x_NWD), -1, -1)], dim=1)


def acting(attention: nn.Module) -> list[WindowPrompts]:
    """The prompts that an attention layer has and that act."""
    return [child for child in attention.children() if isinstance(child, WindowPrompts) and child.active]


def _more(attention: nn.Module, bias_HWW: Tensor) -> Tensor:
    """Biases by offset with rows and columns of none for prompts, which have no place."""
    more = sum(len(child.prompts) for child in acting(attention))
    return pad(bias_HWW, (0, more, 0, more)) if more else bias_HWW


class SwinWindows(WindowAttention):
    """Swin's attention, with prompts in each window."""

    def _get_rel_pos_bias(self) -> Tensor:
        return _more(self, super()._get_rel_pos_bias())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As the library's; the prompts' own outputs are left out."""
        width = x.shape[1]
        for prompts in acting(self):
            x = prompts(x)
        if mask is not None:
            more = x.shape[1] - width
            mask = pad(mask, (0, more, 0, more))  # shifted windows hide tokens from each other, no prompts
        return super().forward(x, mask)[:, :width]


class TinyVitWindows(TinyVitAttention):
    """TinyViT's attention, with prompts in each window."""

    def get_attention_biases(self, device: torch.device) -> Tensor:
        """As the library's, with none for prompts."""
        return _more(self, super().get_attention_biases(device))

    def forward(self, x: Tensor) -> Tensor:
        """As the library's; the prompts' own outputs are left out."""
        width = x.shape[1]
        for prompts in acting(self):
            x = prompts(x)
        return super().forward(x)[:, :width]


# The class of an attention layer in a block of windows, and the one that takes its place.
WINDOWS = {
    (SwinTransformerBlock, WindowAttention): SwinWindows,
    (TinyVitBlock, TinyVitAttention): TinyVitWindows,
}


class VisualPromptWindows(Method):
    """Learned tokens in the attention windows of timm's Swin and TinyViT, in each chosen block its own.

    They are tokens, not a prefix of keys and values: they pass the block's norm and its q, k and v, attend
    and are attended to. But what a prompt becomes is dropped at the end of the attention, since the next
    block brings prompts of its own (the paper's deep variant) and merging patches drops them; so its queries
    change no feature, and a block's p prompts do what p more keys and values of its own inputs would. They
    have no place, so no bias by offset, and no shifted window hides them. Blocks without windows
    (convolutions) have none. p * D parameters a block, D being its stage's width.

    Drawn from U(-b, b), b = sqrt(6 / (3 P^2 + D)) with the patch and width of the first stage, as in the
    paper's code.

    Args:
        tokens: p.
        dropout: of the prompts while they train.
    """

    name = "visual_prompt_windows"
    summary = "learned tokens in each attention window of Swin and TinyViT, in every block its own"
    paper = "Jia et al. 2022, arXiv 2203.12119"
    sides = ("vision",)
    identity = False
    example = {"tokens": 2}  # noqa: RUF012

    def __init__(self, tokens: int = 10, dropout: float = 0.0):
        super().__init__()
        check_settings(self.name, tokens, dropout)
        self.tokens, self.dropout = tokens, float(dropout)
        self.prompts: list[WindowPrompts] = []

    def attach(self, place: Place) -> None:
        """Let the chosen blocks' attentions have prompts.

        Raises:
            UserError: no block with windows that are known, or a chosen one without.
        """
        part: Any = place.part
        self.part = part
        blocks = place.blocks()
        windowed = [(number, block) for number, _, block in blocks if _kind(block) is not None]
        if not windowed:
            raise UserError(
                f"adapt: '{self.name}' finds no attention windows of timm's Swin or TinyViT in "
                f"{type(place.inner).__name__}: use visual_prompt for a plain ViT, image_prompt for any tower"
            )
        if place.chosen is not None and len(windowed) < len(blocks):
            without = {number for number, _, _ in blocks} - {number for number, _ in windowed}
            raise UserError(
                f"adapt: '{self.name}': block {min(without)} has no attention windows; choose among "
                f"{', '.join(str(number) for number, _ in windowed)}, or leave blocks out"
            )
        pixels = part.image_spec.size[0] // part.grids([0])[0][0]
        bound = math.sqrt(6.0 / (3 * pixels**2 + part.widths([0])[0]))
        inner = {id(module): name for name, module in place.inner.named_modules()}
        undo: list[Callable[[], None]] = []
        block: Any
        for number, block in windowed:
            kind = _kind(block)
            if kind is not None and not isinstance(block.attn, kind):
                undo.append(functools.partial(setattr, block, "attn", block.attn))
                block.attn = _taken_over(block.attn, kind)
            leaf = free_name(block.attn, self.name)
            (width,) = part.widths([part.block_layers[number]])
            prompts = WindowPrompts(self.tokens, block, width, bound, self.dropout, place.device)
            block.attn.add_module(leaf, prompts.train(part.training))
            undo.append(functools.partial(delattr, block.attn, leaf))
            self.prompts.append(prompts)
            self.parameters[f"{inner[id(block)]}.attn.{self.name}.prompts"] = prompts.prompts
        try:
            try_once(place)
        except CANNOT as error:
            for step in reversed(undo):
                step()
            self.prompts, self.parameters = [], {}
            raise UserError(
                f"adapt: '{self.name}' does not work with this {type(place.inner).__name__} ({error}): take "
                "image_prompt"
            ) from error

    def set_active(self, active: bool) -> None:
        """As in Method; without them the library's own forward runs on its own tokens."""
        super().set_active(active)
        for prompts in self.prompts:
            prompts.active = active


def _kind(block: Any) -> Any:
    """The class that takes the place of a block's attention; None where there are no windows."""
    attention = getattr(block, "attn", None)
    fitting = (
        kind
        for (outer, own), kind in WINDOWS.items()
        if isinstance(block, outer) and isinstance(attention, own)
    )
    return next(fitting, None)


def _taken_over(attention: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A layer of another class with the same state: weights under their names, hooks, settings."""
    layer = kind.__new__(kind)
    layer.__dict__ = attention.__dict__
    return layer
