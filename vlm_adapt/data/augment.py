"""How an image and its mask vary in training: one geometry for both, drawn from a sample's own draws.

Knows sizes, parts and colours; knows nothing about samples, labels or files. LSeg (arXiv:2201.03546) trains
as its predecessors do: the long side scaled by 0.5 to 2 of a base size, a crop of 480, mirrored or not.

A part of the image in whole pixels becomes a part of the picture in whole pixels, so pixel centres agree
exactly: target pixel i shows source coordinate (i + 0.5) * source / target, antialiased in the image and the
pixel there in the mask. What is left of the picture is the image mean, and -1 in the mask.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage

from vlm_adapt.config.schema import Augment
from vlm_adapt.data.images import resize
from vlm_adapt.image_spec import ImageSpec

FACTORS = (8, 4, 2)  # by which a JPEG decoder can leave out detail


class Span(NamedTuple):
    """Along one axis: pixels `start` to `start + length` become `to` to `to + made`."""

    start: int
    length: int
    to: int
    made: int


@dataclass(frozen=True)
class Cut:
    """Which part of an image becomes which part of a picture.

    Attributes:
        rows, columns: in pixels of the image as it is decoded, and of the picture.
        size: (height, width) of the picture.
        factor: the image is decoded at this fraction of its sides, rounded up.
        flip: the part is mirrored.
    """

    rows: Span
    columns: Span
    size: tuple[int, int]
    factor: int = 1
    flip: bool = False

    @property
    def full(self) -> bool:
        """Whether nothing of the picture is left over."""
        return (self.rows.made, self.columns.made) == self.size


def draw_cut(
    image_size: tuple[int, ...],
    size: tuple[int, int],
    augment: Augment,
    generator: np.random.Generator,
    reducible: bool = False,
) -> Cut:
    """A random part of an image.

    Args:
        image_size, size: (height, width) of the image as it is seen, and of the picture.
        augment: a scale of 1 is that at which the whole image just fits into the picture.
        reducible: the image can be decoded at a fraction of its size.
    """
    flip = augment.flip and bool(generator.random() < 0.5)
    if not augment.crop:
        return replace(squashed(image_size, size), flip=flip)
    scale = float(generator.uniform(*augment.scale)) * min(
        new / old for new, old in zip(size, image_size, strict=True)
    )
    factor = next((one for one in FACTORS if scale * one <= 1), 1) if reducible else 1
    rows, columns = (
        _span(-(-old // factor), new, scale * factor, generator)
        for old, new in zip(image_size, size, strict=True)
    )
    return Cut(rows, columns, size, factor, flip)


def _span(old: int, new: int, scale: float, generator: np.random.Generator) -> Span:
    """A random place: of the part in the image where that is larger, else of the image in the picture."""
    wanted = new / scale
    if wanted >= old:
        made = min(new, max(1, round(old * scale)))
        return Span(0, old, int(generator.integers(new - made + 1)), made)
    length = min(old, max(1, round(wanted)))
    return Span(int(generator.integers(old - length + 1)), length, 0, new)


def squashed(image_size: tuple[int, ...], size: tuple[int, int]) -> Cut:
    """The whole image over the whole picture, whatever its aspect."""
    rows, columns = (Span(0, old, 0, new) for old, new in zip(image_size, size, strict=True))
    return Cut(rows, columns, size)


def fitted(image_size: tuple[int, ...], spec: ImageSpec) -> Cut:
    """Nothing drawn: squashed, cropped at the centre or padded around it, as `spec.resize` says."""
    if spec.resize == "squash":
        return squashed(image_size, spec.size)
    pairs = list(zip(image_size, spec.size, strict=True))
    scales = [new / old for old, new in pairs]
    if spec.resize == "pad":
        made = [min(new, max(1, round(old * min(scales)))) for old, new in pairs]
        rows, columns = (
            Span(0, old, (new - one) // 2, one) for (old, new), one in zip(pairs, made, strict=True)
        )
    else:
        kept = [min(old, max(1, round(new / max(scales)))) for old, new in pairs]
        rows, columns = (
            Span((old - one) // 2, one, 0, new) for (old, new), one in zip(pairs, kept, strict=True)
        )
    return Cut(rows, columns, spec.size)


def cut_pixels(pixels_HWC: np.ndarray, cut: Cut, spec: ImageSpec) -> np.ndarray:
    """The picture of an image.

    Args:
        pixels_HWC: uint8, decoded at the cut's fraction; may lie in memory that is used again.

    Returns:
        pixels_HWC, uint8, of the cut's size, in memory of its own.
    """
    (top, height, _, _), (left, width, _, _) = cut.rows, cut.columns
    part = pixels_HWC[top : top + height, left : left + width]
    target = replace(spec, size=(cut.rows.made, cut.columns.made), resize="squash", native=None)
    made_HWC = resize(part, target).transpose(1, 2, 0)
    if cut.flip:
        made_HWC = _mirrored(made_HWC)
    if cut.full:
        shared = np.may_share_memory(made_HWC, pixels_HWC)
        return made_HWC.copy() if shared else np.ascontiguousarray(made_HWC)
    row_S = np.tile(np.array([round(255 * value) for value in spec.mean], np.uint8), cut.size[1])
    picture_HWC = np.empty((*cut.size, 3), np.uint8)
    picture_HWC.reshape(cut.size[0], -1)[:] = row_S  # a row at a time is ten times as fast as a pixel
    _inner(picture_HWC, cut)[:] = made_HWC
    return picture_HWC


def _mirrored(pixels_HWC: np.ndarray) -> np.ndarray:
    """A mirrored copy; torch moves whole pixels, in a twentieth of numpy's time."""
    import torch

    if not pixels_HWC.flags.writeable:  # torch warns of tensors on read-only memory
        pixels_HWC = pixels_HWC.copy()
    return torch.from_numpy(pixels_HWC).flip(1).numpy()


def cut_mask(codes_HW: np.ndarray, cut: Cut, kind: type[np.signedinteger] = np.int16) -> np.ndarray:
    """The picture of a mask.

    Args:
        codes_HW: classes plus one at the image's full size, 0 for ignored pixels.
        kind: the type of the result.

    Returns:
        mask_HW, classes, -1 for ignored pixels and for what is left of the picture.
    """
    rows, columns = (
        _nearest(span, old, cut.factor)
        for span, old in zip((cut.rows, cut.columns), codes_HW.shape, strict=True)
    )
    columns = columns[::-1] if cut.flip else columns
    picture_HW = np.zeros(cut.size, kind)
    _inner(picture_HW, cut)[:] = codes_HW.take(rows, axis=0).take(columns, axis=1)
    picture_HW -= 1
    return picture_HW


def _nearest(span: Span, old: int, factor: int) -> np.ndarray:
    """Which of `old` full-size pixels lies under the centre of each target pixel, in whole numbers."""
    centres = (2 * np.arange(span.made) + 1) * span.length * factor // (2 * span.made)
    return np.minimum(centres + span.start * factor, old - 1)


def _inner(picture: np.ndarray, cut: Cut) -> np.ndarray:
    """The part of a picture that shows the image."""
    rows, columns = cut.rows, cut.columns
    return picture[rows.to : rows.to + rows.made, columns.to : columns.to + columns.made]


_GREY = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601, as in JPEG


def jitter_colours(pixels_HWC: np.ndarray, cut: Cut, strength: float, generator: np.random.Generator) -> None:
    """Vary brightness, contrast and saturation of the image in a picture, in place.

    Each is multiplied by a factor drawn from 1 - strength to 1 + strength: brightness all values, contrast
    their distance to the mean grey (of every fourth row and column), saturation to the pixel's own grey.
    """
    brightness, contrast, saturation = generator.uniform(1 - strength, 1 + strength, 3)
    inner_HWC = _inner(pixels_HWC, cut)
    mean = inner_HWC[::4, ::4].mean((0, 1)) @ _GREY * brightness
    # All three are linear: one matrix for colours, one constant.
    matrix_CC = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _GREY)
    affine_CD = np.concatenate([matrix_CC, np.full((3, 1), (1 - contrast) * mean)], 1)
    image = PILImage.fromarray(np.ascontiguousarray(inner_HWC))
    inner_HWC[:] = np.asarray(image.convert("RGB", tuple(affine_CD.reshape(-1).tolist())))
