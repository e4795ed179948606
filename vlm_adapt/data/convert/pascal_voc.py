"""PASCAL VOC 2012 segmentation, with boxes if wanted.

Everingham et al. 2010, doi:10.1007/s11263-009-0275-4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from vlm_adapt.data.convert.common import Conversion, Recipe, existing, safe_key
from vlm_adapt.data.convert.masks import check_annotated_size, clip_box, read_pair, semantic_members
from vlm_adapt.data.masks import read_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

LABELS = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
]  # fmt: skip


def _boxes(
    conversion: Conversion, path: Path, difficult: bool
) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    """(width, height) and the objects of an annotation file, unusable ones named. Raises BadSample."""
    try:
        tree = ElementTree.parse(path).getroot()
        size = [int(tree.findtext(f"size/{side}", "")) for side in ("width", "height")]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise BadSample("boxes cannot be read", f"{path}: {error}") from error
    objects = []
    for number, entry in enumerate(tree.iter("object")):
        label = entry.findtext("name", "").strip()
        try:
            if entry.findtext("difficult", "0").strip() == "1" and not difficult:
                raise BadSample("object marked as difficult (difficult=true keeps it)")
            if not label:
                raise BadSample("object without a name")
            try:
                edges = [float(entry.findtext(f"bndbox/{e}", "")) for e in ("xmin", "ymin", "xmax", "ymax")]
            except ValueError as error:
                raise BadSample("box is not four numbers") from error
            # Pixels count from 1 there, and the last one belongs to the box.
            box = clip_box([edges[0] - 1, edges[1] - 1, edges[2], edges[3]], size[0], size[1])
        except BadSample as error:
            conversion.lose(f"{path.stem} object {number}", error)
            continue
        objects.append({"label": label, "box": box})
    return (size[0], size[1]), objects


def sample(
    image: Path, mask: Path, record: dict[str, Any], size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """The recipe: the palette's indexes are the values, 255 the boundary; `size` is that of the boxes."""
    extension, picture, data = read_pair(image, mask)
    if size is not None:
        check_annotated_size(picture, size)
    return semantic_members((extension, picture), read_mask(data), LABELS, record, data)


def convert(
    conversion: Conversion,
    *,
    folder: str,
    split: str = "train",
    objects: bool = False,
    difficult: bool = False,
) -> Iterator[Recipe]:
    """Samples with a semantic mask of 21 labels, in the order of the split's list.

    Args:
        folder: `VOC2012`, or the folder above it or above `VOCdevkit`.
        split: train, val or trainval: a list in ImageSets/Segmentation.
        objects: boxes from Annotations, too.
        difficult: keep boxes that are marked as difficult.
    """
    root = existing(folder, "PASCAL VOC folder")
    for inner in ("VOCdevkit", "VOC2012"):
        root = root / inner if (root / inner).is_dir() else root
    lists = root / "ImageSets" / "Segmentation"
    try:
        names = (lists / f"{split}.txt").read_text(encoding="utf-8").split()
    except OSError as error:
        known = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
        raise UserError(f"{lists} has no list '{split}.txt'; splits there: {known}") from error
    conversion.total = len(names)
    for name in names:
        record: dict[str, Any] = {"id": name}
        size = None
        if objects:
            try:
                size, boxes = _boxes(conversion, root / "Annotations" / f"{name}.xml", difficult)
            except BadSample as error:
                conversion.lose(name, error)
                continue
            if boxes:
                record["objects"] = boxes
        image, mask = root / "JPEGImages" / f"{name}.jpg", root / "SegmentationClass" / f"{name}.png"
        yield Recipe(safe_key(name), sample, (image, mask, record, size))
