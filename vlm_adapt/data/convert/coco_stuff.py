"""COCO-Stuff's pixel maps of things and stuff, 182 classes. Caesar et al. 2018, arXiv:1612.03716."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vlm_adapt.data.convert.common import (
    Conversion,
    ImageFolders,
    Recipe,
    existing,
    read_json,
    safe_key,
    several,
)
from vlm_adapt.data.convert.masks import index_sample
from vlm_adapt.errors import UserError

CLASSES = 182


def read_labels(paths: str) -> list[str]:
    """The names of the classes, index = value in a map, which is COCO's category number less one.

    Args:
        paths: `labels.txt` ("1: person"), or the instances and the stuff JSON joined by `::`, whose
            categories lack eleven numbers; these have no name here.
    """
    names: dict[int, str] = {}
    for path in several(paths):
        if path.endswith(".json"):
            content = read_json(path, "category file")
            try:
                names |= {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path} has no COCO categories ({error!r})") from error
            continue
        try:
            lines = existing(path, "label file").read_text(encoding="utf-8").splitlines()
            for line in filter(None, map(str.strip, lines)):
                number, _, name = line.partition(":")
                names[int(number)] = name.strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a label file of lines '1: person' ({error})") from error
    labels = [names.get(number, "") for number in range(1, CLASSES + 1)]
    if not any(labels[:91]) or not any(labels[91:]):
        raise UserError(
            f"{paths} names no things or no stuff: give labels.txt, or both JSON files joined by ::"
        )
    return labels


def _find_labels(folder: Path) -> str:
    places = (folder, *folder.resolve().parents[:2])
    for place in places:
        if (place / "labels.txt").is_file():
            return str(place / "labels.txt")
    raise UserError(f"no labels.txt in {folder} or the two folders above it: say labels=...")


def convert(conversion: Conversion, *, masks: str, images: str, labels: str = "") -> Iterator[Recipe]:
    """Samples with a semantic mask of 182 labels, in the order of the maps' names.

    Args:
        masks: a folder of `stuffthingmaps_trainval2017` (values 0 to 181, 255 unlabeled).
        images: the folder of the images, or several joined by `::`.
        labels: `labels.txt`, or the instances and the stuff JSON joined by `::`; if left out, labels.txt
            is looked for in the folder of the maps and the two above.
    """
    folder = existing(masks, "folder of pixel maps")
    if re.fullmatch(r"stuff_\w+_pixelmaps", folder.resolve().name):
        raise UserError(f"{masks} counts classes from 92 and has no things: use stuffthingmaps_trainval2017")
    names = read_labels(labels or _find_labels(folder))
    folders = ImageFolders(images)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".png")
    conversion.total = len(files)
    for path in files:
        yield Recipe(
            safe_key(path.stem), index_sample, (folders.named(f"{path.stem}.jpg"), path, names, path.stem)
        )
