"""Curves as lists of points: picked from journal lines, smoothed, thinned; and round axis ticks.

Knows nothing about how a curve is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Points = list[tuple[float, float]]


def pick(steps: Iterable[Mapping[str, Any]], *keys: str) -> Points:
    """(step, value) of every line whose value, found by following `keys`, is a finite number."""
    points = []
    for line in steps:
        value: Any = line
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            points.append((float(line["step"]), float(value)))
    return points


def smooth(points: Points, span: float | None = None) -> Points:
    """Average of the neighbours on both sides, weighted down exponentially over about `span` points (by
    default a 50th of all): two-sided, so that it does not lag behind a falling curve."""
    keep = math.exp(-1 / (span or max(1.0, len(points) / 50)))

    def before(values: list[float]) -> list[tuple[float, float]]:
        """Weighted sum and weight of each value with those before it."""
        total = weight = 0.0
        sums = []
        for value in values:
            total, weight = keep * total + value, keep * weight + 1
            sums.append((total, weight))
        return sums

    values = [y for _, y in points]
    sides = zip(points, before(values), reversed(before(values[::-1])), strict=True)
    return [(x, (a + b - y) / (v + w - 1)) for (x, y), (a, v), (b, w) in sides]


def thin(points: Points, most: int = 400) -> Points:
    """At most about `most` points: of each run of neighbours the lowest and the highest, so peaks stay."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    result: Points = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        result.extend(sorted(ends))
    return result


def spans_decades(values: Sequence[float], decades: float = 1.0) -> bool:
    """Whether a logarithmic axis serves: all positive, and the middle 96 % span at least so many decades."""
    ordered = sorted(values)
    if not ordered or ordered[0] <= 0:
        return False
    edge = len(ordered) // 50
    return math.log10(ordered[-1 - edge] / ordered[edge]) >= decades


def ticks(low: float, high: float, most: int = 5, log: bool = False) -> list[float]:
    """Round values within [low, high], at most about `most` of them."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for mantissas in ((1, 2, 5), (1, 3), (1,)):
            values = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
            if len(values) <= most + 1:
                break
        else:
            values = values[:: math.ceil(len(values) / most)]
        if len(values) >= 2:
            return values
    if high <= low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
