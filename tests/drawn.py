"""A stand-in for a segmenter that knows drawings: every label has a colour, the nearest one wins.

For tests of what goes on around a model: files, films, pictures. Knows nothing of models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlm_adapt.report.colours import colours
from vlm_adapt.segment.ask import Ask
from vlm_adapt.segment.result import Segmentation
from vlm_adapt.text.labels import shown

PAINTS = {"sky": (90, 170, 250), "grass": (80, 190, 70), "cat": (240, 120, 30)}


def drawing(width: int = 60, height: int = 40, cat: int = 10) -> Image.Image:
    """Sky over grass, and a cat `cat` pixels from the left."""
    picture = Image.new("RGB", (width, height), PAINTS["sky"])
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, height // 2, width, height), fill=PAINTS["grass"])
    pen.rectangle((cat, height // 2 - 5, cat + 9, height // 2 + 4), fill=PAINTS["cat"])
    return picture


class DrawnFinder:
    """As segment.run.Finder, without a checkpoint."""

    max_pixels = 100_000_000

    def __init__(self, checkpoint: Any, ask: Ask):
        self.names = [shown(label) for label in ask.labels]
        paints = [PAINTS.get(name, colours([name])[0]) for name in self.names]
        self.paints_L3 = np.array(paints, np.float32)
        self.ask, self.seen = ask, 0

    def __call__(self, pixels_HWC: np.ndarray) -> Segmentation:
        self.seen += 1
        far_LHW = np.abs(pixels_HWC[None] - self.paints_L3[:, None, None]).sum(-1)
        chances_LHW = np.exp(-far_LHW / 50)
        chances_LHW /= chances_LHW.sum(0)
        classes_HW = chances_LHW.argmax(0).astype(np.uint16)
        scores = chances_LHW if self.ask.scores else None
        return Segmentation(classes_HW, self.names, chances_LHW.max(0), scores)


def film(path: Path, frames: int = 4, **options: Any) -> None:
    """An animation in which the cat walks."""
    first, *rest = (drawing(cat=10 + 5 * place) for place in range(frames))
    options = {"duration": 80, "loop": 0} | options
    first.save(path, save_all=True, append_images=rest, **options)
