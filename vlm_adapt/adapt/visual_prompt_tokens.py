"""Learned tokens in a sequence of tokens: where they stand, and how they come in before a block.

Jia et al. 2022, arXiv 2203.12119. Knows blocks that hand a sequence [N, T, D] on, and that patches are its
last tokens; knows nothing about libraries or connectors. Every position is counted from the end of the
sequence, so nothing is kept between blocks and a block may be computed twice.

    N images, T tokens, D channels, p prompts, E channels of a rotary table
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout


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


def token_hook(line: Line, number: int, leaf: str | None) -> Callable[..., Any]:
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


def free_name(module: nn.Module, name: str) -> str:
    """`name`, or with a number behind it where a module has one of that name."""
    taken = dict(module.named_children())
    return next(free for free in (name, *(f"{name}_{n}" for n in range(2, 99))) if free not in taken)
