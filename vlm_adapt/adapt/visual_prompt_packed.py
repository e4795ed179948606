"""Visual prompts where images of many sizes lie in one packed sequence: each image gets a copy of its own.

Knows blocks that are called with a sequence [1, T, D] and a layout of who lies where; what the prompts are is
`visual_prompt`'s matter. The layout that fits a sequence is found by its length, so that nothing is kept
between blocks here either.

    I images, T tokens of all of them, D channels, p prompts, E channels of a rotary table
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.visual_prompt_tokens import Line, Prompts


class PackedPrompts(Prompts):
    """p prompts for the input of one block, for every image of a packed sequence."""

    def forward(self, hidden_1TD: Tensor, layout: Any, later: int, replace: bool) -> Any:  # type: ignore[override]
        """Put the prompts before the last `later` tokens of every image's prefix; its layout is then another.

        Returns:
            the sequence and its layout.
        """
        tokens = self.line.tokens
        place = layout.prefix - later - (tokens if replace else 0)
        take_T = layout.inserted(place, tokens, replace)
        prompts_IpD = self.drawn(len(layout.order), hidden_1TD.dtype)
        hidden_TD = torch.cat([hidden_1TD[0], prompts_IpD.flatten(0, 1)])[take_T]
        return hidden_TD[None], layout.fit(len(hidden_TD))


def packed_hook(line: Line, number: int, leaf: str | None) -> Callable[..., Any]:
    """What happens before block `number`: its prompts come in, and positions make room for them."""

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not line.active:
            return None
        hidden_1TD, layout, *more = args
        if leaf is not None:
            prompts = block.get_submodule(leaf)
            hidden_1TD, layout = prompts(hidden_1TD, layout, line.behind(number), number > line.first)
        rotary = kwargs.get("position_embeddings")
        if rotary is not None and len(rotary[0]) < hidden_1TD.shape[1]:
            narrow = layout.fit(len(rotary[0]))
            take_T = narrow.inserted(narrow.prefix, layout.prefix - narrow.prefix)
            cos_TE, sin_TE = rotary
            still_ME = cos_TE.new_zeros(hidden_1TD.shape[1] - len(cos_TE), cos_TE.shape[1])
            turned = torch.cat([cos_TE, still_ME + 1])[take_T], torch.cat([sin_TE, still_ME])[take_T]
            kwargs = kwargs | {"position_embeddings": turned}
        return (hidden_1TD, layout, *more), kwargs

    return before
