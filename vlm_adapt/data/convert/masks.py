"""What converters with masks or boxes share: an image and its mask, semantic samples, boxes, keys.

Knows files and sizes; knows nothing about any one dataset, nor how objects are drawn (polygons.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt.data.convert.common import Conversion, read_image, safe_key
from vlm_adapt.data.masks import GREY, check_size, check_values, encode_mask, mask_header, read_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.sizes import seen_size


def read_mask_file(path: Path) -> bytes:
    """The bytes of a mask file. Raises BadSample if it is missing or cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadSample("mask file is missing", str(path)) from error
    except OSError as error:
        raise BadSample("mask file cannot be read", f"{path}: {error.strerror}") from error


def check_annotated_size(data: bytes, annotated: tuple[int, int]) -> None:
    """Raises BadSample unless the image has the (width, height) that its annotations speak of."""
    size = seen_size(data)
    if size != annotated:
        detail = f"image {size[0]} x {size[1]}, annotations {annotated[0]} x {annotated[1]}"
        raise BadSample("annotations and image differ in size", detail)


def read_pair(image: Path, mask: Path) -> tuple[str, bytes, bytes]:
    """An image and its mask: `(extension, image, mask)`. Raises BadSample: missing, or of two sizes."""
    extension, picture = read_image(image)
    data = read_mask_file(mask)
    check_size(mask_header(data)[:2], seen_size(picture))
    return extension, picture, data


def semantic_members(
    image: tuple[str, bytes],
    mask_HW: np.ndarray,
    labels: Sequence[str],
    record: Mapping[str, Any],
    stored: bytes = b"",
) -> dict[str, Any]:
    """The members of a sample with a semantic mask, its values checked.

    Args:
        image: extension and bytes.
        mask_HW: uint8 or uint16, ignored pixels 255 or 65535 by its type.
        labels: index = value.
        record: further fields of the JSON.
        stored: the file that holds just these values; it is kept as it is if it is grey of 8 bits.

    Raises:
        BadSample: a value without a label, or nothing but ignored pixels.
    """
    check_values(mask_HW, labels)
    if mask_HW.dtype.itemsize == 2 and len(labels) <= 255:
        mask_HW = np.where(mask_HW == 65535, 255, mask_HW)
    elif mask_HW.dtype.itemsize == 1 and len(labels) > 255:
        mask_HW = np.where(mask_HW == 255, 65535, mask_HW.astype(np.uint16))
    keep = stored and len(labels) <= 255 and mask_header(stored)[2:] == (8, GREY)
    data = stored if keep else encode_mask(mask_HW, len(labels))
    return {image[0]: image[1], "json": {"labels": list(labels), **record}, "mask.png": data}


def index_sample(image: Path, mask: Path, labels: Sequence[str], identity: str) -> dict[str, Any]:
    """A recipe's function: a sample whose mask file already holds the values of our schema."""
    extension, picture, data = read_pair(image, mask)
    return semantic_members((extension, picture), read_mask(data), labels, {"id": identity}, data)


class Keys:
    """File names as keys, no two the same: what `safe_key` makes alike gets a number."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, name: str) -> str:
        base = safe_key(name)
        key, count = base, 1
        while key in self._taken:
            count += 1
            key = f"{base}-{count}"
        self._taken.add(key)
        return key


def number_of(value: Any, what: str) -> int:
    """A number of an annotation file. Raises BadSample naming what should have been one."""
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise BadSample(f"{what} is not a number", str(value)) from error


def corners(box: Any, width: int, height: int) -> list[float]:
    """COCO's [x, y, width, height] as [x0, y0, x1, y1] in pixels, cut at the image. Raises BadSample."""
    try:
        x, y, wide, high = (float(value) for value in box)
    except (TypeError, ValueError) as error:
        raise BadSample("box is not four numbers", str(box)) from error
    return clip_box([x, y, x + wide, y + high], width, height)


def clip_box(box: Sequence[float], width: int, height: int) -> list[float]:
    """[x0, y0, x1, y1] cut at the image, to hundredths of a pixel. Raises BadSample: nothing is left."""
    if not np.isfinite(box).all():
        raise BadSample("box is not four numbers", str(list(box)))
    x0, x1 = (round(min(max(value, 0.0), float(width)), 2) for value in (box[0], box[2]))
    y0, y1 = (round(min(max(value, 0.0), float(height)), 2) for value in (box[1], box[3]))
    if x1 <= x0 or y1 <= y0:
        raise BadSample("box has no area inside its image", f"{list(box)} in {width} x {height}")
    return [x0, y0, x1, y1]


def lose_unmatched(conversion: Conversion, images: Iterable[str], masks: Iterable[str]) -> list[str]:
    """The names that both have, sorted; those that one side lacks are named as lost."""
    left, right = set(images), set(masks)
    for name in sorted(left - right):
        conversion.lose(name, "image without a mask")
    for name in sorted(right - left):
        conversion.lose(name, "mask without an image")
    return sorted(left & right)
