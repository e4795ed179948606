"""The section of curves: loss, held-out metrics, learning rates, gradient norm, speed, memory, waiting.

Knows which values a journal holds; charts.py draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from vlm_adapt.report.charts import Line, line_chart
from vlm_adapt.report.read import RunRecord
from vlm_adapt.report.scores import groups, score_text
from vlm_adapt.report.series import Points, pick, smooth
from vlm_adapt.report.words import number

CURVES_AT_MOST = 8
RESUMES_NAMED = 3
COUNTS = (
    *("samples", "samples_available", "samples_in_shards", "questions"),
    *("read", "used", "truncated", "pixels"),
)
GIB = 2**30


def _raw_and_smooth(points: Points, marks: Sequence[tuple[float, str]]) -> list[Line]:
    """The points, and their course smoothed within each stage: stages may minimise other things."""
    edges = [-math.inf, *(start for start, _ in marks[1:]), math.inf]
    smoothed: Points = []
    for low, high in pairwise(edges):
        smoothed += smooth([point for point in points if low <= point[0] < high])
    return [Line("each step", points, faint=True), Line("smoothed", smoothed)]


def _seconds(value: float) -> str:
    return f"{number(value)} s"


def _is_step(event: Mapping[str, Any]) -> bool:
    return isinstance(event.get("step"), int)


def curves(record: RunRecord) -> str:
    """The section's HTML; empty for a run without a journal."""
    steps = record.steps
    marks: list[tuple[float, str]] = []
    for line in steps:
        stage = line.get("stage")
        if stage is not None and (not marks or str(stage) != marks[-1][1]):
            marks.append((float(line["step"]), str(stage)))
    marks = marks if len(marks) > 1 else []
    resumed = [float(e["step"]) for e in record.events if e.get("event") == "resume" and _is_step(e)]
    # Between the last step before and the first after; a label for each would be too much for many.
    breaks = [(step + 0.5, "resumed" if len(resumed) <= RESUMES_NAMED else "") for step in resumed]
    rates: dict[str, None] = {}
    for line in steps:
        rate = line.get("learning_rate")
        rates |= dict.fromkeys(rate) if isinstance(rate, Mapping) else {}
    rate_lines = [
        Line(str(part), pick(steps, "learning_rate", part), place % 4 + 1) for place, part in enumerate(rates)
    ] or [Line("all", pick(steps, "learning_rate"))]
    memory = [(step, value / GIB) for step, value in pick(steps, "memory")]
    speed, wait = pick(steps, "tokens_per_second"), pick(steps, "data_wait")
    charts, stopped = _evaluations(record)
    body = "".join(
        [
            line_chart(
                "Training loss",
                _raw_and_smooth(pick(steps, "loss"), marks),
                [*marks, *breaks],
                wide=True,
                may_be_log=True,
            ),
            *charts,
            line_chart("Learning rate", rate_lines, from_zero=True),
            line_chart("Gradient norm", _raw_and_smooth(pick(steps, "grad_norm"), marks), may_be_log=True),
            line_chart("Tokens a second", _raw_and_smooth(speed, marks), from_zero=True),
            line_chart("Memory, GiB", [Line("memory", memory)], from_zero=True),
            line_chart(
                "Waiting for data, a step",
                _raw_and_smooth(wait, marks),
                breaks,
                text=_seconds,
                from_zero=True,
            ),
        ]
    )
    if not body:
        return ""
    more = f'<p class="lead">{escape(stopped)}</p>' if stopped else ""
    return f'<section id="curves"><h2>Training</h2><div class="charts">{body}</div>{more}</section>'


def _evaluations(record: RunRecord) -> tuple[list[str], str]:
    """A chart of every metric that several evaluations during the run gave, the blind score with it; and a
    sentence on those beyond the number that is shown."""
    held = [e for e in record.events if e.get("event") == "evaluate" and isinstance(e.get("step"), int)]
    if len({event["step"] for event in held}) < 2:
        return [], ""  # one evaluation is a table, not a curve
    names: dict[tuple[str, ...], None] = {}
    for event in held:
        for group, values in groups(event.get("metrics")).items():
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool) and name not in COUNTS:
                    names[(group, name) if group else (name,)] = None
    charts = []
    for keys in list(names)[:CURVES_AT_MOST]:
        lines = [
            Line("with its image", pick(held, "metrics", *keys), dots=True),
            Line("blind", pick(held, "metrics", *keys[:-1], "blind", keys[-1]), color=0, dots=True),
        ]
        shown = [line for line in lines if line.points]
        charts.append(line_chart(f"Held out: {' '.join(keys)}", shown, text=_written_as(keys[-1])))
    left = [" ".join(keys) for keys in list(names)[CURVES_AT_MOST:]]
    return charts, f"Not drawn, for room: {', '.join(left)}." if left else ""


def _written_as(name: str) -> Callable[[float], str]:
    return lambda value: score_text(name, value)
