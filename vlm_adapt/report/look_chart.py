"""The picture of a Look: sizes of images, tokens of texts and images, useful share of batches.

Knows matplotlib and a Look; knows nothing about runs or shards.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt.errors import UserError
from vlm_adapt.report.look import Look

BLUE, ORANGE, GREY, INK, SOFT = "#0072b2", "#d55e00", "#b5b5b5", "#1b1b1b", "#767676"
LAYOUT: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
}


def draw_look(
    found: Look, output: str | os.PathLike[str], tower: tuple[int, int] | None, most: int, batching: str
) -> Path:
    """Four panels in one file.

    Args:
        output: .png, .pdf or .svg.
        tower: (height, width) that images get; None where each keeps its own.
        most: tokens a text may have.
        batching: the run's own way, which is drawn in colour.

    Raises:
        UserError: nothing to draw, or the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if not found.samples:
        raise UserError("there is nothing to draw: every sample that was looked at is refused")
    with rc_context(LAYOUT):
        room = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09, wspace=0.04, hspace=0.04)
        figure = Figure(figsize=(7.0, 5.2), layout=room)
        axes = figure.subplots(2, 2)
        _sizes(axes[0, 0], found.sizes, tower)
        _text(axes[0, 1], found, most)
        _images(axes[1, 0], found.images)
        _shares(axes[1, 1], found.useful, batching)
        path = Path(output)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=200)
        except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
            raise UserError(f"cannot write {path}: {error}") from error
    return path


def _sizes(axes: Any, sizes: Sequence[tuple[int, int]], tower: tuple[int, int] | None) -> None:
    axes.set(title=f"Image files ({len(sizes):,})", xlabel="width in pixels", ylabel="height in pixels")
    if not sizes:
        return
    counts = Counter(sizes)
    widths, heights = zip(*counts, strict=True)
    area = [8 + 60 * (times / max(counts.values())) ** 0.5 for times in counts.values()]
    axes.scatter(widths, heights, s=area, color=BLUE, alpha=0.45, linewidths=0)
    axes.set_xlim(0, 1.12 * max(*widths, tower[1] if tower else 0))
    axes.set_ylim(0, 1.12 * max(*heights, tower[0] if tower else 0))
    if tower is None:
        return
    axes.plot(tower[1], tower[0], marker="s", markersize=5, color=ORANGE, linestyle="none")
    name = f"tower {tower[1]} × {tower[0]}"
    right = tower[1] > 0.6 * max(widths)  # then there is no room beside it
    place, side = ((-6, -9), "right") if right else ((6, 4), "left")
    axes.annotate(
        name, (tower[1], tower[0]), place, textcoords="offset points", color=ORANGE, horizontalalignment=side
    )


def _text(axes: Any, found: Look, most: int) -> None:
    from matplotlib.ticker import MaxNLocator

    values = np.array(found.text)
    step = max(1, -(-int(np.ptp(values) + 1) // 40))  # whole tokens, so that no bin is fuller by chance
    edges = np.arange(values.min(), values.max() + step + 1, step) - 0.5
    axes.hist(values, bins=edges, color=BLUE, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.set(title="Text tokens", xlabel="tokens of a text, images aside", ylabel="texts")
    marks = (("median", float(np.median(values))), ("p95", float(np.percentile(values, 95))))
    top = axes.get_ylim()[1]
    axes.set_ylim(0, 1.18 * top)
    for level, (name, value) in zip((1.12, 1.03), marks, strict=True):
        axes.plot([value, value], [0, 1.02 * top], color=INK, linewidth=0.7, linestyle=(0, (3, 3)))
        axes.annotate(f"{name} {value:.0f}", (value, level * top), (3, 0), textcoords="offset points")
    room = most - max(found.images)
    if room <= 1.3 * edges[-1]:
        axes.axvline(room, color=ORANGE, linewidth=0.9)
        axes.annotate("max_length", (room, 0.6 * top), (3, 0), textcoords="offset points", color=ORANGE)


def _images(axes: Any, values: Sequence[int]) -> None:
    counts = Counter(values)
    axes.set(title="Image tokens", ylabel="texts")
    if len(counts) <= 12:
        names = sorted(counts)
        bars = axes.bar(
            [str(name) for name in names], [counts[name] for name in names], color=BLUE, width=0.5
        )
        axes.bar_label(bars, labels=[f"{counts[name]:,}" for name in names], padding=2, color=INK)
        axes.set_xlim(-0.5 - (len(names) < 4), len(names) - 0.5 + (len(names) < 4))
        axes.margins(y=0.15)
    else:
        axes.hist(values, bins=40, color=BLUE, linewidth=0)
    axes.set_xlabel("image tokens of a text")


def _shares(axes: Any, useful: dict[str, float], batching: str) -> None:
    names = list(useful)
    bars = axes.barh(
        names, [100 * useful[name] for name in names], height=0.55,
        color=[BLUE if name == batching else GREY for name in names],
    )  # fmt: skip
    axes.bar_label(bars, labels=[f"{100 * useful[name]:.1f} %" for name in names], padding=3, color=INK)
    axes.set(title="Useful positions of a batch", xlabel="per cent that is no padding", xlim=(0, 115))
    axes.set_xticks(range(0, 101, 20))
    axes.spines["bottom"].set_bounds(0, 100)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == batching else "normal")
