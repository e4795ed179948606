"""The table and the plot of scripts/bench/adaptation.py, from the files that it wrote.

Knows the results' files; knows nothing about training.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

SIDES = {"vision": "#1b8a5a", "language": "#2456c7", "both": "#8a4fb8", "none": "#6b7280"}


@dataclass
class Result:
    """One method: its costs, and the scores of its seeds."""

    name: str
    side: str
    costs: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accuracy(self) -> float | None:
        """Mean over the seeds, in percent."""
        return 100 * mean(run["accuracy"] for run in self.runs) if self.runs else None


def read_results(output: Path, names: list[str]) -> list[Result]:
    """What there is, in the order of `names`."""
    from plans import PLANS

    found = []
    for name in names:
        sides = {str(line["where"]) for line in PLANS[name]} - {"connector"}
        side = "both" if len(sides) > 1 else next(iter(sides), "none")
        result = Result(name, side)
        file = output / f"costs-{name}.json"
        if file.is_file():
            result.costs = json.loads(file.read_text())
        for path in sorted(output.glob(f"{name}-[0-9].json")):
            result.runs.append(json.loads(path.read_text()))
        if result.costs or result.runs:
            found.append(result)
    return found


def table(results: list[Result]) -> str:
    """A Markdown table."""
    lines = [
        "| method | side | trained | of the model | stored | kept for backward | peak memory | CPU-s a step "
        "| colour and shape, % (each seed) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        costs, runs = one.costs, one.runs
        scores = ""
        if runs:
            each = ", ".join(f"{100 * run['accuracy']:.0f}" for run in runs)
            scores = f"{one.accuracy:.1f} ({each})"
        cells = [
            one.name,
            one.side,
            f"{costs['trained']:,}" if costs else "",
            f"{costs['share']:.3%}" if costs else "",
            _bytes(costs["stored"]) if costs else "",
            _bytes(costs["saved_activations"]) if costs else "",
            _bytes(costs["peak_memory"]) if costs else "",
            f"{costs['cpu_seconds_a_step']:.2f}" if costs else "",
            scores,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def write_plot(results: list[Result], path: Path) -> None:
    """Accuracy against what is stored; a dot's area is what is kept for the backward pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in results if one.costs and one.runs]
    if not shown:
        return
    figure = Figure(figsize=(10, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    most = max(one.costs["saved_activations"] for one in shown) or 1
    labels: list[tuple[float, float]] = []
    for one in sorted(shown, key=lambda one: -(one.accuracy or 0)):
        stored, score = max(one.costs["stored"], 1e3), one.accuracy
        area = 30 + 500 * one.costs["saved_activations"] / most
        axes.scatter(stored, score, s=area, color=SIDES[one.side], alpha=0.55, linewidth=0)
        low, high = (100 * f(run["accuracy"] for run in one.runs) for f in (min, max))
        axes.plot([stored, stored], [low, high], color=SIDES[one.side], linewidth=1)
        across, up = math.log10(stored) + 0.08, score
        while any(abs(across - x) < 1.0 and abs(up - y) < 2.6 for x, y in labels):
            up -= 0.4
        labels.append((across, up))
        axes.annotate(one.name, (10**across, up), fontsize=7, va="center")
    axes.set_xscale("log")
    axes.set_xlabel("bytes stored beside the base")
    axes.set_ylabel("colour and shape questions answered, %")
    for side, colour in SIDES.items():
        if any(one.side == side for one in shown):
            axes.scatter([], [], s=60, color=colour, alpha=0.55, linewidth=0, label=side)
    axes.legend(frameon=False, title="side (area: kept for backward)", fontsize=8, title_fontsize=8)
    figure.savefig(path)
