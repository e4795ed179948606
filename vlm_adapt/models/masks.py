"""Who sees whom in a row of documents, branches and two-way prefixes.

Knows document, branch and block numbers; knows nothing about attention backends.

    a row:      prefix(two-way)  text(causal)      columns: keys, rows: queries, # = sees
    blocks      0 0 0            1 2 3
                # # # . . .
                # # # . . .      the cumulative form of big_vision's make_attn_mask: a query sees every
                # # # . . .      key of its own document whose block is not above its own
                # # # # . .
                # # # # # .      and of the branches only the prefix (branch 0) and its own
                # # # # # #
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_mask(documents_BT: Tensor, blocks_BT: Tensor, branches_BT: Tensor) -> Tensor:
    """Who may see whom.

    Args:
        documents_BT: 0 at padding, else a document's number within its row.
        blocks_BT: cumulative count of causal tokens.
        branches_BT: 0 for the shared prefix.

    Returns:
        allow_BTT, True where the query (second axis) sees the key (third). Padding sees itself, so
        that no row of a softmax is empty.
    """
    same_document = documents_BT[:, :, None] == documents_BT[:, None, :]
    not_later = blocks_BT[:, None, :] <= blocks_BT[:, :, None]
    key_branch = branches_BT[:, None, :]
    on_my_branch = (key_branch == 0) | (key_branch == branches_BT[:, :, None])
    real = documents_BT > 0
    allow = same_document & not_later & on_my_branch & real[:, None, :]
    length = documents_BT.shape[1]
    return allow | torch.eye(length, dtype=torch.bool, device=allow.device)
