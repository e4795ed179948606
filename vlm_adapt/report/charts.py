"""Line charts and bars as HTML: inline SVG for the lines, HTML for every word.

The SVG is stretched to the width of its column while words keep their size, so a chart is legible on a phone;
colours are CSS variables, so it follows the light or dark theme. Knows nothing about runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import accumulate
from typing import Any, NamedTuple

from vlm_adapt.report.series import Points, spans_decades, thin, ticks
from vlm_adapt.report.words import number, share

UNITS = 1000  # the SVG's inner width and height
BANDS = 7  # colours of their own
SHARES_AT_MOST = 300  # steps that are drawn


class Line(NamedTuple):
    """A curve. `faint` draws it thin and pale, `dots` as dots joined by a line."""

    name: str
    points: Points
    color: int = 1
    faint: bool = False
    dots: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    marks: Sequence[tuple[float, str]] = (),
    wide: bool = False,
    text: Callable[[float], str] = number,
    may_be_log: bool = False,
    from_zero: bool = False,
) -> str:
    """A figure with axes, legend (when there are several lines) and values under the pointer.

    Args:
        marks: (x, label) of vertical lines.
        text: how values are written on the axis.
        may_be_log: use a logarithmic axis where the values span decades.
        from_zero: the axis includes 0.

    Returns:
        HTML, or an empty string if no line has a point.
    """
    lines = [line._replace(points=thin(line.points)) for line in lines if line.points]
    if not lines:
        return ""
    values = [y for line in lines for _, y in line.points]
    log = may_be_log and spans_decades(values)
    low, high = min(values), max(values)
    if log:
        low, high = low / 1.1, high * 1.1
    else:
        low = min(low, 0.0) if from_zero else low
        edge = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        low, high = (low if from_zero and low == 0 else low - edge), high + edge
    left = min(x for line in lines for x, _ in line.points)
    right = max(x for line in lines for x, _ in line.points)
    right = right if right > left else left + 1

    def across(x: float) -> float:
        return (x - left) / (right - left)

    def down(y: float) -> float:
        return 1 - (math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low))

    drawn = [
        f'<path class="mark" d="M{UNITS * across(x):.1f} 0V{UNITS}"/>' for x, _ in marks if left < x <= right
    ]
    for line in lines:
        path = "L".join(f"{UNITS * across(x):.1f} {UNITS * down(y):.1f}" for x, y in line.points)
        drawn.append(f'<path class="line c{line.color}{" faint" if line.faint else ""}" d="M{path}"/>')
        if line.dots or len(line.points) == 1:
            dots = "".join(f"M{UNITS * across(x):.1f} {UNITS * down(y):.1f}h.01" for x, y in line.points)
            drawn.append(f'<path class="dot c{line.color}" d="{dots}"/>')
    solid = [line for line in lines if not line.faint] or lines
    values_under_pointer = [
        {
            "name": line.name,
            "points": [[x, round(across(x), 4), round(down(y), 4), text(y)] for x, y in line.points],
        }
        for line in solid
    ]
    y_ticks = [(down(y), text(y)) for y in ticks(low, high, 5, log)]
    keys = [(line.name, line.color, line.faint) for line in lines]
    note = "log scale" if log else ""
    span = (left, right)
    return _figure(title, note, keys, drawn, y_ticks, span, marks, values_under_pointer, wide)


def share_chart(title: str, names: Sequence[str], rows: Sequence[tuple[float, Sequence[float]]]) -> str:
    """Shares of a whole over the steps, one band above the other, the first at the bottom.

    Args:
        names: of the bands.
        rows: (step, the share of each, 0 to 1), by step.

    Returns:
        HTML, or an empty string without rows.
    """
    if not rows:
        return ""
    rows = [*rows[: -1 : math.ceil(len(rows) / SHARES_AT_MOST)], rows[-1]]
    if len(rows) == 1:
        rows = [*rows, (rows[0][0] + 1, rows[0][1])]  # a band has a width
    left, right = rows[0][0], rows[-1][0]
    ends = [list(accumulate(shares)) for _, shares in rows]
    places = [UNITS * (x - left) / (right - left) for x, _ in rows]
    drawn = []
    for band in reversed(range(len(names))):  # a higher band reaches down to the axis, behind the lower ones
        tops = "L".join(f"{x:.1f} {UNITS * (1 - end[band]):.1f}" for x, end in zip(places, ends, strict=True))
        drawn.append(
            f'<path class="band c{_band_color(band)}" d="M0 {UNITS}L{tops}L{places[-1]:.1f} {UNITS}Z"/>'
        )
    values_under_pointer = [
        {
            "name": name,
            "points": [
                [x, round(place / UNITS, 4), round(1 - end[band], 4), share(shares[band])]
                for (x, shares), place, end in zip(rows, places, ends, strict=True)
            ],
        }
        for band, name in reversed(list(enumerate(names)))
    ]
    y_ticks = [(1 - y, f"{100 * y:.0f} %") for y in (0, 0.25, 0.5, 0.75, 1)]
    keys = [(name, _band_color(band), False) for band, name in enumerate(names)]
    return _figure(title, "", keys, drawn, y_ticks, (left, right), (), values_under_pointer, False)


def _band_color(band: int) -> int:
    """Colours 1 to 7, and grey for all after them."""
    return band + 1 if band < BANDS else 0


def _figure(
    title: str,
    note: str,
    keys: Sequence[tuple[str, int, bool]],
    drawn: Sequence[str],
    y_ticks: Sequence[tuple[float, str]],
    span: tuple[float, float],
    marks: Sequence[tuple[float, str]],
    values: Sequence[dict[str, Any]],
    wide: bool,
) -> str:
    """The frame around what is drawn: title, legend, grid, axes and the values for the pointer.

    Args:
        keys: (name, colour, faint) of the legend, which is left out where there is one alone.
        y_ticks: (how far down, 0 to 1, label).
        span: the steps at the left and right edge.
        values: for the script: {"name", "points": [[step, across, down, text], ...]}.
    """
    left, right = span

    def across(x: float) -> float:
        return (x - left) / (right - left)

    grid = "".join(f'<path class="grid" d="M0 {UNITS * down:.1f}H{UNITS}"/>' for down, _ in y_ticks)
    y_labels = "".join(f'<span style="top:{100 * down:.2f}%">{escape(text)}</span>' for down, text in y_ticks)
    columns = [x for x in ticks(left, right, 6 if wide else 4) if float(x).is_integer()] or [left]
    x_labels = "".join(
        f'<span style="left:{100 * across(x):.2f}%">{escape(number(x))}</span>' for x in columns
    )
    names = "".join(
        f'<span class="mark-name" style="left:{100 * across(x):.2f}%">{escape(label)}</span>'
        for x, label in marks
        if label and left <= x <= right
    )
    legend = ""
    if len(keys) > 1:
        shown = (
            f'<span class="key c{color}{" faint" if faint else ""}">{escape(name)}</span>'
            for name, color, faint in keys
        )
        legend = f'<span class="legend">{"".join(shown)}</span>'
    return (
        f'<figure class="chart{" wide" if wide else ""}" data-lines="{escape(json.dumps(list(values)))}">'
        f"<figcaption>{escape(title)}{f' <small>{note}</small>' if note else ''}{legend}</figcaption>"
        f'<div class="plot"><div class="y">{y_labels}</div><div class="area">'
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}">'
        f"{grid}{''.join(drawn)}</svg>{names}<div class='cursor' hidden></div></div>"
        f'<div class="x">{x_labels}</div></div></figure>'
    )


def bars(title: str, rows: Sequence[tuple[str, float | None, float | None]], counts: dict[str, int]) -> str:
    """Scores from 0 to 1 as horizontal bars, the blind score under each; empty without rows."""
    if not rows:
        return ""
    blind_too = any(blind is not None for _, _, blind in rows)
    body = []
    for name, seen, blind in rows:
        cells = []
        for value, kind in ((seen, "seen"), (blind, "blind")):
            if value is not None:
                width = 100 * min(1.0, max(0.0, value))
                cells.append(
                    f'<div class="track {kind}"><i style="width:{width:.2f}%"></i><b>{share(value)}</b></div>'
                )
        samples = f"<small>{counts[name]:,} samples</small>" if name in counts else ""
        gain = ""
        if seen is not None and blind is not None:
            gain = f'<span class="gain">{100 * (seen - blind):+.1f} points</span>'
        label = f'<div class="label">{escape(name)} {samples}</div>'
        body.append(f'<div class="bar">{label}<div>{"".join(cells)}</div>{gain}</div>')
    legend = (
        '<span class="legend"><span class="key c1">with its image</span>'
        '<span class="key c0">blind: with another sample\'s image</span></span>'
    )
    return (
        f'<figure class="bars"><figcaption>{escape(title)}{legend if blind_too else ""}</figcaption>'
        f"{''.join(body)}</figure>"
    )
