"""Who sees whom in a batch: the layout of its texts, handed from the batch to the language.

Knows a batch's numbers of documents, branches and blocks; knows nothing about attention backends.
"""

from __future__ import annotations

from vlm_adapt.data.collate import Batch
from vlm_adapt.language.layout import Layout, attention_mask

__all__ = ["attention_mask", "layout"]


def layout(batch: Batch, told: bool = False) -> Layout:
    """Where the batch's texts lie, and who sees whom in them.

    Args:
        told: the language is told other positions than those of the row, from which a backend without a
            mask might guess where texts begin: so it gets one.
    """
    plain = batch.plain and not told
    return Layout(batch.documents_BT, batch.blocks_BT, batch.branches_BT, batch.positions_BT, plain)
