"""Where the windows of an image lie, and the way from a window's small map back to the image.

Knows lengths and matrices; knows nothing about models or labels. Resizing bilinearly (corners aligned) and
averaging where windows overlap work on rows and columns apart, so each window has one matrix for its rows and
one for its columns, and rows of the image can be made alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlm_adapt.data.images import resize
from vlm_adapt.image_spec import ImageSpec


def bilinear(few: int, many: int) -> np.ndarray:
    """float64 [many, few]: values at `few` places brought to `many`, corners aligned; either may be more."""
    matrix = np.zeros((many, few))
    places = np.arange(many) * ((few - 1) / (many - 1)) if many > 1 else np.zeros(1)
    lower = np.minimum(places.astype(int), few - 1)
    upper = np.minimum(lower + 1, few - 1)
    rows = np.arange(many)
    np.add.at(matrix, (rows, lower), 1 - (places - lower))
    np.add.at(matrix, (rows, upper), places - lower)
    return matrix


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along a side that holds at least one: evenly spread to the pixel (and so the same
    seen from either end, but for halves), neighbours sharing at least `overlap` of a window."""
    rest = length - window
    gaps = math.ceil(rest / max(1, int(window * (1 - overlap))))
    if not gaps:
        return [0]
    return [(2 * rest * place + gaps) // (2 * gaps) for place in range(gaps + 1)]


class Side:
    """The matrix of a window along one side of the image.

    Args:
        weights_SM: [pixels of the image, places of the map]; every row's entries that are not 0 lie together.
    """

    def __init__(self, weights_SM: np.ndarray, device: torch.device):
        self.weights_SM = torch.from_numpy(weights_SM).float().to(device)
        used_SM = weights_SM != 0
        self.any_S = used_SM.any(1)
        self.low_S = used_SM.argmax(1)
        self.high_S = weights_SM.shape[1] - used_SM[:, ::-1].argmax(1)

    def of(self, first: int, last: int) -> tuple[slice, slice] | None:
        """Of pixels `first` to `last`, those that the window covers, and the places they are made of."""
        inside = np.flatnonzero(self.any_S[first:last]) + first
        if not len(inside):
            return None
        low, high = int(self.low_S[inside].min()), int(self.high_S[inside].max())
        return slice(int(inside[0]), int(inside[-1]) + 1), slice(low, high)


@dataclass
class View:
    """An image at one scale.

    Args:
        pixels_CHW: uint8, padded at the right and the bottom where it is smaller than a window.
        size: (height, width) of the part that is image.
        tops, lefts: where windows begin.
        window: (height, width) of one; None: the only window is brought to the image's size in one step.
    """

    pixels_CHW: np.ndarray
    size: tuple[int, int]
    tops: list[int]
    lefts: list[int]
    window: tuple[int, int] | None

    def places(self) -> list[tuple[int, int]]:
        """(top, left) of every window."""
        return [(top, left) for top in self.tops for left in self.lefts]

    def cut(self, place: tuple[int, int]) -> Tensor:
        """pixels_CHW of a window."""
        if self.window is None:
            return torch.from_numpy(self.pixels_CHW)
        (top, left), (height, width) = place, self.window
        return torch.from_numpy(self.pixels_CHW[:, top : top + height, left : left + width])

    def sides(
        self, image: tuple[int, int], grid: tuple[int, int], device: torch.device
    ) -> tuple[dict[int, Side], dict[int, Side]]:
        """The matrices of windows by where they begin, down and across.

        Args:
            image: (height, width) of the image itself. grid: of a window's map.
        """
        found: list[dict[int, Side]] = []
        for axis, begins in enumerate((self.tops, self.lefts)):
            if self.window is None:
                found.append({0: Side(bilinear(grid[axis], image[axis]), device)})
                continue
            window, length = self.window[axis], self.size[axis]
            count = np.zeros(self.pixels_CHW.shape[1 + axis])
            for start in begins:
                count[start : start + window] += 1
            up = bilinear(grid[axis], window)
            back = bilinear(length, image[axis])  # from the image alone: what was padded has no vote
            sides = {}
            for start in begins:
                stop = min(start + window, length)
                mean = up[: stop - start] / count[start:stop, None]
                sides[start] = Side(back[:, start:stop] @ mean, device)
            found.append(sides)
        return found[0], found[1]


def whole_view(pixels_HWC: np.ndarray, spec: ImageSpec) -> View:
    """The image squashed to the tower's size."""
    squashed = resize(pixels_HWC, replace(spec, resize="squash", native=None))
    return View(squashed, spec.size, [0], [0], None)


def sliding_view(pixels_HWC: np.ndarray, spec: ImageSpec, size: tuple[int, int], overlap: float) -> View:
    """The image resized to `size`, under windows of the tower's; filled up with the mean colour."""
    scaled_CHW = resize(pixels_HWC, replace(spec, resize="squash", native=None, size=size))
    padded = (max(size[0], spec.size[0]), max(size[1], spec.size[1]))
    if padded != size:
        fill = np.array([round(255 * value) for value in spec.mean], np.uint8)[:, None, None]
        large_CHW = np.empty((len(fill), *padded), np.uint8)
        large_CHW[:] = fill
        large_CHW[:, : size[0], : size[1]] = scaled_CHW
        scaled_CHW = large_CHW
    tops, lefts = (starts(one, side, overlap) for one, side in zip(padded, spec.size, strict=True))
    return View(scaled_CHW, size, tops, lefts, spec.size)
