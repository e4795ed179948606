"""The table and the plot of scripts/bench/adaptation.py, from the files that it wrote.

Knows the results' files; knows nothing about training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

BEGIN, END = "<!-- written by scripts/bench/adaptation.py -->", "<!-- until here -->"
SIDES = {
    "vision": "#1b8a5a",
    "language": "#2456c7",
    "both": "#8a4fb8",
    "none": "#6b7280",
}


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
        sides = {str(line["where"]) for line in PLANS[name]}
        side = "both" if len(sides) > 1 else next(iter(sides), "none")
        result = Result(name, side)
        for kind in ("counts", "costs"):  # from shapes alone, and measured
            file = output / f"{kind}-{name}.json"
            if file.is_file():
                result.costs |= json.loads(file.read_text())
        for path in sorted(output.glob(f"{name}-[0-9].json")):
            result.runs.append(json.loads(path.read_text()))
        if result.costs or result.runs:
            found.append(result)
    return found


def tables(results: list[Result]) -> str:
    """A Markdown table for each family, under its name."""
    from plans import FAMILIES

    parts = []
    for family, plans in FAMILIES.items():
        here = [one for one in results if one.name in plans]
        if here:
            parts.append(f"### {family[0].upper()}{family[1:]}\n\n{table(here)}")
    return "\n\n".join(parts)


def into_page(results: list[Result], page: Path) -> None:
    """Put the tables where a page has them, between its two marks, and draw the plot beside it."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}")
    write_plot(results, page.parent / "adaptation.png")


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
            _bytes(costs["saved_activations"]) if "saved_activations" in costs else "",
            _bytes(costs["peak_memory"]) if "peak_memory" in costs else "",
            f"{costs['cpu_seconds_a_step']:.2f}" if "cpu_seconds_a_step" in costs else "",
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
    """A line for each method, by family, the best first: accuracy of each seed, bytes stored, bytes kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _lines(results)
    if not lines:
        return
    bottom = min(at for at, _, _ in lines)
    figure = Figure(figsize=(10, 0.8 - 0.185 * bottom), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, stored, kept = figure.subplots(1, 3, sharey=True, width_ratios=(5, 3, 3))
    for axes, title in (
        (accuracy, "colour and shape questions answered, %\n(dot: mean; small: each seed)"),
        (stored, "bytes stored\nbeside the base"),
        (kept, "bytes kept for\nthe backward pass"),
    ):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color="#e6e8ee", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8, length=0)
        axes.set_ylim(bottom - 1, 1.2)
    accuracy.set_xlim(0, 100)
    for axes, ticks in ((stored, (1e4, 1e5, 1e6, 1e7, 1e8)), (kept, (3e7, 1e8, 3e8))):
        axes.set_xscale("log")
        axes.set_xticks(ticks, [_bytes(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
    for at, family, one in lines:
        if one is None:
            accuracy.text(0, at, family, fontsize=8.5, fontweight="bold", va="center")
            continue
        colour, score = SIDES[one.side], one.accuracy
        if score is not None:
            each = [100 * run["accuracy"] for run in one.runs]
            accuracy.plot([min(each), max(each)], [at, at], color=colour, linewidth=1, alpha=0.6)
            accuracy.scatter(each, [at] * len(each), s=6, color=colour, alpha=0.6, linewidth=0)
            accuracy.scatter(score, at, s=34, color=colour, linewidth=0)
        if one.costs.get("stored"):
            stored.scatter(one.costs["stored"], at, s=34, color=colour, linewidth=0)
        if one.costs.get("saved_activations"):
            kept.scatter(one.costs["saved_activations"], at, s=34, color=colour, linewidth=0)
    named = [(at, one.name) for at, _, one in lines if one is not None]
    accuracy.set_yticks([at for at, _ in named], [name for _, name in named])
    for side, colour in SIDES.items():
        if any(one is not None and one.side == side for _, _, one in lines):
            kept.scatter([], [], s=34, color=colour, linewidth=0, label=side)
    kept.legend(frameon=False, title="side", fontsize=8, title_fontsize=8, loc="lower right")
    figure.savefig(path)


def _lines(results: list[Result]) -> list[tuple[float, str, Result | None]]:
    """(height, family, method or None for the family's own line), from the top down."""
    from plans import FAMILIES

    lines: list[tuple[float, str, Result | None]] = []
    at = 0.0
    for family, plans in FAMILIES.items():
        here = [one for one in results if one.name in plans]
        if here:
            lines.append((at, family, None))
            at -= 1
        for one in sorted(here, key=lambda one: -(one.accuracy or 0)):
            lines.append((at, family, one))
            at -= 1
        at -= 0.4 if here else 0
    return lines
