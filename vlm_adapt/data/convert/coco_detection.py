"""COCO instances: objects with label, box and, if wanted, mask. Lin et al. 2014, arXiv:1405.0312."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_adapt.data.convert.common import Conversion, ImageFolders, Recipe, read_image, read_json, several
from vlm_adapt.data.convert.masks import check_annotated_size, corners, number_of
from vlm_adapt.data.convert.polygons import check_shape, draw
from vlm_adapt.data.masks import encode_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError


@dataclass
class Instances:
    """An instances file: {image: (file name, height, width)}, {image: annotations}, {category: name}."""

    images: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    annotations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    categories: dict[int, str] = field(default_factory=dict)


def read_instances(paths: str) -> Instances:
    """One or several instances files, joined by `::`. UserError if one is none."""
    found = Instances()
    for path in several(paths):
        content = read_json(path, "instances file")
        try:
            for image in content["images"]:
                size = int(image["height"]), int(image["width"])
                found.images[int(image["id"])] = (str(image["file_name"]), *size)
            for category in content["categories"]:
                name = found.categories.setdefault(int(category["id"]), str(category["name"]))
                if name != category["name"]:
                    raise UserError(f"category {category['id']} is '{name}' and, in {path}, another one")
            for entry in content["annotations"]:
                found.annotations.setdefault(int(entry["image_id"]), []).append(entry)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a COCO instances file ({error!r})") from error
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is not a COCO instances file ({error!r})") from error
    return found


def read_sized(image: Path, width: int, height: int) -> tuple[str, bytes]:
    """An image and its extension. BadSample unless it has the size that its annotations speak of."""
    extension, data = read_image(image)
    check_annotated_size(data, (width, height))
    return extension, data


def drawn(segmentations: list[Any], height: int, width: int) -> dict[str, bytes]:
    """Members `mask.0.png`, `mask.1.png`, ... Raises BadSample."""
    masks = (encode_mask(draw(entry, height, width)) for entry in segmentations)
    return {f"mask.{number}.png": data for number, data in enumerate(masks)}


def sample(
    image: Path, size: tuple[int, int], record: dict[str, Any], segmentations: list[Any]
) -> dict[str, Any]:
    """The recipe: read the image and draw its masks; `size` is (height, width)."""
    height, width = size
    extension, data = read_sized(image, width, height)
    return {extension: data, "json": record, **drawn(segmentations, height, width)}


def convert(
    conversion: Conversion, *, annotations: str, images: str, masks: bool = False, crowd: bool = False
) -> Iterator[Recipe]:
    """Samples `{objects: [{label, box, mask}], id}` in the order of the file's images.

    Args:
        annotations: `instances_*.json`, or several joined by `::`.
        images: the folder of the images, or several joined by `::`.
        masks: draw each object's mask, too.
        crowd: keep regions that COCO marks as a crowd (`iscrowd`).
    """
    folders = ImageFolders(images)
    source = read_instances(annotations)
    conversion.total = len(source.images)
    for number in source.annotations.keys() - source.images.keys():
        conversion.lose(str(number), "objects of an image that the file does not list")
    for number, (name, height, width) in source.images.items():
        objects: list[dict[str, Any]] = []
        segmentations: list[Any] = []
        for entry in source.annotations.get(number, []):
            try:
                if entry.get("iscrowd") and not crowd:
                    raise BadSample("crowd region (crowd=true keeps it)")
                category = number_of(entry.get("category_id"), "category")
                if category not in source.categories:
                    raise BadSample("object of an unknown category", str(category))
                found: dict[str, Any] = {
                    "label": source.categories[category],
                    "box": corners(entry.get("bbox"), width, height),
                }
                if masks:
                    check_shape(entry.get("segmentation"), height, width)
                    found["mask"] = len(segmentations)
                    segmentations.append(entry["segmentation"])
            except BadSample as error:
                conversion.lose(f"{number} object {entry.get('id')}", error)
                continue
            objects.append(found)
        if not objects:
            conversion.lose(str(number), "image without objects")
            continue
        record = {"objects": objects, "id": str(number)}
        arguments = (folders.named(name), (height, width), record, segmentations)
        yield Recipe(f"{number:012d}", sample, arguments)
