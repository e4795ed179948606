"""Figures with matplotlib, for READMEs and papers: the loss curve and bars of a metric by kind.

matplotlib is imported when a figure is asked for, and draws without a screen. The HTML report draws its own
charts (charts.py), which follow the reader's light or dark theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_adapt.errors import UserError
from vlm_adapt.report.series import pick, smooth, spans_decades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREY, FAINT = "#2456c7", "#9aa3b2", "#a9bdec"


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, no window
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#e6e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Figure, output: Path | None) -> Figure:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    return figure


def loss_curve(steps: Sequence[Mapping[str, Any]], output: Path | None = None) -> Figure:
    """The training loss over steps: raw faint, smoothed on top, a dashed line where a stage begins.

    Args:
        steps: lines of a journal with `step`, `loss` and, optionally, `stage`.
        output: where to save it (.png, .svg, .pdf); None only returns the figure.

    Raises:
        UserError: no line has a finite loss.
    """
    points = pick(steps, "loss")
    if not points:
        raise UserError("there is no loss to draw: no line of the journal has a finite `loss`")
    figure, axes = _axes(7, 3.4)
    axes.plot(*zip(*points, strict=True), color=FAINT, linewidth=0.9, label="each step")
    axes.plot(*zip(*smooth(points), strict=True), color=BLUE, linewidth=1.8, label="smoothed")
    if spans_decades([y for _, y in points]):
        axes.set_yscale("log")
    before = None
    for line in steps:
        if line.get("stage") != before and line.get("stage") is not None:
            if before is not None:
                axes.axvline(line["step"], color=GREY, linestyle="--", linewidth=1)
            axes.annotate(
                str(line["stage"]), (line["step"], 1), xycoords=("data", "axes fraction"),
                xytext=(4, -10), textcoords="offset points", fontsize=8, color="#5b6475", parse_math=False,
            )  # fmt: skip
        before = line.get("stage", before)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, output)


def metric_bars(metrics: Mapping[str, Any], output: Path | None = None) -> Figure:
    """Accuracy overall and by kind, the blind score beside each.

    Args:
        metrics: `accuracy`, `accuracy_by_kind` and, optionally, `blind` with the same two; 0 to 1.
        output: as for `loss_curve`.

    Raises:
        UserError: there is no accuracy in the metrics.
    """
    rows = accuracy_rows(metrics)
    if not rows:
        raise UserError("there are no bars to draw: the metrics hold no `accuracy`")
    figure, axes = _axes(7, 0.9 + 0.55 * len(rows))
    has_blind = any(blind is not None for _, _, blind in rows)
    for place, (_, seen, blind) in enumerate(rows):
        for value, offset, color in ((seen, -0.19, BLUE), (blind, 0.19, GREY)):
            if value is not None:
                offset = offset if has_blind else 0
                axes.barh(place + offset, 100 * value, height=0.36, color=color)
                axes.text(100 * value + 1, place + offset, f"{100 * value:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name, _, _ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("accuracy, %" + (" (grey: with another sample's image)" if has_blind else ""))
    return _save(figure, output)


def accuracy_rows(metrics: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    """(name, score, blind score) of the whole and of each kind, as far as they are there."""

    def part(whole: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        value = whole.get(name)
        return value if isinstance(value, Mapping) else {}

    blind = part(metrics, "blind")
    by_kind, blind_by_kind = part(metrics, "accuracy_by_kind"), part(blind, "accuracy_by_kind")
    rows = [("all", metrics.get("accuracy"), blind.get("accuracy"))]
    rows += [
        (str(k), by_kind.get(k), blind_by_kind.get(k)) for k in dict.fromkeys([*by_kind, *blind_by_kind])
    ]
    return [row for row in rows if isinstance(row[1], int | float) or isinstance(row[2], int | float)]
