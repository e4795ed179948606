"""COCO panoptic: every pixel a segment, things and stuff. Kirillov et al. 2019, arXiv:1801.00868."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt.data.convert.common import Conversion, ImageFolders, Recipe, existing, read_json
from vlm_adapt.data.convert.masks import number_of, read_pair, semantic_members
from vlm_adapt.data.masks import IGNORED_16, encode_mask, open_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

OBJECTS = ("none", "things", "all")


def segment_ids(data: bytes) -> np.ndarray:
    """ids_HW of a panoptic PNG, uint32: R + 256 G + 65536 B. Raises BadSample."""
    image = open_mask(data)
    if image.mode != "RGB":
        raise BadSample("panoptic mask is not RGB", f"PIL's mode {image.mode}")
    pixels_HWC = np.asarray(image).astype(np.uint32)
    return pixels_HWC[..., 0] + 256 * pixels_HWC[..., 1] + 65536 * pixels_HWC[..., 2]


def sample(
    image: Path, mask: Path, labels: list[str], segments: dict[int, tuple[int, bool]], identity: str
) -> dict[str, Any]:
    """The recipe: each segment's class into a semantic mask, and the chosen segments as objects.

    Args:
        segments: {segment number: (index of its label, whether it becomes an object)}.
    """
    extension, picture, data = read_pair(image, mask)
    ids_HW = segment_ids(data)
    found, places_HW = np.unique(ids_HW, return_inverse=True)
    places_HW = places_HW.reshape(ids_HW.shape)  # numpy 2.0 alone gives it flat
    numbers = found.tolist()
    unknown = [number for number in numbers if number and number not in segments]
    if unknown:
        raise BadSample("mask has a segment that its annotation does not list", f"segment {unknown[0]}")
    absent = segments.keys() - set(numbers)
    if absent:
        raise BadSample("annotation lists a segment that has no pixels", f"segment {min(absent)}")
    ignored = 255 if len(labels) <= 255 else IGNORED_16
    values = [segments[number][0] if number else ignored for number in numbers]
    kind = np.uint8 if ignored == 255 else np.uint16
    record: dict[str, Any] = {"id": identity}
    objects: list[dict[str, Any]] = []
    drawn: dict[str, bytes] = {}
    for place, number in enumerate(numbers):
        if not number or not segments[number][1]:
            continue
        mask_HW = places_HW == place
        rows, columns = (np.flatnonzero(mask_HW.any(axis)).tolist() for axis in (1, 0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        drawn[f"mask.{len(objects)}.png"] = encode_mask(mask_HW)
        objects.append({"label": labels[segments[number][0]], "box": box, "mask": len(objects)})
    if objects:
        record["objects"] = objects
    members = semantic_members((extension, picture), np.array(values, kind)[places_HW], labels, record)
    return {**members, **drawn}


def convert(
    conversion: Conversion,
    *,
    annotations: str,
    masks: str,
    images: str,
    objects: str = "none",
    crowd: bool = False,
) -> Iterator[Recipe]:
    """Samples with a semantic mask, labels in the order of the file's categories.

    Args:
        annotations: `panoptic_*.json`.
        masks: the folder of its PNGs.
        images: the folder of the images, or several joined by `::`.
        objects: segments as objects with label, box and mask: none, things or all.
        crowd: segments of crowds as objects, too.
    """
    if objects not in OBJECTS:
        raise UserError(f"objects '{objects}' is none of {', '.join(OBJECTS)}")
    folder, folders = existing(masks, "folder of panoptic masks"), ImageFolders(images)
    content = read_json(annotations, "panoptic file")
    try:
        names = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        categories = {int(entry["id"]): entry for entry in content["categories"]}
        labels = [str(entry["name"]) for entry in categories.values()]
        things = {number: bool(entry["isthing"]) for number, entry in categories.items()}
        entries = [
            (int(entry["image_id"]), str(entry["file_name"]), [dict(info) for info in entry["segments_info"]])
            for entry in content["annotations"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{annotations} is not a COCO panoptic file ({error!r})") from error
    index = {number: place for place, number in enumerate(categories)}
    conversion.total = len(entries)
    for number, file, infos in entries:
        try:
            if number not in names:
                raise BadSample("segments of an image that the file does not list")
            segments = {}
            for info in infos:
                category = number_of(info.get("category_id"), "category")
                segment = number_of(info.get("id"), "segment")
                if category not in index:
                    raise BadSample("segment of an unknown category", str(category))
                wanted = objects == "all" or (objects == "things" and things[category])
                if wanted and info.get("iscrowd") and not crowd:
                    conversion.lose(f"{number} segment {segment}", "crowd region (crowd=true keeps it)")
                    wanted = False
                segments[segment] = (index[category], wanted)
        except BadSample as error:
            conversion.lose(str(number), error)
            continue
        arguments = (folders.named(names[number]), folder / file, labels, segments, str(number))
        yield Recipe(f"{number:012d}", sample, arguments)
