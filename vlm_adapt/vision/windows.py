"""TinyViT's attention windows, fitted to small images.

Knows the windowed blocks of timm's TinyViT; knows nothing of the rest of a tower. timm pads a map that
windows do not divide with zero tokens, and these are attended to like any other: at 64 pixels the third
stage has 4 x 4 tokens in a 14 x 14 window, so 180 of 196 are padding, which cost as much as an image
of 224 pixels and take a share of every softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vlm_adapt.errors import UserError


def fitted_window(side: int, window: int) -> int:
    """The smallest window that covers `side` tokens with as many windows as `window` needs."""
    windows = -(-side // window)
    return -(-side // windows)


def fit_windows(trunk: Any, grids: Sequence[tuple[int, int]]) -> int:
    """Shrink the windows of a TinyViT to its maps; return how many blocks changed.

    A smaller window's attention biases are those of the same offsets in the larger one, so tokens attend
    to each other with their own weights and to no padding. Where a map is no smaller than its window
    and a multiple of it (all of them at 224 pixels), nothing changes.

    Args:
        trunk: timm's TinyVit.
        grids: (rows, columns) of each stage.
    Raises:
        UserError: not a TinyViT, or maps that are not square.
    """
    if type(trunk).__name__ != "TinyVit":
        raise UserError(f"fit_windows is for TinyViT only, not {type(trunk).__name__}: leave it out")
    changed = 0
    for stage, (rows, columns) in zip(trunk.stages, grids, strict=True):
        for block in stage.blocks:
            if not hasattr(block, "window_size"):
                continue
            if rows != columns:
                raise UserError("fit_windows needs square images: leave it out")
            window = fitted_window(rows, block.window_size)
            if window == block.window_size:
                continue
            attention, old = block.attn, block.window_size
            # Offsets are numbered row by row: (0, 0), (0, 1), ... (1, 0), ...
            biases_HLL = attention.attention_biases.detach().unflatten(1, (old, old))[:, :window, :window]
            attention.attention_biases = nn.Parameter(biases_HLL.flatten(1).clone())
            index_LL = torch.arange(old * old).unflatten(0, (old, old))[:window, :window].flatten()
            own = attention.attention_bias_idxs[index_LL][:, index_LL]
            attention.attention_bias_idxs = own // old * window + own % old
            attention.resolution, block.window_size = (window, window), window
            changed += 1
    return changed
