"""Where the texts of a batch lie and who sees whom in them, in the form that each attention backend takes.

Knows document, branch and block numbers and positions; knows nothing about models or images.

    a text:     prefix(two-way)  text(causal)      columns: keys, rows: queries, # = sees
    blocks      0 0 0            1 2 3
                # # # . . .
                # # # . . .      the cumulative form of big_vision's make_attn_mask: a query sees every
                # # # . . .      key of its own document whose block is not above its own
                # # # # . .
                # # # # # .      and of the branches only the prefix (branch 0) and its own
                # # # # # #

    B rows, T positions, N tokens that are no padding, row after row
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_adapt.attention.texts import Piece, Text, TextMask, causal_text, cuts


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


def near(queries_BQ: Tensor, keys_BK: Tensor, window: int) -> Tensor:
    """[B, Q, K], True where a key's position is less than `window` before the query's, or after it."""
    return (queries_BQ[:, :, None] - keys_BK[:, None, :]) < window


def additive_mask(allow_BQK: Tensor, dtype: torch.dtype) -> Tensor:
    """True/False -> 0/lowest as [B, 1, Q, K]. Transformers' eager attention adds a mask as it stands,
    so a boolean one would mask nothing."""
    mask = torch.zeros(allow_BQK.shape, dtype=dtype, device=allow_BQK.device)
    return mask.masked_fill_(~allow_BQK, torch.finfo(dtype).min)[:, None]


@dataclass
class Layout:
    """The texts of a batch.

    Attributes:
        documents_BT: 0 at padding, else a document's number within its row.
        blocks_BT, branches_BT: see `attention_mask`.
        positions_BT: of each token in its own text; sliding windows count these.
        plain: every row is one causal text padded on the right, which backends handle without a mask.
    """

    documents_BT: Tensor
    blocks_BT: Tensor
    branches_BT: Tensor
    positions_BT: Tensor
    plain: bool

    @cached_property
    def allow_BTT(self) -> Tensor:
        """Who sees whom, as a table of each row: T x T, so only where a backend takes nothing less."""
        return attention_mask(self.documents_BT, self.blocks_BT, self.branches_BT)

    @cached_property
    def places_N(self) -> Tensor:
        """Flat places in [B*T] of what is no padding."""
        return self.documents_BT.flatten().nonzero()[:, 0]

    def flat(self, grid_BT: Tensor) -> Tensor:
        """What is no padding of a grid, [N]."""
        return grid_BT.flatten(0, 1)[self.places_N]

    @cached_property
    def starts(self) -> list[int]:
        """Where each text begins among the N tokens, and N.

        Raises:
            ValueError: a document's tokens do not lie one after another.
        """
        rows_N = self.places_N // self.documents_BT.shape[1]
        texts_N = rows_N * (int(self.documents_BT.max()) + 1) + self.flat(self.documents_BT)
        numbers, lengths = torch.unique_consecutive(texts_N, return_counts=True)
        if len(numbers.unique()) != len(numbers):
            raise ValueError("a document's tokens do not lie one after another in its row")
        return [0, *lengths.cumsum(0).tolist()]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(np.diff(self.starts).max())

    @cached_property
    def causal_texts(self) -> list[bool]:
        """Which texts are plain causal ones: every token sees all before it, and itself."""
        blocks_N, positions_N = self.flat(self.blocks_BT), self.flat(self.positions_BT)
        plain_N = (blocks_N == positions_N + 1) & (self.flat(self.branches_BT) == 0)
        return np.logical_and.reduceat(plain_N.cpu().numpy(), self.starts[:-1]).tolist()

    @cached_property
    def packed(self) -> bool:
        """Whether a row holds several texts."""
        return not self.plain and int(self.documents_BT.max()) > 1

    @property
    def causal(self) -> bool:
        """Whether every text is a plain causal one."""
        return self.plain or all(self.causal_texts)

    def text_mask(self, dtype: torch.dtype, window: int = 0) -> TextMask:
        """The mask of all texts one after another, [1, 1, N, N], which `attend` works off text by text.

        Args:
            window: of the past that a token sees, itself included; 0 for all.
        """
        parts = [self.flat(grid) for grid in (self.blocks_BT, self.branches_BT, self.positions_BT)]
        texts: list[Text] = []
        places = zip(self.causal_texts, self.starts, self.starts[1:], strict=False)
        for causal, start, end in places if parts[0].device.type == "cpu" else ():
            length = end - start
            if causal and not 0 < window < length:
                texts.append(causal_text(start, length, dtype))
            else:
                blocks, branches, positions = (part[start:end] for part in parts)
                texts.append(_any_text(start, blocks, branches, positions, window, dtype))

        def dense() -> Tensor:
            lengths = torch.tensor(np.diff(self.starts), device=parts[0].device)
            numbers_N = torch.arange(1, len(lengths) + 1, device=lengths.device).repeat_interleave(lengths)
            allow = attention_mask(numbers_N[None], parts[0][None], parts[1][None])
            if window:
                allow &= near(parts[2][None], parts[2][None], window)
            return additive_mask(allow, dtype)

        causal_window = window if self.causal else None
        return TextMask(texts, self.starts, causal_window, dense, dtype, parts[0].device)

    def block_mask(self, window: int = 0) -> Any:
        """The same as `allow_BTT` for FlexAttention: a BlockMask [B, 1, T, T]."""
        from torch.nn.attention.flex_attention import create_block_mask

        documents_BT, blocks_BT, branches_BT = self.documents_BT, self.blocks_BT, self.branches_BT
        positions_BT = self.positions_BT

        def sees(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
            branch = branches_BT[b, k]
            mine = (documents_BT[b, q] == documents_BT[b, k]) & (documents_BT[b, k] > 0)
            mine = mine & (blocks_BT[b, k] <= blocks_BT[b, q])
            mine = mine & ((branch == 0) | (branch == branches_BT[b, q]))
            if window:
                mine = mine & (positions_BT[b, q] - positions_BT[b, k] < window)
            return mine | (q == k)

        rows, length = documents_BT.shape
        device = documents_BT.device
        return create_block_mask(sees, rows, None, length, length, device=device.type)


def _any_text(
    start: int, blocks_L: Tensor, branches_L: Tensor, positions_L: Tensor, window: int, dtype: torch.dtype
) -> Text:
    """A text in pieces, each with the keys that any of its queries sees, and what is hidden among them."""
    length, pieces = len(blocks_L), []
    for first, last in cuts(length, dtype):
        rows = slice(first, last)
        key_branch = branches_L[None]
        seen_QL = (blocks_L[None] <= blocks_L[rows, None]) & (
            (key_branch == 0) | (key_branch == branches_L[rows, None])
        )
        if window:
            seen_QL &= near(positions_L[None, rows], positions_L[None], window)[0]
        keys = _extent(seen_QL.any(0))
        hidden_QK = ~seen_QL[:, keys]
        at = _extent(hidden_QK.any(0))
        shifted = slice(start + keys.start, start + keys.stop)
        hidden = hidden_QK[:, at].contiguous() if at.stop else None
        pieces.append(Piece(slice(start + first, start + last), shifted, hidden, at))
    return Text(slice(start, start + length), pieces)


def _extent(there_K: Tensor) -> slice:
    """From the first True to the last."""
    places = there_K.nonzero()[:, 0].tolist()
    return slice(places[0], places[-1] + 1) if places else slice(0, 0)
