"""Texts that lie one after another, cut into pieces, and the mask that keeps them apart.

Knows places of tokens and who is hidden from whom; knows nothing about models or kernels.

    N tokens of all texts
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# Queries of one product. Large ones compute more that causality hides, small ones are slow products:
# the best of 64, 128, 256 and 512 for texts of 64 to 2048 tokens (docs/log.md).
QUERIES_AT_ONCE = {torch.bfloat16: 256}
QUERIES_AT_ONCE_ELSE = 128


class Piece(NamedTuple):
    """Some queries of a text, and the keys that any of them sees.

    Attributes:
        rows, keys: places among all tokens.
        hidden: True where a query does not see a key: columns `hidden_at` of the keys; None for nowhere.
    """

    rows: slice
    keys: slice
    hidden: Tensor | None = None
    hidden_at: slice = slice(0, 0)


class Text(NamedTuple):
    """A text's place among all tokens, and the pieces that its queries are cut into, in order."""

    place: slice
    pieces: list[Piece]


def cuts(length: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Where a text is cut: as few pieces as may be, of one size but for the last."""
    most = QUERIES_AT_ONCE.get(dtype, QUERIES_AT_ONCE_ELSE)
    step = -(-length // -(-length // most))
    for start in range(0, length, step):
        yield start, min(length, start + step)


def causal_text(start: int, length: int, dtype: torch.dtype) -> Text:
    """A text in which every token sees itself and what is before it."""
    pieces = []
    for first, last in cuts(length, dtype):
        corner = slice(first, last)  # earlier keys are seen by all of these queries
        rows, keys = slice(start + first, start + last), slice(start, start + last)
        pieces.append(Piece(rows, keys, _corner(last - first), corner))
    return Text(slice(start, start + length), pieces)


@lru_cache(maxsize=1024)
def _corner(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu_(1)


class TextMask(Tensor):
    """An additive mask [1, 1, N, N] that is not there until somebody reads it.

    `attend` takes its texts instead. To everything else it is an ordinary tensor: any operation, a copy
    or a slice included, computes the whole mask and goes on with that, so no text is seen by another
    whatever a model does with its mask.

    Attributes:
        texts: every text in pieces; empty where a kernel needs no pieces.
        starts: where each text begins, and N.
        window: of the past that each token of causal texts sees, 0 for all; None when not all are causal.
        dense: computes the mask itself.
    """

    texts: Sequence[Text]
    starts: Sequence[int]
    window: int | None
    dense: Callable[[], Tensor]
    _starts_S: Tensor | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        texts: Sequence[Text],
        starts: Sequence[int],
        window: int | None,
        dense: Callable[[], Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> TextMask:
        size = (1, 1, starts[-1], starts[-1])
        made = Tensor._make_wrapper_subclass(cls, size, dtype=dtype, device=device)  # type: ignore[attr-defined]
        made.texts, made.starts, made.window, made.dense = texts, starts, window, dense
        return made

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(end - start for start, end in zip(self.starts, self.starts[1:], strict=False))

    @property
    def starts_S(self) -> Tensor:
        """`starts` on the mask's device, copied once."""
        if self._starts_S is None:
            self._starts_S = torch.tensor(self.starts, dtype=torch.int32, device=self.device)
        return self._starts_S

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, lambda mask: mask.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TextMask({len(self.starts) - 1} texts, {self.starts[-1]} tokens)"
