"""Referring masks from NLVR's drawings: each grey box is a sample; what is referred to is colours and shapes.

NLVR (Suhr et al. 2017, aclanthology.org/P17-2034) says of every object where it lies, how large it is, its
shape and its colour: a pixel is an object's if it lies in the object's square and has its colour. Statements
are not used. Boxes of one statement stay on one side of the split.

    python scripts/nlvr_masks.py path/to/nlvr/dev data/nlvr-masks     # dev holds dev.json and images/
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_adapt.data.masks import encode_mask

COLOURS = {"Yellow": "yellow", "Black": "black", "#0099ff": "blue"}
VALUES = {"Yellow": (255, 255, 0), "Black": (0, 0, 0), "#0099ff": (0, 153, 255)}
BOX, STRIDE = 100, 150  # pixels of a box, and from one to the next
NEAR = 60  # of a colour, in each channel: edges are blended
HELD_OUT = 10  # every tenth statement


def samples(folder: Path) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """(number of the statement, key, members) of every box that shows two kinds of object at least."""
    lines = (folder / "dev.json").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(filter(str.strip, lines)):
        record = json.loads(line)
        name = f"dev-{record['identifier']}-0.png"
        path = folder / "images" / record["directory"] / name
        pixels_HWC = np.asarray(Image.open(path).convert("RGB"))
        for place, objects in enumerate(record["structured_rep"]):
            box_HWC = pixels_HWC[:BOX, place * STRIDE : place * STRIDE + BOX]
            members = _members(box_HWC, objects)
            if members is not None:
                yield number, f"{record['identifier']}-{place}", members


def _members(box_HWC: np.ndarray, objects: list[dict[str, Any]]) -> dict[str, bytes] | None:
    masks: dict[str, np.ndarray] = {}
    for thing in objects:
        colour = COLOURS[thing["color"]]
        inside_HW = np.zeros(box_HWC.shape[:2], bool)
        top, left, size = thing["y_loc"], thing["x_loc"], thing["size"]
        inside_HW[top : top + size, left : left + size] = True
        inside_HW &= (np.abs(box_HWC.astype(int) - VALUES[thing["color"]]) < NEAR).all(2)
        for name in (f"{colour} objects", f"{colour} {thing['type']}s"):
            masks[name] = masks.get(name, np.zeros_like(inside_HW)) | inside_HW
    if len({name for name in masks if not name.endswith("objects")}) < 2:
        return None
    buffer = io.BytesIO()
    Image.fromarray(box_HWC).save(buffer, "PNG")
    entries = [{"expressions": [f"the {name}"], "mask": place} for place, name in enumerate(masks)]
    members = {"png": buffer.getvalue(), "json": json.dumps({"referring": entries}).encode()}
    return members | {f"mask.{place}.png": encode_mask(one) for place, one in enumerate(masks.values())}


def main(source: str, target: str) -> None:
    """Write `TARGET/train/000000.tar` and `TARGET/test/000000.tar`."""
    counts = {"train": 0, "test": 0}
    writers = {}
    for split in counts:
        path = Path(target) / split / "000000.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[split] = tarfile.open(path, "w")  # noqa: SIM115
    for number, key, members in samples(Path(source)):
        split = "train" if number % HELD_OUT else "test"
        counts[split] += 1
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            writers[split].addfile(info, io.BytesIO(data))
    for writer in writers.values():
        writer.close()
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:3])
