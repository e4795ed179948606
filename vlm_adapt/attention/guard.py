"""That a model hands on what keeps texts apart. Knows calls of attention; knows nothing about masks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_handed: ContextVar[list[bool] | None] = ContextVar("handed", default=None)


@contextmanager
def texts_must_arrive() -> Iterator[None]:
    """Within, every attention layer must be handed what keeps texts apart.

    Raises:
        RuntimeError: the model dropped it, so that texts would have seen each other.
    """
    handed: list[bool] = []
    token = _handed.set(handed)
    try:
        yield
    finally:
        _handed.reset(token)
    if not handed:
        raise RuntimeError("no attention layer was handed a mask: this model cannot read several texts a row")


def arrived(there: bool) -> None:
    """Called by attention: whether it was handed what keeps texts apart."""
    handed = _handed.get()
    if handed is None:
        return
    if not there:
        raise RuntimeError(
            "the model dropped the mask that keeps texts apart: it cannot read several texts a row"
        )
    handed.append(True)
