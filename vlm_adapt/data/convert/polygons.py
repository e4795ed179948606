"""COCO's segmentations, polygons and run lengths, drawn as masks (Lin et al. 2014, arXiv:1405.0312).

Knows their rules; knows nothing about files, samples or labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vlm_adapt.data.masks import check_size
from vlm_adapt.data.problems import BadSample

_FINE = 5  # COCO draws outlines on a grid five times as fine as the pixels


def _points(polygon: Any, height: int, width: int) -> np.ndarray:
    """A polygon [x0, y0, x1, y1, ...] as float points_N2. Raises BadSample."""
    try:
        points_N2 = np.asarray(polygon, np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise BadSample("polygon is not a list of x, y") from error
    if len(points_N2) < 3:
        raise BadSample("polygon has fewer than 3 points")
    size = np.array([width, height])
    if not ((points_N2 >= -size) & (points_N2 <= 2 * size)).all():  # not-a-number fails, too
        raise BadSample("polygon lies far outside its image")
    return points_N2


def _fill(points_N2: np.ndarray, mask_WH: np.ndarray) -> None:
    """Set the pixels inside one polygon; `mask_WH` is turned, as COCO counts down columns."""
    width, height = mask_WH.shape
    start_N2 = np.trunc(_FINE * points_N2 + 0.5).astype(np.int64)
    end_N2 = np.roll(start_N2, -1, 0)
    # Each edge is drawn a fine step at a time along its longer axis, always in the same direction, so
    # that two neighbours draw their common edge alike.
    span_N2 = np.abs(end_N2 - start_N2)
    flat_N = span_N2[:, 0] >= span_N2[:, 1]
    axis_N = np.where(flat_N, 0, 1)
    rows_N = np.arange(len(points_N2))
    steps_N = span_N2[rows_N, axis_N]
    backward_N = start_N2[rows_N, axis_N] > end_N2[rows_N, axis_N]
    low_N2 = np.where(backward_N[:, None], end_N2, start_N2)
    high_N2 = np.where(backward_N[:, None], start_N2, end_N2)
    slope_N = (high_N2 - low_N2)[rows_N, 1 - axis_N] / np.maximum(steps_N, 1)
    edge_M = np.repeat(rows_N, steps_N + 1)
    step_M = np.arange(len(edge_M)) - np.repeat(np.cumsum(steps_N + 1) - steps_N - 1, steps_N + 1)
    step_M = np.where(backward_N[edge_M], steps_N[edge_M] - step_M, step_M)
    axis_M = axis_N[edge_M]
    path_M2 = np.empty((len(edge_M), 2), np.int64)
    every = np.arange(len(edge_M))
    path_M2[every, axis_M] = low_N2[edge_M, axis_M] + step_M
    across_M = low_N2[edge_M, 1 - axis_M] + slope_N[edge_M] * step_M + 0.5
    path_M2[every, 1 - axis_M] = np.trunc(across_M).astype(np.int64)
    # Where the outline crosses the middle of a pixel column, inside and outside change places from
    # that height on.
    lower_M2 = np.minimum(path_M2[1:], path_M2[:-1])
    middle = _FINE // 2
    crosses_M = (path_M2[1:, 0] != path_M2[:-1, 0]) & (lower_M2[:, 0] % _FINE == middle)
    columns = (lower_M2[crosses_M, 0] - middle) // _FINE
    rows = np.clip(-((middle - lower_M2[crosses_M, 1]) // _FINE), 0, height)
    inside = (columns >= 0) & (columns < width)
    columns, rows = columns[inside], rows[inside]
    if not columns.size:
        return
    first, last = int(columns.min()), int(columns.max()) + 1
    changes = np.bincount((columns - first) * height + rows, minlength=(last - first) * height + 1)[:-1]
    inside_WH = np.bitwise_xor.accumulate(changes.astype(np.uint8) & 1).reshape(last - first, height)
    mask_WH[first:last] |= inside_WH.astype(bool)


def draw_polygons(polygons: Iterable[Any], height: int, width: int) -> np.ndarray:
    """The union of polygons, by the rule of COCO's own tool (Lin et al. 2014, arXiv:1405.0312).

    The rule: outlines are drawn on a grid five times as fine as the pixels, and a pixel belongs to the
    object by the parity of the outline's crossings of its column's middle. Equal to pycocotools to the
    pixel on real annotations. It differs in two refusals: polygons of two points (there a box) and
    points more than an image's size outside it.

    Args:
        polygons: each [x0, y0, x1, y1, ...] in pixels.

    Returns:
        mask_HW, bool.

    Raises:
        BadSample: fewer than 3 points, no numbers, far outside.
    """
    mask_WH = np.zeros((width, height), bool)
    for polygon in polygons:
        _fill(_points(polygon, height, width), mask_WH)
    return mask_WH.T


def _unpack_counts(text: str) -> list[int]:
    """COCO's compressed run lengths: five bits a letter, lowest first, a sixth says that more follow;
    from the fourth on each is the difference to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise BadSample("run lengths are not in COCO's code", f"letter {letter!r}")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # the sign
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise BadSample("run lengths are cut off")
    return counts


def decode_runs(runs: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """COCO's run lengths, a list or packed into a text, exactly.

    Args:
        runs: {"size": [height, width], "counts": ...}, running down columns, outside first.

    Returns:
        mask_HW, bool.

    Raises:
        BadSample: of another size than the image, or not filling it.
    """
    try:
        tall, wide = (int(value) for value in runs["size"])
        counts = runs["counts"]
        counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
        counts = _unpack_counts(counts) if isinstance(counts, str) else [int(count) for count in counts]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample("run lengths without size and counts", f"{type(error).__name__}: {error}") from error
    check_size((wide, tall), (width, height))
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise BadSample(
            "run lengths do not fill their image", f"{sum(counts):,} of {height * width:,} pixels"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def draw(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation, polygons or run lengths, as mask_HW. Raises BadSample, also if it is empty."""
    if isinstance(segmentation, Mapping):
        mask_HW = decode_runs(segmentation, height, width)
    elif isinstance(segmentation, list) and segmentation:
        if isinstance(segmentation[0], Mapping):  # RefClef
            mask_HW = np.any([decode_runs(runs, height, width) for runs in segmentation], 0)
        else:
            mask_HW = draw_polygons(segmentation, height, width)
    else:
        raise BadSample("object without a segmentation")
    if not mask_HW.any():
        raise BadSample("mask has no pixels")
    return mask_HW


def check_shape(segmentation: Any, height: int, width: int) -> None:
    """`draw`'s refusals without its cost: polygons that are large for their outline are not drawn."""
    if not isinstance(segmentation, list) or not segmentation or isinstance(segmentation[0], Mapping):
        draw(segmentation, height, width)
        return
    sure = False
    for polygon in segmentation:
        points_N2 = _points(polygon, height, width)
        inside = ((points_N2 >= 0) & (points_N2 <= [width, height])).all()
        next_N2 = np.roll(points_N2, -1, 0)
        area = abs((points_N2[:, 0] * next_N2[:, 1] - points_N2[:, 1] * next_N2[:, 0]).sum()) / 2
        # A disc of radius area / outline fits into a simple polygon; of radius 2, it covers pixels.
        sure |= bool(inside and area >= 2 * np.hypot(*(next_N2 - points_N2).T).sum())
    if not sure:
        draw(segmentation, height, width)
