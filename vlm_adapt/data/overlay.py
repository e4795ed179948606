"""Masks, boxes and names drawn over an image.

Knows samples, masks and colours; knows nothing about sheets, models or tokens.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vlm_adapt.data.images import decode
from vlm_adapt.data.masks import check_size, ignored_value, read_mask
from vlm_adapt.data.sample import Sample

CELL, GAP, LINE = 220, 8, 15  # points
VEIL, EDGE = 0.45, 0.95  # how much of a mask's colour covers the image, inside and along its border
# Okabe and Ito's colours, which readers with any colour vision tell apart; then the hues between them.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442")
EXPRESSION = "\0"  # before the number of an expression, where classes have their name


class Palette:
    """A colour for every name, the same one each time it is asked for."""

    def __init__(self) -> None:
        self.names: dict[str, tuple[int, int, int]] = {}

    def __getitem__(self, name: str) -> tuple[int, int, int]:
        if name not in self.names:
            place = len(self.names)
            if place < len(COLOURS):
                text = COLOURS[place]
                self.names[name] = (int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16))
            else:  # the golden section keeps hues apart, however many come
                hue = place * 0.618034 % 1
                rgb = colorsys.hsv_to_rgb(hue, 0.55 + 0.3 * (place % 2), 0.95 - 0.25 * (place % 3))
                self.names[name] = (round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2]))
        return self.names[name]


@dataclass
class Pen:
    """Sizes of one sheet: everything is `scale` times as large as on a screen of one pixel a point."""

    scale: int = 1
    palette: Palette = field(default_factory=Palette)
    numbered: Palette = field(default_factory=Palette)  # of expressions, which differ in every sample

    def colour(self, name: str) -> tuple[int, int, int]:
        """Of a class, or of an expression by its number."""
        return (self.numbered if name.startswith(EXPRESSION) else self.palette)[name]

    def __post_init__(self) -> None:
        self.cell, self.gap, self.line = CELL * self.scale, GAP * self.scale, LINE * self.scale
        self.font = _font(11 * self.scale)
        self.small = _font(9 * self.scale)
        self.tiny = _font(7 * self.scale)


def _font(size: int) -> Any:
    """matplotlib's own font, which knows far more letters than PIL's."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    try:
        return ImageFont.truetype(str(path), size)
    except OSError:
        return ImageFont.load_default(size)


Legend = list[tuple[str, str]]  # (name of the colour, what is written)


def annotated(sample: Sample, side: tuple[int, int], pen: Pen) -> tuple[PILImage.Image, Legend]:
    """The first image of a sample within `side` (width, height), with its masks and boxes drawn over it.

    Raises:
        BadSample: an image or a mask that cannot be read, or masks of another size.
    """
    pixels_HWC = decode(sample.images[0])
    full = PILImage.fromarray(pixels_HWC)
    picture, legend = fitted(full, side), Legend()
    regions: list[tuple[str, np.ndarray]] = []
    if sample.mask is not None:
        found, names = _regions(sample, full.size, picture.size)
        regions, legend = regions + found, legend + names
    for number, entry in enumerate(sample.record.get("referring", [])):
        name = f"{EXPRESSION}{number}"
        legend.append((name, f"“{entry['expressions'][0]}”"))
        if entry.get("mask") in sample.masks:
            regions.append((name, _mask(sample.masks[entry["mask"]], full.size, picture.size) > 0))
    labels = list(dict.fromkeys(str(entry["label"]) for entry in sample.record.get("objects", [])))
    for entry in sample.record.get("objects", []):
        if entry.get("mask") in sample.masks:
            mask_HW = _mask(sample.masks[entry["mask"]], full.size, picture.size) > 0
            regions.append((str(entry["label"]), mask_HW))
    legend += [(label, label) for label in labels]
    picture = _veiled(picture, regions, pen)
    draw = ImageDraw.Draw(picture)
    across, down = picture.width / full.width, picture.height / full.height
    boxes = [(f"{EXPRESSION}{n}", e, "") for n, e in enumerate(sample.record.get("referring", []))]
    boxes += [(str(e["label"]), e, str(e["label"])) for e in sample.record.get("objects", [])]
    for name, entry, tag in boxes:
        if "box" in entry:
            x0, y0, x1, y1 = (v * (across, down)[i % 2] for i, v in enumerate(entry["box"]))
            draw.rectangle((x0, y0, x1, y1), outline=pen.colour(name), width=pen.scale)
            if tag:
                _tag(draw, (x0, y0), tag, pen.colour(name), pen)
    return picture, legend


def fitted(picture: PILImage.Image, side: tuple[int, int]) -> PILImage.Image:
    """As large as fits; tiny images by whole factors and without smoothing, to be seen as they are."""
    factor = min(side[0] / picture.width, side[1] / picture.height)
    if factor < 2:
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        return picture.resize(size, PILImage.Resampling.LANCZOS)
    whole = int(factor)
    return picture.resize((picture.width * whole, picture.height * whole), PILImage.Resampling.NEAREST)


def _mask(data: bytes, size: tuple[int, int], shown: tuple[int, int]) -> np.ndarray:
    mask_HW = read_mask(data)
    check_size((mask_HW.shape[1], mask_HW.shape[0]), size)
    rows = np.arange(shown[1]) * size[1] // shown[1]
    return mask_HW[rows][:, np.arange(shown[0]) * size[0] // shown[0]]


def _regions(
    sample: Sample, size: tuple[int, int], shown: tuple[int, int]
) -> tuple[list[tuple[str, np.ndarray]], Legend]:
    """The classes of the semantic mask, the largest first."""
    assert sample.mask is not None
    mask_HW = _mask(sample.mask, size, shown)
    labels = sample.record.get("labels", [])
    values, counts = np.unique(mask_HW[mask_HW != ignored_value(mask_HW)], return_counts=True)
    regions, legend = [], Legend()
    for at in np.argsort(-counts):
        value = int(values[at])
        name = (labels[value] if value < len(labels) else "") or f"value {value}"
        regions.append((name, mask_HW == value))
        share = counts[at] / mask_HW.size
        legend.append((name, f"{name} {share:.0%}" if share >= 0.005 else f"{name} <1%"))
    return regions, legend


def _veiled(picture: PILImage.Image, regions: Sequence[tuple[str, np.ndarray]], pen: Pen) -> PILImage.Image:
    """Regions coloured over the picture, their borders stronger."""
    pixels_HWC = np.asarray(picture).astype(np.float32)
    for name, inside in regions:
        edge = np.zeros_like(inside)
        for axis in (0, 1):
            for shift in (-1, 1):
                edge |= inside & ~np.roll(inside, shift, axis)
        for where, much in ((inside & ~edge, VEIL), (edge, EDGE)):
            pixels_HWC[where] += (np.array(pen.colour(name), np.float32) - pixels_HWC[where]) * much
    return PILImage.fromarray(pixels_HWC.round().astype(np.uint8))


def _tag(draw: Any, place: tuple[float, float], text: str, colour: tuple[int, int, int], pen: Pen) -> None:
    """A name on top of a box, or inside where the image ends."""
    _, top, width, bottom = draw.textbbox((0, 0), text, font=pen.tiny)
    height = bottom + 2 * pen.scale
    left, above = place[0], place[1] - height if place[1] >= height else place[1]
    draw.rectangle((left, above, left + width + 3 * pen.scale, above + height), fill=colour)
    bright = colour[0] * 0.3 + colour[1] * 0.59 + colour[2] * 0.11 > 140
    draw.text((left + 2 * pen.scale, above), text, font=pen.tiny, fill="black" if bright else "white")
