"""A folder of images and a folder of masks, matched by name, as CamVid and many others come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt.data.convert.class_table import IGNORED, ClassTable, Value, read_table
from vlm_adapt.data.convert.common import Conversion, Recipe, existing
from vlm_adapt.data.convert.masks import Keys, lose_unmatched, read_pair, semantic_members
from vlm_adapt.data.masks import (
    GREY,
    PALETTE,
    count_values,
    depth_for,
    ignored_value,
    mask_header,
    open_mask,
    read_mask,
)
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

IMAGES = (".jpg", ".jpeg", ".png", ".webp")


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    """{path in the folder, without suffix and extension: file}, of image files."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGES and path.stem.endswith(suffix) and path.is_file():
            name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
            if name in found:
                raise UserError(f"{found[name]} and {path} have the same name: keep one of them")
            found[name] = path
    return found


def from_indexes(mask_HW: np.ndarray, table: ClassTable) -> np.ndarray:
    """Our values_HW of an index mask. Raises BadSample: a value that the table lacks."""
    counts = count_values(mask_HW)
    kind = depth_for(len(table.labels))
    meant = np.zeros(len(counts), kind)
    for value in np.flatnonzero(counts).tolist():
        new = table.lookup.get(value, IGNORED if value == ignored_value(mask_HW) else None)
        if new is None:
            detail = f"value {value} ({counts[value]:,} pixels)"
            raise BadSample("mask has a value without a label", detail)
        meant[value] = np.iinfo(kind).max if new == IGNORED else new
    return meant[mask_HW]


def from_colours(data: bytes, table: ClassTable) -> np.ndarray:
    """Our values_HW of a mask of colours. Raises BadSample: indexes, or a colour that the table lacks."""
    header = mask_header(data)
    if header.colour in (GREY, PALETTE):
        raise BadSample("mask has indexes where colours were expected: give a table of indexes")
    if header.bits != 8:
        raise BadSample("mask has colours of 16 bits")
    image = open_mask(data)
    if image.mode != "RGB":
        if image.mode != "RGBA" or np.asarray(image)[..., 3].min() < 255:
            raise BadSample("mask of colours is partly transparent or grey", f"PIL's mode {image.mode}")
        image = image.convert("RGB")
    pixels_HWC = np.asarray(image)
    codes_HW = np.dot(pixels_HWC.astype(np.int32), np.array([65536, 256, 1], np.int32))
    lookup = sorted((_code(value), new) for value, new in table.lookup.items())
    known, ours = np.array(lookup).T
    places_HW = np.searchsorted(known, codes_HW).clip(max=len(known) - 1)
    unknown_HW = known[places_HW] != codes_HW
    if unknown_HW.any():
        colour = tuple(pixels_HWC[unknown_HW][0].tolist())
        detail = f"colour {colour} (of {int(unknown_HW.sum()):,} such pixels the first)"
        raise BadSample("mask has a colour without a label", detail)
    kind = depth_for(len(table.labels))
    return np.where(ours == IGNORED, np.iinfo(kind).max, ours).astype(kind)[places_HW]


def _code(value: Value) -> int:
    return value if isinstance(value, int) else value[0] * 65536 + value[1] * 256 + value[2]


def sample(image: Path, mask: Path, table: ClassTable, identity: str) -> dict[str, Any]:
    """The recipe."""
    extension, picture, data = read_pair(image, mask)
    stored = b""
    if table.coloured:
        values_HW = from_colours(data, table)
    elif mask_header(data).colour not in (GREY, PALETTE):
        raise BadSample("mask has colours where indexes were expected: give a table of colours")
    else:
        mask_HW = read_mask(data)
        values_HW = from_indexes(mask_HW, table)
        stored = data if np.array_equal(values_HW, mask_HW) else b""
    return semantic_members((extension, picture), values_HW, table.labels, {"id": identity}, stored)


def convert(
    conversion: Conversion,
    *,
    images: str,
    masks: str,
    labels: str,
    ignore: str = "",
    image_suffix: str = "",
    mask_suffix: str = "",
) -> Iterator[Recipe]:
    """Samples with a semantic mask, in the order of the names.

    Args:
        images: the folder of the images; folders below it are kept in the names.
        masks: the folder of the masks, laid out alike: PNGs of indexes (a palette's, too) or of colours.
            255 (in 16 bits 65535) is ignored unless the table names it.
        labels: a table of classes with indexes or with colours; see class_table.py.
        ignore: names, indexes or colours to ignore, joined by `::`.
        image_suffix, mask_suffix: what follows the shared part of the name (`_L`, `_leftImg8bit`).
    """
    table = read_table(labels, ignore)
    pictures = _files(existing(images, "image folder"), image_suffix)
    layers = _files(existing(masks, "mask folder"), mask_suffix)
    both = {path.resolve() for path in layers.values()} if mask_suffix else set()
    pictures = {name: path for name, path in pictures.items() if path.resolve() not in both}
    names = lose_unmatched(conversion, pictures, layers)
    if not names:
        raise UserError(
            f"no image in {images} and mask in {masks} share a name: a suffix of either is said by "
            "image_suffix and mask_suffix"
        )
    conversion.total = len(names)
    key = Keys()
    for name in names:
        folder, _, base = name.rpartition("/")
        arguments = (pictures[name], layers[name], table, name)
        yield Recipe(key(f"{folder.replace('/', '-')}-{base}" if folder else base), sample, arguments)
