"""The picture of a segmentation: the image under coloured regions with thin borders, and a legend beside it.

Knows pixels, masks, names and shares; knows nothing about models or files. The legend lies outside of the
image: nothing is covered, and it is read on any photograph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter, ImageFont

from vlm_adapt.report.colours import Colour

SMALLEST, LARGEST = 640, 2048  # points of the long side of a picture
INK, FAINT, PAPER = (32, 33, 36), (110, 114, 120), (255, 255, 255)
INSIDE, OUTSIDE = (0, 114, 178), (213, 94, 0)  # of points: Okabe and Ito's blue and vermilion
BORDER = 0.85  # how much of a border's white covers the image
LEAST = 0.0005  # of the image: labels with less are counted, not listed


class Entry(NamedTuple):
    """A line of a legend: what is written, what stands right of it, and the colour before it."""

    name: str
    note: str
    colour: Colour


def share_text(share: float) -> str:
    """37 %, 4.2 %, 0.3 %, <0.1 %."""
    if 0 < share < 0.001:
        return "<0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 or not share else f"{100 * share:.1f} %"


def entries(shares: Sequence[float], names: Sequence[str], palette: Sequence[Colour]) -> list[Entry]:
    """The legend of one image, the largest first; a last line, of no colour, counts those too small."""
    order = sorted(range(len(names)), key=lambda place: -shares[place])
    shown = [place for place in order if shares[place] >= LEAST]
    found = [Entry(names[place], share_text(shares[place]), palette[place]) for place in shown]
    small = sum(0 < share < LEAST for share in shares)
    return [*found, Entry(f"and {small} smaller", "", PAPER)] if small else found


def picture_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) at which an image is shown: small ones larger, very large ones smaller."""
    side = max(width, height)
    factor = max(1.0, SMALLEST / side) if side <= LARGEST else LARGEST / side
    return max(1, round(width * factor)), max(1, round(height * factor))


def fit_mask(mask_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another (width, height): the value that lies there, never one in between."""
    rows = np.minimum((np.arange(size[1]) + 0.5) * mask_HW.shape[0] / size[1], mask_HW.shape[0] - 1)
    columns = np.minimum((np.arange(size[0]) + 0.5) * mask_HW.shape[1] / size[0], mask_HW.shape[1] - 1)
    return mask_HW[rows.astype(int)][:, columns.astype(int)]


def veiled(
    pixels_HWC: np.ndarray, mask_HW: np.ndarray, palette: Sequence[Colour], opacity: float = 0.55
) -> np.ndarray:
    """pixels_HWC uint8 under the colours of a mask of the same size; values outside the palette stay bare.

    Args:
        opacity: of the colours, 0 to 1.
    """
    table = np.zeros((len(palette) + 1, 3), np.uint16)
    table[:-1] = palette or np.zeros((0, 3))
    much = round(256 * opacity)
    bare_HW = mask_HW >= len(palette)
    colour_HWC = table[np.where(bare_HW, len(palette), mask_HW)]
    mixed_HWC = ((pixels_HWC.astype(np.uint16) * (256 - much) + colour_HWC * much) >> 8).astype(np.uint8)
    if bare_HW.any():
        mixed_HWC[bare_HW] = pixels_HWC[bare_HW]
    alpha_HW = borders(mask_HW)
    lit = (mixed_HWC + (255.0 - mixed_HWC) * (BORDER * alpha_HW)[..., None]).round()
    return lit.astype(np.uint8)


def borders(mask_HW: np.ndarray) -> np.ndarray:
    """How much of a pixel a border covers, 0 to 1: lines with soft edges, a thousandth of the image wide."""
    edge_HW = np.zeros(mask_HW.shape, np.float32)
    edge_HW[:, 1:] = mask_HW[:, 1:] != mask_HW[:, :-1]
    edge_HW[1:] = np.maximum(edge_HW[1:], mask_HW[1:] != mask_HW[:-1])
    thick = max(1.0, max(mask_HW.shape) / 1000)
    image = PILImage.fromarray((edge_HW * 255).astype(np.uint8))
    soft = image.filter(ImageFilter.GaussianBlur(0.5 * thick))
    return np.clip(np.asarray(soft, np.float32) / 255 * 1.3 * thick, 0, 1)


@cache
def font(size: int, bold: bool = False) -> Any:
    """matplotlib's own font, which knows far more letters than PIL's."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    try:
        return ImageFont.truetype(str(path), size)
    except OSError:
        return ImageFont.load_default(size)


def shortened(text: str, width: float, face: Any) -> str:
    """The text, or as much of its beginning as fits, with an ellipsis."""
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def legend(lines: Sequence[Entry], width: int, size: int) -> PILImage.Image:
    """A legend of a given width in columns as wide as its longest line, read down and then across.

    Args:
        size: of the letters, in pixels.
    """
    face = font(size)
    pad, box, line = round(0.8 * size), round(0.95 * size), round(1.65 * size)
    inner = max(size, width - 2 * pad)
    wide = [face.getlength(one.name) + face.getlength(one.note) for one in lines] or [0]
    column = min(inner, max(6 * size, math.ceil(max(wide)) + box + round(2.2 * size)))
    columns = min(max(1, len(lines)), max(1, (inner + size) // (column + size)))
    rows = math.ceil(len(lines) / columns)
    picture = PILImage.new("RGB", (width, 2 * pad + rows * line - (line - box) // 2), PAPER)
    draw = ImageDraw.Draw(picture)
    for place, one in enumerate(lines):
        left, top = pad + (place // rows) * (column + size), pad + (place % rows) * line
        bare = one.colour == PAPER
        if not bare:
            draw.rounded_rectangle((left, top, left + box, top + box), box // 5, fill=one.colour)
        start = left + (0 if bare else box + round(0.5 * size))
        note = face.getlength(one.note)
        name = shortened(one.name, left + column - start - note - 0.6 * size, face)
        middle = top + box / 2
        draw.text((start, middle), name, font=face, fill=FAINT if bare else INK, anchor="lm")
        draw.text((start + face.getlength(name + "  "), middle), one.note, font=face, fill=FAINT, anchor="lm")
    return picture


def overlay(
    pixels_HWC: np.ndarray,
    mask_HW: np.ndarray,
    names: Sequence[str],
    palette: Sequence[Colour],
    shares: Sequence[float] | None,
    opacity: float = 0.55,
    points: Sequence[tuple[float, float, int]] = (),
    boxes: Sequence[tuple[float, float, float, float]] = (),
) -> PILImage.Image:
    """An image under its regions, with its legend below, or beside it where it is taller than wide.

    Args:
        pixels_HWC: uint8. mask_HW: places in `names`; any other value stays bare.
        shares: of the image, a label each; None for no legend.
        points, boxes: what was asked, in pixels of the image; drawn as dots (+ inside, - outside) and frames.
    """
    height, width = mask_HW.shape
    shown = picture_size(width, height)
    image = PILImage.fromarray(pixels_HWC)
    if shown != image.size:
        image = image.resize(shown, PILImage.Resampling.LANCZOS)
    regions = PILImage.fromarray(veiled(np.asarray(image), fit_mask(mask_HW, shown), palette, opacity))
    mark(regions, shown[0] / width, points, boxes)
    return regions if shares is None else beside(regions, entries(shares, names, palette))


def mark(
    picture: PILImage.Image,
    factor: float,
    points: Sequence[tuple[float, float, int]],
    boxes: Sequence[tuple[float, float, float, float]],
) -> None:
    """Draw prompts into a picture that is `factor` times as large as the image they are places of."""
    draw, thick = ImageDraw.Draw(picture), max(2, round(max(picture.size) / 400))
    for box in boxes:
        corners = [value * factor for value in box]
        draw.rectangle(corners, outline=INK, width=thick + 2)
        draw.rectangle([corners[0] + 1, corners[1] + 1, corners[2] - 1, corners[3] - 1], None, PAPER, thick)
    radius = 3.2 * thick
    for x, y, inside in points:
        x, y = x * factor, y * factor
        dot = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(dot, fill=INSIDE if inside else OUTSIDE, outline=PAPER, width=max(1, thick // 2))
        arm = 0.5 * radius
        draw.line((x - arm, y, x + arm, y), PAPER, max(1, thick // 2))
        if inside:
            draw.line((x, y - arm, x, y + arm), PAPER, max(1, thick // 2))


def beside(image: PILImage.Image, lines: Sequence[Entry]) -> PILImage.Image:
    """A picture with a legend below it, or on its right where it is taller than wide."""
    size = max(11, round(max(image.size) / 52))
    if not lines:
        return image
    if image.height > 1.15 * image.width:
        face = font(size)
        wide = max(face.getlength(one.name) + face.getlength(one.note) for one in lines)
        width = round(max(8 * size, min(wide + 4.6 * size, 0.8 * image.width)))
        key = legend(lines, width, size)
        if key.height <= image.height:
            page = PILImage.new("RGB", (image.width + width, image.height), PAPER)
            page.paste(image, (0, 0))
            page.paste(key, (image.width, 0))
            return page
    width = max(image.width, 12 * size)
    key = legend(lines, width, size)
    page = PILImage.new("RGB", (width, image.height + key.height), PAPER)
    page.paste(image, ((width - image.width) // 2, 0))
    page.paste(key, (0, image.height))
    return page
