"""A page of samples of a segmentation: image, truth and prediction side by side, one legend for all.

Knows pixels, masks and names; knows nothing about where predictions come from.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw

from vlm_adapt.data.write import clear_errors
from vlm_adapt.report.colours import colours
from vlm_adapt.report.regions import FAINT, INK, PAPER, Entry, fit_mask, font, legend, shortened, veiled

CELL, GAP, LETTERS = 400, 10, 14  # pixels
TITLES = ("image", "truth", "prediction")
HATCHED = ((200, 200, 200), (232, 232, 232))  # what the truth leaves open
COVER = 0.78  # opacity of a mask: its colours are read without the photograph, which still shows through


class SampleRow(NamedTuple):
    """One line of the page.

    Args:
        pixels_HWC: uint8. truth_HW: places in the labels; any other value is left open.
        predicted_HW: likewise, of the same size. key: written above it.
    """

    pixels_HWC: np.ndarray
    truth_HW: np.ndarray
    predicted_HW: np.ndarray
    key: str = ""


def write_samples(path: str | Path, rows: Sequence[SampleRow], labels: Sequence[str]) -> None:
    """Write the page as a PNG, whole or not at all.

    Args:
        rows: SampleRow, or (image, truth, prediction) and perhaps a key.
        labels: names by value, of truth and prediction alike.

    Raises:
        UserError: it cannot be written.
    """
    write_png(Path(path), samples_page([SampleRow(*row) for row in rows], labels))


def samples_page(rows: Sequence[SampleRow], labels: Sequence[str]) -> PILImage.Image:
    """The page; labels that neither truth nor prediction has anywhere are not in its legend."""
    palette = colours(labels)
    pixels = np.zeros(len(labels), np.int64)
    lines = [_line(row, palette, pixels) for row in rows]
    # The legend is that of all pixels of truth and prediction together; shares would say nothing here.
    order = [int(place) for place in np.argsort(-pixels, kind="stable") if pixels[place]]
    listed = [Entry(labels[place], "", palette[place]) for place in order]
    if any(_open(row.truth_HW, len(labels)).any() for row in rows):
        listed.append(Entry("not labelled", "", HATCHED[0]))
    width = 3 * CELL + 4 * GAP
    key = legend(listed, width, LETTERS) if listed else PILImage.new("RGB", (width, GAP), PAPER)
    head = round(2.2 * LETTERS)
    page = PILImage.new("RGB", (width, head + sum(line.height for line in lines) + key.height), PAPER)
    draw = ImageDraw.Draw(page)
    for place, title in enumerate(TITLES):
        left = GAP + place * (CELL + GAP)
        draw.text((left, head / 2 + 2), title, font=font(LETTERS, True), fill=INK, anchor="lm")
    top = head
    for line in lines:
        page.paste(line, (0, top))
        top += line.height
    page.paste(key, (0, top))
    return page


def _line(row: SampleRow, palette: Sequence[tuple[int, int, int]], pixels: np.ndarray) -> PILImage.Image:
    height, width = row.truth_HW.shape
    shown = (CELL, max(1, min(3 * CELL, round(CELL * height / width))))
    image = PILImage.fromarray(row.pixels_HWC).resize(shown, PILImage.Resampling.LANCZOS)
    small = np.asarray(image)
    cells = [image]
    for mask_HW in (row.truth_HW, row.predicted_HW):
        counts = np.bincount(mask_HW[~_open(mask_HW, len(palette))].ravel(), minlength=len(palette))
        pixels += counts
        fitted_HW = fit_mask(mask_HW, shown)
        open_HW = _open(fitted_HW, len(palette))
        fitted_HW = np.where(open_HW, len(palette), fitted_HW)
        painted = veiled(small, fitted_HW, palette, COVER)
        down, across = np.indices(open_HW.shape)
        hatch_HWC = np.array(HATCHED, np.uint8)[(down + across) // 4 % 2]
        painted[open_HW] = hatch_HWC[open_HW]
        cells.append(PILImage.fromarray(painted))
    above = round(1.3 * LETTERS) if row.key else 0
    line = PILImage.new("RGB", (3 * CELL + 4 * GAP, shown[1] + GAP + above), PAPER)
    if row.key:
        face = font(LETTERS - 3)
        name = shortened(row.key, 3 * CELL, face)
        ImageDraw.Draw(line).text((GAP, above / 2 - 1), name, font=face, fill=FAINT, anchor="lm")
    for place, cell in enumerate(cells):
        line.paste(cell, (GAP + place * (CELL + GAP), above))
    return line


def _open(mask_HW: np.ndarray, labels: int) -> np.ndarray:
    """Pixels without one of the labels: -1, 255 and whatever else says so."""
    return (mask_HW < 0) | (mask_HW >= labels)


def write_png(path: Path, picture: PILImage.Image) -> None:
    """Write a picture under another name first, then rename it. Raises UserError."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=4)
    write_file(path, buffer.getvalue())


def write_file(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all. Raises UserError: no space, or no permission."""
    part = path.with_name(f".{path.name}.part")
    with clear_errors(path):
        try:
            part.write_bytes(data)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
