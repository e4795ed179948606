"""The pictures of docs/segment.md: a drawn scene under the masks that it was drawn with.

    python scripts/segment_pictures.py docs

Writes segment_overlay.png (as `segment` shows an image) and segment_samples.png (as samples are shown
beside their truth; the prediction is the truth with some shapes left out).
Knows shapes and colours; knows nothing about models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from vlm_adapt.report.colours import colours
from vlm_adapt.report.regions import overlay
from vlm_adapt.report.segmentation import SampleRow, samples_page, write_png

NAMES = ("sky", "hill", "grass", "road", "house", "tree", "sun", "cat")
PAINTS = ("#a9d4f5", "#7fa37a", "#8fbf5f", "#9a938c", "#d8b48a", "#3f7d4a", "#f8d35e", "#4a4038")
SIZE, FINE = (960, 600), 3  # drawn three times as large, so that edges are smooth


class Scene:
    """A drawing and its mask, made with the same strokes."""

    def __init__(self, seed: int):
        self.draws = np.random.default_rng(seed)
        large = (SIZE[0] * FINE, SIZE[1] * FINE)
        self.picture, self.mask = Image.new("RGB", large), Image.new("L", large)
        self.pens = (ImageDraw.Draw(self.picture), ImageDraw.Draw(self.mask))

    def shape(self, kind: str, name: str, places: Sequence[float], paint: str | None = None) -> None:
        """A polygon, ellipse or rectangle of something, in pixels of the picture."""
        value = NAMES.index(name)
        for pen, fill in zip(self.pens, (paint or PAINTS[value], value), strict=True):
            getattr(pen, kind)([place * FINE for place in places], fill=fill)

    def finished(self) -> tuple[np.ndarray, np.ndarray]:
        """(pixels_HWC with some grain, mask_HW)."""
        soft = self.picture.resize(SIZE, Image.Resampling.LANCZOS)
        light = np.linspace(1.08, 0.86, SIZE[1])[:, None, None]
        grain = np.asarray(
            Image.fromarray(self.draws.normal(128, 7, SIZE[::-1]).clip(0, 255).astype(np.uint8)).filter(
                ImageFilter.GaussianBlur(1.2)
            )
        )
        pixels = np.asarray(soft) * light + (grain.astype(float)[..., None] - 128) * 0.9
        mask = np.asarray(self.mask.resize(SIZE, Image.Resampling.NEAREST))
        return pixels.clip(0, 255).astype(np.uint8), mask


def scene(seed: int, leave_out: Sequence[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """A landscape; what is left out is what lies behind it."""
    made = Scene(seed)
    draws, width, height = np.random.default_rng(seed + 100), *SIZE
    shift = float(draws.uniform(-120, 120))
    made.shape("rectangle", "sky", (0, 0, width, height))
    if "sun" not in leave_out:
        made.shape("ellipse", "sun", (700 + shift / 2, 50, 800 + shift / 2, 150))
    ridge = [(x, 300 + 60 * np.sin(x / 150 + seed) + 25 * np.sin(x / 47)) for x in range(0, width + 20, 20)]
    made.shape("polygon", "hill", [v for point in [(0, height), *ridge, (width, height)] for v in point])
    made.shape("polygon", "grass", (0, 390, width, 350, width, height, 0, height))
    made.shape("polygon", "road", (430 + shift, 380, 480 + shift, 378, 800, height, 380, height))
    if "house" not in leave_out:
        left = 120 + shift / 2
        made.shape("rectangle", "house", (left, 290, left + 190, 430))
        made.shape("polygon", "house", (left - 20, 292, left + 95, 205, left + 210, 292), "#a5523c")
        for window in (25, 125):
            made.shape("rectangle", "house", (left + window, 325, left + window + 40, 365), "#5d7f99")
    for number in range(3):
        x, foot = 610 + 120 * number + shift / 3, 440 + 30 * (number % 2)
        made.shape("rectangle", "tree", (x - 9, foot - 80, x + 9, foot), "#6d4c35")
        for dx, dy in ((-38, -70), (38, -74), (0, -120), (0, -80)):
            made.shape("ellipse", "tree", (x + dx - 46, foot + dy - 52, x + dx + 46, foot + dy + 40))
    if "cat" not in leave_out:
        x = 330 + shift / 2
        made.shape("ellipse", "cat", (x, 470, x + 110, 550))
        made.shape("ellipse", "cat", (x + 75, 430, x + 135, 488))
        made.shape("polygon", "cat", (x + 80, 440, x + 84, 408, x + 102, 434))
        made.shape("polygon", "cat", (x + 108, 434, x + 126, 408, x + 130, 442))
        made.shape("polygon", "cat", (x + 6, 520, x - 42, 440, x - 30, 434, x + 24, 500))
        for leg in (14, 40, 72, 92):
            made.shape("rectangle", "cat", (x + leg, 530, x + leg + 14, 575))
    return made.finished()


def main(folder: Path) -> None:
    pixels, mask = scene(3)
    shares = [float((mask == value).mean()) for value in range(len(NAMES))]
    page = overlay(pixels, mask, NAMES, colours(NAMES), shares)
    write_png(folder / "segment_overlay.png", page)
    rows = []
    for seed, missed in ((3, ("sun",)), (5, ("cat",)), (8, ("house",))):
        pixels, truth = scene(seed)
        rows.append(SampleRow(pixels, truth, scene(seed, missed)[1], f"scene-{seed}"))
    write_png(folder / "segment_samples.png", samples_page(rows, NAMES))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
