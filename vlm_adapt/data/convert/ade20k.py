"""ADE20K in its scene-parsing layout of 150 classes. Zhou et al. 2017, arXiv:1608.05442."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt.data.convert.common import Conversion, Recipe, existing, safe_key
from vlm_adapt.data.convert.masks import lose_unmatched, read_pair, semantic_members
from vlm_adapt.data.masks import read_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

NAMES = "objectInfo150.txt"


def read_names(path: Path) -> list[str]:
    """The class names of `objectInfo150.txt`: the last column; of several synonyms the first, unless
    another class has it, too."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"class names of ADE20K are missing: {path} ({error})") from error
    rows = [line.split("\t") for line in lines[1:] if line.strip()]
    full = [row[-1].strip().replace(";", ",") for row in rows]
    numbers = [row[0].strip() for row in rows]
    if not full or not all(full) or numbers != [str(number) for number in range(1, len(rows) + 1)]:
        raise UserError(f"{path} is not ADE20K's table: lines of number, ratio, counts and name, by tabs")
    first = [name.split(",")[0].strip() for name in full]
    shared = Counter(first)
    return [name if shared[short] > 1 else short for name, short in zip(full, first, strict=True)]


def sample(image: Path, mask: Path, labels: list[str], identity: str) -> dict[str, Any]:
    """The recipe: 0, "other", becomes ignored, and the rest begins at 0."""
    extension, picture, data = read_pair(image, mask)
    values = read_mask(data)
    if values.dtype != np.uint8 or values.max() > len(labels):
        raise BadSample(
            "mask has a value without a label", f"value {values.max()}, the last is {len(labels)}"
        )
    return semantic_members((extension, picture), values - np.uint8(1), labels, {"id": identity})


def convert(conversion: Conversion, *, folder: str, split: str = "training") -> Iterator[Recipe]:
    """Samples with a semantic mask, in the order of the images' names.

    Args:
        folder: that of `ADEChallengeData2016`: images/, annotations/, objectInfo150.txt.
        split: `training` or `validation`.
    """
    root = existing(folder, "ADE20K folder")
    labels = read_names(root / NAMES)
    images, masks = root / "images" / split, root / "annotations" / split
    if not images.is_dir() or not masks.is_dir():
        raise UserError(
            f"{folder} has no split '{split}' in images/ and annotations/: try training, validation"
        )
    files = {path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() != ".txt"}
    names = lose_unmatched(conversion, files, (path.stem for path in masks.glob("*.png")))
    conversion.total = len(names)
    for name in names:
        yield Recipe(safe_key(name), sample, (files[name], masks / f"{name}.png", labels, name))
