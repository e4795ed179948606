"""How much each source gives to an epoch. Knows sizes and weights; knows nothing about order or files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlm_adapt.data.lanes import Source


def mixed(
    sources: Sequence[Source],
    mixing: str = "size",
    epoch_ends: str = "last",
    epoch_samples: int | None = None,
) -> list[Source]:
    """Sources with the number of samples that each of them gives to an epoch.

    Args:
        sources: their weights say how often each sample comes (`mixing` "size"), or which share of
            the epoch the source has ("weight").
        epoch_ends: with "weight", when the "first" source, or the "last", has been seen whole.
        epoch_samples: as many in all, in the same shares (largest remainders).
    """
    sizes = [sum(source.counts) for source in sources]
    parts = [
        source.weight * (size if mixing == "size" else float(size > 0))
        for source, size in zip(sources, sizes, strict=True)
    ]
    if (mixing == "size" and epoch_samples is None) or not sum(parts):
        return list(sources)
    shares = [part / sum(parts) for part in parts]
    if epoch_samples is None:
        needed = [size / share for size, share in zip(sizes, shares, strict=True) if share]
        epoch_samples = round(min(needed) if epoch_ends == "first" else max(needed))
    exact = [share * epoch_samples for share in shares]
    given = [int(value) for value in exact]
    by_rest = sorted(range(len(exact)), key=lambda number: (given[number] - exact[number], number))
    for number in by_rest[: epoch_samples - sum(given)]:
        given[number] += 1
    return [replace(source, samples=samples) for source, samples in zip(sources, given, strict=True)]
