"""Animations (GIF, WebP, PNG): their frames one by one, and new ones of pictures. Knows PIL only."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

FORMATS = ("GIF", "WEBP", "PNG")
USUAL = 100  # milliseconds of a frame that does not say


def _open(path: Path) -> PILImage.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PILImage.open(path, formats=FORMATS)


def frames_of(path: Path) -> int:
    """How many frames a file has; 1 for an image, or for what is none."""
    try:
        with _open(path) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # hostile headers make PIL's parsers raise almost anything; reading it will say so
        return 1


def read_frames(path: Path, max_pixels: int) -> Iterator[tuple[np.ndarray, float]]:
    """(pixels_HWC uint8, seconds that it is shown) of every frame, transparency on white.

    Raises:
        BadSample: damaged, or too large.
    """
    try:
        with _open(path) as image:
            if image.width * image.height > max_pixels:
                raise BadSample("image too large", f"{image.width:,} x {image.height:,} pixels")
            for place in range(getattr(image, "n_frames", 1)):
                image.seek(place)
                frame = image.convert("RGBA")
                white = PILImage.new("RGBA", frame.size, (255, 255, 255, 255))
                pixels_HWC = np.array(PILImage.alpha_composite(white, frame).convert("RGB"))
                yield pixels_HWC, (image.info.get("duration") or USUAL) / 1000
    except (BadSample, UserError):
        raise
    except Exception as error:  # as above
        raise BadSample("damaged animation", f"{type(error).__name__}: {error}") from error


def animated(frames: Iterator[tuple[PILImage.Image, float]], total: int) -> bytes:
    """An endless WebP of `total` pictures and the seconds that each is shown, taken as they come.

    Raises:
        whatever `frames` raises.
    """
    first, seconds = next(frames)
    durations = [_milliseconds(seconds)]
    rest: list[Any] = [_Film(frames, durations, total - 1)]
    buffer = io.BytesIO()
    first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=durations, loop=0, quality=88)
    return buffer.getvalue()


def _milliseconds(seconds: float) -> int:
    return max(1, round(1000 * seconds))


class _Film:
    """What PIL takes for an image of many frames: the next one is made when it is asked for, none is kept."""

    def __init__(self, frames: Iterator[tuple[PILImage.Image, float]], durations: list[int], total: int):
        self.frames, self.durations, self.n_frames = frames, durations, total
        self.image = PILImage.new("RGB", (1, 1))

    def seek(self, place: int) -> None:
        self.image, seconds = next(self.frames)
        self.durations.append(_milliseconds(seconds))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.image, name)
