"""Connected regions of a mask, by runs of rows and numpy alone.

Knows pixels; knows nothing about labels, prompts or files. Two pixels are connected by their sides.
"""

from __future__ import annotations

import numpy as np


def components(inside_HW: np.ndarray) -> np.ndarray:
    """Number the connected regions of a mask.

    Args:
        inside_HW: true inside.

    Returns:
        numbers_HW int32: 0 outside, regions from 1 in the order of their first pixels.
    """
    inside_HW = np.ascontiguousarray(inside_HW, bool)
    height, width = inside_HW.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = inside_HW
    steps = np.diff(padded, axis=1)
    rows_R, starts_R = np.nonzero(steps == 1)
    ends_R = np.nonzero(steps == -1)[1]
    numbers_HW = np.zeros((height, width), np.int32)
    if not len(rows_R):
        return numbers_HW
    # Runs of the next row that touch a run lie together in the order of runs: from `first` to `last`.
    stride = width + 1
    below_R = (rows_R + 1) * stride
    first_R = np.searchsorted(rows_R * stride + ends_R, below_R + starts_R, side="right")
    last_R = np.searchsorted(rows_R * stride + starts_R, below_R + ends_R, side="left")
    counts_R = np.maximum(last_R - first_R, 0)
    upper_E = np.repeat(np.arange(len(rows_R)), counts_R)
    within_E = np.arange(len(upper_E)) - np.repeat(np.cumsum(counts_R) - counts_R, counts_R)
    lower_E = np.repeat(first_R, counts_R) + within_E
    roots_R = _joined(len(rows_R), upper_E, lower_E)
    regions_R = np.unique(roots_R, return_inverse=True)[1] + 1
    numbers_HW[inside_HW] = np.repeat(regions_R, ends_R - starts_R)
    return numbers_HW


def _joined(count: int, one_E: np.ndarray, other_E: np.ndarray) -> np.ndarray:
    """The smallest member of each member's set, when pairs are joined."""
    roots = np.arange(count)
    while True:
        first, second = roots[one_E], roots[other_E]
        if np.array_equal(first, second):
            return roots
        np.minimum.at(roots, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(roots[roots], roots):
            roots = roots[roots]
