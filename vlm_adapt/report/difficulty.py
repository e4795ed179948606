"""A picture of scores: how they spread, and the easiest and hardest samples.

Knows samples and numbers; knows nothing about how the numbers came about.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt.data.images import decode
from vlm_adapt.data.phrase import questions_of
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.reader import Reader
from vlm_adapt.errors import UserError
from vlm_adapt.report.plots import BLUE

SHOWN = 6  # samples of each end
SIDE = 256  # pixels
LETTERS, LINES = 27, 5  # of the words under an image
NAMES = {"el2n": "EL2N", "grand": "last-layer gradient norm", "loss": "loss"}


def draw(reader: Reader, values: np.ndarray, by: str, output: Path) -> None:
    """Save a histogram of the scores over a row of the easiest and a row of the hardest samples.

    Args:
        values: a score of each sample of the reader; NaN where there is none.
        by: which score it is.
        output: .png, .svg or .pdf.

    Raises:
        UserError: there is no score to draw, or the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        raise UserError("there is no score to draw")
    order = known[np.argsort(values[known], kind="stable")]
    count = min(SHOWN, max(1, len(order) // 2))
    figure = Figure(figsize=(11, 8.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: no global state, no window
    parts: Any = figure.subfigures(3, 1, height_ratios=[1.0, 1.25, 1.25])
    top, *rows = parts
    _histogram(top, values[known], by)
    for part, title, numbers in zip(
        rows, ("easiest", "hardest"), (order[:count], order[::-1][:count]), strict=True
    ):
        part.suptitle(f"The {title}", x=0.01, ha="left", fontsize=10, fontweight="bold")
        for axes, number in zip(part.subplots(1, SHOWN, squeeze=False)[0], _padded(numbers), strict=True):
            axes.axis("off")
            if number is not None:
                _example(axes, reader, number, float(values[number]))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output)
    except OSError as error:
        raise UserError(f"the picture cannot be written to '{output}': {error.strerror}") from error


def _padded(numbers: np.ndarray) -> list[int | None]:
    return [*map(int, numbers), *[None] * (SHOWN - len(numbers))]


def _histogram(part: Any, values: np.ndarray, by: str) -> None:
    axes = part.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.hist(values, bins=int(np.clip(len(values) // 8, 10, 60)), color=BLUE)
    axes.margins(y=0.15)  # room for the words at the quantiles
    for share in (0.1, 0.5, 0.9):
        place = float(np.quantile(values, share))
        axes.axvline(place, color="#5b6475", linestyle="--", linewidth=1)
        axes.annotate(
            f"{share:.0%}", (place, 1), xycoords=("data", "axes fraction"),
            xytext=(3, -9), textcoords="offset points", fontsize=8, color="#5b6475",
        )  # fmt: skip
    axes.set_xlabel(f"{NAMES.get(by, by)}, mean over learned tokens")
    axes.set_ylabel("samples")
    axes.set_title(f"{len(values):,} samples", loc="left", fontsize=10, fontweight="bold")


def _example(axes: Any, reader: Reader, number: int, value: float) -> None:
    from PIL import Image

    words = [f"{value:.3f}  {reader.key(number)}"]
    try:
        sample, phrasing = reader.sample(number)
        words += _words(sample.record, phrasing.prompt)
        if sample.images:
            image = Image.fromarray(decode(sample.images[0], reader.max_pixels))
            image.thumbnail((SIDE, SIDE))
            axes.imshow(np.asarray(image))
    except BadSample as error:  # it had a score, so its shard changed meanwhile
        words.append(str(error))
    lines = [line for text in words for line in textwrap.wrap(text, LETTERS)]
    shown = lines[:LINES] + (["..."] if len(lines) > LINES else [])
    shown += [""] * (LINES + 1 - len(shown))  # as many for all, so that they stand in a row
    axes.set_anchor("N")
    axes.set_title("\n".join(shown), fontsize=7, loc="left", parse_math=False)


def _words(record: dict[str, Any], prompt: str) -> list[str]:
    """What is learned of a sample: its captions, or questions with their answers."""
    if "messages" in record:
        return [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
    if "caption" in record or "captions" in record:
        return list(questions_of(record, prompt)[0].answers)
    if "question" in record or "questions" in record:
        return [f"{one.text} {one.answer}" for one in questions_of(record, prompt)]
    return []
