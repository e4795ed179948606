"""Masks that cannot be used are refused by name, among good ones that are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from mask_files import GOOD, LABELS, VALUES, members, png, reader

from vlm_adapt.data.mask_batch import collate_masks
from vlm_adapt.data.masks import encode_mask
from vlm_adapt.data.problems import Account, BadSample

BAD = {
    "size": (members(encode_mask(VALUES.T)), "mask and image differ in size: mask 16 x 24, image 24 x 16"),
    "range": (
        members(encode_mask(np.where(VALUES == 3, 9, VALUES))),
        "mask has a value without a label: value 9 (96 pixels), there are 4 labels",
    ),
    "unused": (
        members(encode_mask(np.where(VALUES == 3, 2, VALUES))),
        "mask has a value without a label: value 2 (96 pixels), there are 4 labels",
    ),
    "ignored": (members(encode_mask(np.full_like(VALUES, 255))), "all pixels of the mask are ignored"),
    "empty": (members(GOOD, []), "labels names nothing"),
    "no names": (members(GOOD, ["", " "]), "labels names nothing"),
    "bars": (members(GOOD, ["red", "green|", "", "blue"]), "label has an empty synonym: 'green|'"),
    "no labels": (members(GOOD, None), "mask without labels: the record has text"),
    "rgb": (members(png(np.zeros((16, 24, 3), np.uint8))), "mask is RGB, it should have one channel"),
    "jpeg": (members(png(VALUES, "JPEG")), "mask is a JPEG, which changes values: store masks as PNG"),
    "cut": (members(GOOD[:-40]), "damaged mask: "),
    "short": (members(GOOD[:20]), "mask is not a PNG"),
    "nothing": (members(b""), "empty mask file"),
    "missing": (members(None), "no semantic mask: KEY.mask.png is missing"),
    "objects": (
        members(None, objects=[{"label": "red", "box": [0, 0, 4, 4], "mask": 0}])
        | {"mask.0.png": encode_mask(VALUES > 0)},
        "no semantic mask: KEY.mask.png is missing, it has 1 masks of objects",
    ),
    "two images": (
        {"0.png": tiny.image(1, 24, 16), "1.png": tiny.image(2, 24, 16), "mask.png": GOOD}
        | {"json": json.dumps({"labels": LABELS}).encode()},
        "a mask needs exactly one image: the sample has 2",
    ),
    "image": (members(GOOD) | {"png": tiny.image(1, 24, 16)[:-30]}, "damaged PNG image"),
}


def test_bad_masks_among_good_ones(tmp_path: Path) -> None:
    """Each is counted and named; the good ones beside it are in the batch."""
    names = list(BAD)
    samples = [(f"good{number}", members(GOOD)) for number in range(len(names))]
    samples = [
        pair for good, name in zip(samples, names, strict=True) for pair in (good, (name, BAD[name][0]))
    ]
    made = reader(tmp_path, samples)
    account, rows = Account(), []
    for number in range(len(made)):
        rows += made.training(number, 0, number, account)
    batch = collate_masks(rows, account.used)
    assert batch.keys == tuple(f"good{number}" for number in range(len(names)))
    assert account.refusals == len(names) and account.used == batch.samples == len(names)
    assert {key for _, key, _ in account.fresh} == set(names)
    for _, key, why in account.fresh:
        assert why.startswith(BAD[key][1]), key
        number = 2 * names.index(key) + 1
        if key != "image":
            with pytest.raises(BadSample):
                made.whole(number)
    assert account.sources["s.tar"]["tokens"] == batch.learned == len(names) * 288
