"""An image as SAM sees it: its long side brought to a size, the rest of the square filled at right and below.

Knows pixels and places; knows nothing about models. SAM fills with zeros after normalising, which is the mean
colour before (Kirillov et al. 2023, arXiv 2304.02643).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm_adapt.data.images import resize
from vlm_adapt.image_spec import ImageSpec


@dataclass(frozen=True)
class Frame:
    """How an image lies in its square; sizes are (height, width) in pixels.

    Attributes:
        original: of the image.
        resized: of the image inside the square, from the top left corner.
        side: of the square.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    side: int

    @classmethod
    def of(cls, original: tuple[int, int], side: int) -> Frame:
        """The frame of an image of this (height, width)."""
        height, width = original
        scale = side / max(height, width)
        resized = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
        return cls((height, width), resized, side)

    def inward(self, places: np.ndarray) -> np.ndarray:
        """(x, y) of the image, or boxes (left, top, right, bottom), as pixels of the square, float32.

        Args:
            places: `[..., 2]` or `[..., 4]`.
        """
        across, down = self.resized[1] / self.original[1], self.resized[0] / self.original[0]
        factors = np.array([across, down] * (places.shape[-1] // 2), np.float32)
        scaled: np.ndarray = np.asarray(places, np.float32) * factors
        return scaled


def fit_long_side(
    pixels_HWC: np.ndarray, side: int, spec: ImageSpec | None = None
) -> tuple[np.ndarray, Frame]:
    """An image in its square.

    Args:
        pixels_HWC: uint8.
        side: of the square, in pixels.
        spec: its mean is the filling.

    Returns:
        pixels_CHW, uint8, and the frame.
    """
    spec = spec or ImageSpec((side, side))
    frame = Frame.of((pixels_HWC.shape[0], pixels_HWC.shape[1]), side)
    inner = ImageSpec(frame.resized, spec.mean, spec.std, "squash", "bilinear")
    square_CHW = np.empty((3, side, side), np.uint8)
    square_CHW[:] = np.array([round(255 * value) for value in spec.mean], np.uint8)[:, None, None]
    square_CHW[:, : frame.resized[0], : frame.resized[1]] = resize(pixels_HWC, inner)
    return square_CHW, frame


def fit_mask(mask_HW: np.ndarray, frame: Frame, size: int | None = None, fill: int = 0) -> np.ndarray:
    """A mask of the original image in the square, each place the nearest pixel's value.

    Args:
        mask_HW: any type, of the original size.
        size: side of the square that comes back; None is the frame's (256 for SAM's mask prompts).
        fill: beyond the image.
    """
    size = size or frame.side
    height, width = frame.original
    middles = (np.arange(size) + 0.5) * (frame.side / size)
    rows = np.floor(middles * height / frame.resized[0]).astype(int)
    columns = np.floor(middles * width / frame.resized[1]).astype(int)
    square = np.full((size, size), fill, mask_HW.dtype)
    down, across = int((rows < height).sum()), int((columns < width).sum())
    square[:down, :across] = mask_HW[rows[:down]][:, columns[:across]]
    return square
