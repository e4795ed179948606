"""How well masks that were asked for agree with those that were meant: gIoU and cIoU.

The two figures of referring and reasoning segmentation (LISA: Lai et al. 2023, arXiv 2308.00692, section 4):

    gIoU    mean over masks of intersection / union; two empty masks agree, 1
    cIoU    sum of all intersections / sum of all unions

The i-th mask of an answer is compared with the i-th that is meant. One that was not drawn counts as empty,
one too many is compared with nothing. Pure functions in numpy; knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

IGNORED = 255


def overlap(drawn_HW: np.ndarray | None, meant_HW: np.ndarray | None) -> tuple[int, int]:
    """(intersection, union) in pixels.

    Args:
        drawn_HW: bool; None was not drawn.
        meant_HW: 1 inside, 0 outside, 255 where nothing is known and nothing counts; None is not meant.
    """
    if drawn_HW is None and meant_HW is None:
        return 0, 0
    if meant_HW is None:
        assert drawn_HW is not None
        return 0, int(np.count_nonzero(drawn_HW))
    inside = meant_HW == 1
    if drawn_HW is None:
        return 0, int(inside.sum())
    shown = drawn_HW & (meant_HW != IGNORED)
    return int((shown & inside).sum()), int((shown | inside).sum())


def overlaps(drawn: Sequence[np.ndarray | None], meant: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """(intersection, union) of an answer's masks with those that are meant, and of those too many."""
    count = max(len(drawn), len(meant))
    pairs = zip(
        [*drawn, *[None] * (count - len(drawn))], [*meant, *[None] * (count - len(meant))], strict=True
    )
    return [overlap(one, other) for one, other in pairs]


def mask_metrics(pairs: Sequence[tuple[int, int]], missing: int = 0, extra: int = 0) -> dict[str, Any]:
    """gIoU and cIoU of all masks; nothing without any.

    Args:
        missing, extra: masks that were meant and not drawn, and drawn and not meant; told beside.
    """
    if not pairs:
        return {}
    each = [both / union if union else 1.0 for both, union in pairs]
    union = sum(union for _, union in pairs)
    return {
        "gIoU": float(np.mean(each)),
        "cIoU": sum(both for both, _ in pairs) / union if union else 1.0,
        "masks": len(pairs),
        "masks_missing": missing,
        "masks_extra": extra,
    }
