"""Who sees whom in a batch: the layout of its texts, handed from the batch to the language.

Knows a batch's numbers of documents, branches and blocks; knows nothing about attention backends.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from vlm_adapt.data.collate import Batch
from vlm_adapt.language.layout import Layout, attention_mask

__all__ = ["attention_mask", "layout", "without_places"]


def layout(batch: Batch, told: bool = False) -> Layout:
    """Where the batch's texts lie, and who sees whom in them.

    Args:
        told: the language is told other positions than those of the row, from which a backend without a
            mask might guess where texts begin: so it gets one.
    """
    plain = batch.plain and not told
    return Layout(batch.documents_BT, batch.blocks_BT, batch.branches_BT, batch.positions_BT, plain)


def without_places(batch: Batch) -> Batch:
    """The batch as a model without prompts reads it: their places hold nothing and count for nothing.

    Flat positions of what predicts stay what they are: in a causal batch the places become padding, in an
    encoder's rows, which all begin with them, they are cut off.
    """
    places_DP = batch.prompt_positions_DP
    count, (rows, length) = places_DP.shape[1], batch.ids_BT.shape
    none_DP = places_DP[:, :0]
    if batch.decoder_ids_BU is not None:

        def moved(places_K: Tensor) -> Tensor:
            return places_K - (places_K // length + 1) * count

        grids = ("ids_BT", "documents_BT", "blocks_BT", "branches_BT", "positions_BT")
        return replace(
            batch,
            **{name: getattr(batch, name)[:, count:] for name in grids},
            image_positions_K=moved(batch.image_positions_K),
            state_positions_S=moved(batch.state_positions_S),
            prompt_positions_DP=none_DP,
        )
    flat = places_DP.flatten()
    causal = bool((batch.blocks_BT.flatten()[flat] > 0).all())
    return replace(
        batch,
        documents_BT=batch.documents_BT.flatten().index_fill(0, flat, 0).view(rows, length),
        positions_BT=(batch.positions_BT - count).clamp_min(0),
        blocks_BT=(batch.blocks_BT - count * causal).clamp_min(0),
        plain=False,
        prompt_positions_DP=none_DP,
    )
