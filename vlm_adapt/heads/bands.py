"""Bands of rows of a mask: how it is cut so that no more than so many logits are held at once.

Knows rows, halos and cosines; knows nothing about losses or gradients.

    E channels, h x w pixels of the map, W columns of the mask, L labels; R rows of the map at hand
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_adapt.heads.regularisation import Blocks
from vlm_adapt.heads.upsampled import SOFTMAX, WIDENED, Rows

VALUES_AT_ONCE = 2**24


@dataclass(frozen=True)
class Band:
    """Some rows of the mask and what is needed for them.

    Attributes:
        start, stop: rows of the mask.
        top, bottom: rows of the map, with the halo.
        begin, end: rows without the halo, counted from `top`.
        rows: where the mask's rows lie in the map's rows from `begin`.
    """

    start: int
    stop: int
    top: int
    bottom: int
    begin: int
    end: int
    rows: Rows


def bands(
    height: int, width: int, labels: int, out: int, blocks: Blocks | None, values: int, dtype: torch.dtype
) -> Iterator[Band]:
    """Cut a mask of `out` rows over a map of height x width so that a band holds about `values` values."""
    halo = blocks.depth if blocks else 0
    held = 2 + (3 * halo if blocks else 0)  # logits and gradient; three maps of every block
    at_once = max(2, values // max(1, width * labels * held) - 2 * halo)
    rows = Rows.between(height, out, dtype)
    for start, stop in rows.groups(at_once, of_map=True):
        first, last = rows.part(start, stop).span
        top, bottom = max(0, first - halo), min(height, last + halo)
        yield Band(start, stop, top, bottom, first - top, last - top, rows.part(start, stop, first))


def values_held(labels: int, width: int, out: int, depth: int = 0, values: int = VALUES_AT_ONCE) -> int:
    """The most values of labels x pixels that a loss (with its gradients) holds at once on a CPU.

        max(values, 2 (1 + d) (2 + 3 d) w L) + 3 max(2^21, 2 W L) + 3 max(2^18, W L)

    for L `labels`, a map of `width` w, a mask of `out` columns W and d blocks of regularisation: the band's
    logits and gradients, rows of it at the mask's width, and the softmax of some. At 1000 labels, 512 and
    1024 columns that is 25 million, 99 MiB in float32; the mask's own logits are 4 GB at 1024 rows.
    """
    band = max(values, 2 * (1 + depth) * (2 + 3 * depth) * width * labels)
    return band + 3 * max(WIDENED["cpu"], 2 * out * labels) + 3 * max(SOFTMAX["cpu"], out * labels)


def product(embeddings_ERw: Tensor, labels_LE: Tensor) -> Tensor:
    """logits_RwL in float32 at least."""
    product_PL = embeddings_ERw.flatten(1).T @ labels_LE.T
    if product_PL.dtype != torch.float64:
        product_PL = product_PL.float()
    return product_PL.view(*embeddings_ERw.shape[1:], -1)


def regularised(logits_RwL: Tensor, blocks: Blocks | None) -> Tensor:
    if blocks is None:
        return logits_RwL
    return blocks(logits_RwL.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
