"""The picture of a confusion matrix: rows normalised, classes by name, the IoU of each beside its row.

Knows matplotlib, names and numbers; knows nothing about models or files of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlm_adapt.errors import UserError
from vlm_adapt.metrics.segment import Confusion
from vlm_adapt.report.plots import BLUE, GREY
from vlm_adapt.report.words import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 40  # classes; more could not be read
CELL = 0.34  # inches a side, and for a picture of many classes less
NUMBERS = 24  # classes up to which every cell says its number
LETTERS = 24  # of a name
SOFT, DARK = "#5b6475", "#1b2130"


def confusion_picture(
    counts_CC: np.ndarray,
    labels: Sequence[str],
    output: Path | None = None,
    title: str = "",
    marked: Sequence[str] = (),
) -> Figure:
    """Where the pixels of each class went.

    Args:
        counts_CC: pixels by true class (rows) and predicted class (columns).
        labels: a name for each.
        output: where to save it (.png, .svg, .pdf); None only returns the figure.
        marked: labels that are set apart by a star (those not seen in training).

    Raises:
        UserError: there is not one class with pixels.
    """
    order = _order(counts_CC)
    if not order:
        raise UserError("there is no confusion to draw: not one pixel was counted")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure

    shown_CC = counts_CC[np.ix_(order, order)]
    names = [_name(labels[place], labels[place] in marked) for place in order]
    pixels_C = counts_CC.sum(1)[order]
    # Shares of all the row's pixels: what went to classes that are not shown is missing from its sum.
    shares_CC = shown_CC / np.maximum(pixels_C, 1)[:, None]
    whole = Confusion(0, counts_CC)
    iou_C = whole.iou_C[order]
    size = CELL if len(order) <= NUMBERS else CELL * 0.7
    side = max(1.4, size * len(order))
    longest = max(len(name) for name in names)
    margins = (0.6 + 0.07 * longest, 0.45 + (0.06 if len(order) > 4 else 0.05) * longest)
    bars = 1.5
    figure = Figure(figsize=(margins[0] + side + bars + 0.3, margins[1] + side + 0.65), dpi=200)
    FigureCanvasAgg(figure)  # not pyplot: no global state, no window
    width, height = figure.get_size_inches()
    low = margins[1] / height
    axes = figure.add_axes((margins[0] / width, low, side / width, side / height))
    beside = figure.add_axes(((margins[0] + side + 0.12) / width, low, bars / width, side / height))
    blues = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#dfe8fb", "#8fb0f0", BLUE, "#14317d"])
    axes.imshow(shares_CC, cmap=blues, norm=PowerNorm(0.75, 0, 1), aspect="auto", interpolation="nearest")
    places = range(len(order))
    letter = 7 if len(order) <= NUMBERS else 5.5
    axes.set_xticks(places, names, fontsize=letter, color=DARK, parse_math=False)
    for tick in axes.get_xticklabels():
        tick.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, names, fontsize=letter, color=DARK, parse_math=False)
    axes.set_xticks(np.arange(len(order) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(order) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e6e8ee", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("predicted", fontsize=8, color=SOFT)
    axes.set_ylabel("true", fontsize=8, color=SOFT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if len(order) <= NUMBERS:
        for row in places:
            for column in places:
                share = shares_CC[row, column]
                if share >= 0.005:
                    color = "white" if share > 0.45 else DARK
                    text = f"{100 * share:.0f}"
                    axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=color)
    colors = [BLUE if labels[place] not in marked else "#b4540a" for place in order]
    beside.barh(places, 100 * iou_C, height=0.62, color=colors)
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    for row, (value, pixels) in enumerate(zip(iou_C, pixels_C, strict=True)):
        words = f"{100 * value:.1f}" if pixels else "no true pixel"
        color = DARK if pixels else SOFT
        beside.text(100 * value + 3, row, words, va="center", fontsize=letter, color=color, bbox=clear)
    beside.axvline(100 * whole.miou(), color=GREY, linewidth=0.9, linestyle=(0, (3, 2)), zorder=0)
    beside.set_ylim(*axes.get_ylim())
    beside.set_xlim(0, 130)
    beside.set_xticks([0, 50, 100], ["0", "50", "100"], fontsize=6.5, color=SOFT)
    beside.set_yticks([])
    beside.set_xlabel("IoU, %", fontsize=8, color=SOFT)
    beside.tick_params(length=0)
    beside.spines[["top", "right", "bottom"]].set_visible(False)
    beside.spines["left"].set_color(GREY)
    head = title or "Where the pixels of each class went"
    figure.text(0.12 / width, 1 - 0.2 / height, head, fontsize=9.5, weight="bold", color=DARK, va="center",
                parse_math=False)  # fmt: skip
    figure.text(0.12 / width, 1 - 0.42 / height, _caption(whole, order, marked), fontsize=7, color=SOFT,
                va="center")  # fmt: skip
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, bbox_inches="tight", pad_inches=0.12)
    return figure


def _order(counts_CC: np.ndarray) -> list[int]:
    """Classes that occur, true or predicted, in their order; of too many, those with the most pixels."""
    there = np.flatnonzero(counts_CC.sum(0) + counts_CC.sum(1))
    if len(there) > SHOWN:
        there = np.sort(there[np.argsort(-counts_CC.sum(1)[there], kind="stable")[:SHOWN]])
    return there.tolist()


def _name(label: str, marked: bool) -> str:
    shown = label.split("|")[0]
    shown = shown if len(shown) <= LETTERS else shown[: LETTERS - 1] + "…"
    return f"{shown} *" if marked else shown


def _caption(whole: Confusion, order: list[int], marked: Sequence[str]) -> str:
    scores = f"mIoU {100 * whole.miou():.1f} %, pixel accuracy {100 * whole.pixel_accuracy():.1f} %"
    words = ["rows sum to 100 %", f"{number(float(whole.counts_CC.sum()))} pixels", scores]
    classes = int(np.count_nonzero(~np.isnan(whole.iou_C)))
    if classes > len(order):
        words[0] = f"shares of each row's pixels, %; the {len(order)} most frequent of {classes} classes"
    if marked:
        words.append("* not seen in training")
    return "  ·  ".join(words)
