"""Putting image and state tokens into their places among the word embeddings.

Knows flat positions; knows nothing about where the tokens come from. A mismatch is an error, since
scattering anyway would put one image's tokens into another's sentence.
"""

from __future__ import annotations

from torch import Tensor


def splice(embeds_BTD: Tensor, tokens_ND: Tensor, positions_N: Tensor) -> Tensor:
    """Put N tokens at flat positions of [B*T].

    When there is no place for any (a microbatch without images), the tokens still take part with
    weight zero: every rank then runs the same modules, and no ZeRO collective waits for ever.

    Raises:
        ValueError: tokens and places differ in number.
    """
    tokens_ND = tokens_ND.to(embeds_BTD.dtype)
    if not len(positions_N):
        return embeds_BTD + tokens_ND.sum() * 0
    if len(tokens_ND) != len(positions_N):
        raise ValueError(f"{len(tokens_ND)} feature vectors for {len(positions_N)} places in the sentence")
    flat = embeds_BTD.flatten(0, 1).index_copy(0, positions_N, tokens_ND)
    return flat.view_as(embeds_BTD)
