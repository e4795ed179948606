"""Each converter of masks and boxes on a small source with something wrong in it."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_write_convert import image, save

from vlm_adapt.data.convert import CONVERTERS
from vlm_adapt.data.convert.common import Conversion, Recipe
from vlm_adapt.data.convert.plain_pickle import read_pickle
from vlm_adapt.data.masks import read_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

W, H = 16, 12  # of test_write_convert.image


def cooked(name: str, **options: Any) -> tuple[dict[str, dict[str, Any]], Conversion]:
    """What a converter makes: {key: members}, and its account."""
    conversion = Conversion()
    found = {}
    options = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    for recipe in CONVERTERS.load(name)(conversion, **options):
        assert isinstance(recipe, Recipe) and recipe.key not in found
        recipe = pickle.loads(pickle.dumps(recipe))  # as it reaches a writer
        try:
            members = dict(recipe.function(*recipe.arguments))
        except BadSample as error:
            conversion.lose(recipe.key, error)
            continue
        members["json"] = json.loads(json.dumps(members["json"]))
        found[recipe.key] = members
    return found, conversion


def values(low: int, high: int, shape=(H, W)) -> np.ndarray:
    return np.random.default_rng(low).integers(low, high, shape)


def picture(mask_HW: np.ndarray, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    made = Image.fromarray(np.asarray(mask_HW, np.uint8), mode)
    if mode == "P":
        made.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    made.save(buffer, "PNG")
    return buffer.getvalue()


def instances(path: Path, **more: Any) -> dict[str, Any]:
    """Three images with objects, good and bad, and the options that name them."""
    square = [[2, 1, 10, 1, 10, 7, 2, 7]]
    runs = {"size": [H, W], "counts": [0, H * 2, H * (W - 2)]}

    def entry(number, image, segmentation, box, **extra):
        return {
            "id": number, "image_id": image, "category_id": 7, "bbox": box, "iscrowd": 0,
            "segmentation": segmentation, **extra,
        }  # fmt: skip

    content = {
        "images": [
            {"id": n, "file_name": f"{n:012d}.jpg", "height": H + (n == 3), "width": W} for n in range(1, 5)
        ],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            entry(10, 1, square, [2, 1, 8.333333, 6]),
            entry(11, 1, runs, [-4, 0, 6, 400], category_id=9),
            entry(12, 1, square, [20, 1, 4, 4]),  # outside
            entry(13, 1, [[5, 5, 5.1, 5, 5, 5.1]], [5, 5, 1, 1]),  # covers no pixel
            entry(14, 1, runs, [0, 0, 2, 12], iscrowd=1),
            entry(15, 1, square, [1, 1, 2, float("nan")]),
            entry(16, 1, square, [1, 1, 2, 2], category_id=3),
            entry(30, 3, square, [2, 1, 8, 6]),  # its image is of another size
            entry(40, 4, square, [2, 1, 8, 6]),  # its image is missing
            entry(50, 5, square, [2, 1, 8, 6]),
        ],
    }
    for number in (1, 2, 3):
        save(path / "images" / f"{number:012d}.jpg", image("JPEG"))
    return {"annotations": save(path / "instances.json", content), "images": path / "images", **more}


def test_coco_detection(tmp_path):
    found, conversion = cooked("coco_detection", **instances(tmp_path))
    assert list(found) == ["000000000001"] and set(found["000000000001"]) == {"jpg", "json"}
    assert found["000000000001"]["json"] == {
        "objects": [
            {"label": "cat", "box": [2, 1, 10.33, 7]},
            {"label": "dog", "box": [0, 0, 2, 12]},
            {"label": "cat", "box": [5, 5, 6, 6]},
        ],
        "id": "1",
    }
    assert conversion.total == 4 and conversion.account.refused == {
        "objects of an image that the file does not list": 1,
        "box has no area inside its image": 1,
        "crowd region (crowd=true keeps it)": 1,
        "box is not four numbers": 1,
        "object of an unknown category": 1,
        "image without objects": 1,
        "annotations and image differ in size": 1,
        "image file is missing": 1,
    }
    assert conversion.account.examples["box has no area inside its image"][0].startswith("1 object 12 (")
    found, conversion = cooked("coco_detection", **instances(tmp_path, masks=True, crowd=True))
    members = found["000000000001"]
    assert [entry.get("mask") for entry in members["json"]["objects"]] == [0, 1, 2]
    square = np.zeros((H, W), bool)
    square[1:7, 2:10] = True
    masks = [read_mask(members[f"mask.{number}.png"]) for number in range(3)]
    assert (masks[0] == square).all() and (masks[1] == masks[2]).all()
    assert masks[1][:, :2].all() and not masks[1][:, 2:].any()
    assert conversion.account.refused["mask has no pixels"] == 1
    with pytest.raises(UserError, match="is not a COCO instances file"):
        cooked("coco_detection", annotations=save(tmp_path / "x.json", []), images=tmp_path)


def references() -> list[dict[str, Any]]:
    def entry(number, image, annotation, split, *texts):
        sentences = [{"sent": text, "raw": f"{text}!", "tokens": text.split()} for text in texts]
        return {
            "ref_id": number, "image_id": image, "ann_id": annotation, "split": split, "category_id": 7,
            "sentences": sentences, "file_name": "COCO_train2014_000000000001_1.jpg",
        }  # fmt: skip

    return [
        entry(1, 1, 11, "val", "left dog"),
        entry(2, 1, 10, "val", "the cat", "cat that sits", " "),
        entry(3, 1, 11, "val", "chien à gauche"),
        entry(4, 1, 10, "train", "a cat"),
        entry(5, 1, 13, "val", "tiny"),
        entry(6, 1, 99, "val", "gone"),
        entry(7, 9, 10, "val", "elsewhere"),
        entry(8, 1, [10, 11], "val", "both"),
        entry(9, 1, 10, "val", ""),
        entry(10, 4, 40, "val", "missing"),
        entry(11, 3, 30, "val", "another size"),
        entry(12, 1, 30, "val", "an object of another image"),
    ]


@pytest.mark.parametrize("protocol", [None, 0, 2, 4])
def test_refcoco(tmp_path, protocol):
    options = instances(tmp_path)
    options["instances"] = options.pop("annotations")
    content = references() if protocol is None else pickle.dumps(references(), protocol)
    options["refs"] = save(tmp_path / "refs(unc).p", content)
    found, conversion = cooked("refcoco", split="val", **options)
    assert list(found) == ["000000000001"]
    members = found["000000000001"]
    assert set(members) == {"jpg", "json", "mask.0.png", "mask.1.png"}
    box = [0, 0, 2, 12]
    assert members["json"] == {
        "referring": [
            {"expressions": ["left dog"], "box": box, "mask": 0, "id": "1"},
            {"expressions": ["the cat", "cat that sits"], "box": [2, 1, 10.33, 7], "mask": 1, "id": "2"},
            {"expressions": ["chien à gauche"], "box": box, "mask": 0, "id": "3"},
        ],
        "id": "1",
    }
    assert read_mask(members["mask.0.png"]).sum() == 2 * H and read_mask(members["mask.1.png"]).sum() == 48
    assert conversion.account.refused == {
        "empty expression": 2,
        "mask has no pixels": 1,
        "reference to an object that the instances do not list": 2,
        "reference in an image that the instances do not list": 1,
        "reference to none or several objects": 1,
        "reference without an expression": 1,
        "image file is missing": 1,
        "annotations and image differ in size": 1,
    }
    found, _ = cooked("refcoco", wording="raw", **options)
    assert found["000000000001"]["json"]["referring"][0]["expressions"] == ["a cat!"]
    with pytest.raises(UserError, match="no split 'testA': it has train, val"):
        cooked("refcoco", split="testA", **options)
    with pytest.raises(UserError, match="neither of sent, raw"):
        cooked("refcoco", wording="tokens", **options)


class Hostile:
    """A pickle that would write a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_run_nothing(tmp_path):
    for number, content in enumerate(
        (
            pickle.dumps([Hostile(tmp_path / "touched")]),
            b"cos\nsystem\n(S'touch touched'\ntR.",
            b"c__builtin__\neval\n(S'1'\ntR.",
            b"c_codecs\nencode\n(Vabc\nVzlib_codec\ntR.",
            pickle.dumps(references())[:50],
            b"\x80\x02}q\x00",
            b"\x80\x04\x8c\x08builtins\x8c\x13list.__subclasses__\x93)R.",
        )
    ):
        path = save(tmp_path / f"{number}.p", content)
        with pytest.raises(UserError, match="is not a pickle of plain lists.* nothing in it was run"):
            read_pickle(path, "refs file")
    assert not (tmp_path / "touched").exists()
    # What Python 2 writes: byte texts, also of latin-1, unicode, long numbers, sets.
    old = b"(dp0\nS'raw'\np1\nS'caf\\xe9'\np2\nsS'id'\np3\nL42L\nsVuni\np4\nc__builtin__\nset\n((lp5\nI1\natR"
    assert read_pickle(save(tmp_path / "old.p", old + b"s."), "refs") == {"raw": "café", "id": 42, "uni": {1}}
    new = save(tmp_path / "new.p", pickle.dumps([b"caf\xe9"], 2))
    assert read_pickle(new, "refs") == ["café".encode("latin-1")]


def ade(root: Path) -> Path:
    names = ["wall", "building, edifice", "screen, door", "screen, crt"]
    table = "Idx\tRatio\tTrain\tVal\tName\n" + "".join(
        f"{n}\t0.1\t10\t1\t{name}\n" for n, name in enumerate(names, 1)
    )
    save(root / "objectInfo150.txt", table.encode())
    for name, mask in {
        "A_1": values(0, 5),
        "A_2": values(0, 6),  # 5 has no name
        "A_3": np.zeros((H, W)),
        "A_4": values(0, 5, (H, W - 1)),
    }.items():
        save(root / "annotations" / "training" / f"{name}.png", picture(mask))
    save(root / "annotations" / "training" / "A_5.png", image())
    save(root / "annotations" / "training" / "A_6.png", picture(values(0, 5)))
    for number in (1, 2, 3, 4, 5, 7):
        save(root / "images" / "training" / f"A_{number}.jpg", image("JPEG"))
    return root


def test_ade20k(tmp_path):
    found, conversion = cooked("ade20k", folder=ade(tmp_path))
    assert list(found) == ["A_1"]
    names = ["wall", "building", "screen, door", "screen, crt"]
    assert found["A_1"]["json"] == {"labels": names, "id": "A_1"}
    expected = values(0, 5) - 1
    assert (read_mask(found["A_1"]["mask.png"]) == np.where(expected < 0, 255, expected)).all()
    assert conversion.account.refused == {
        "image without a mask": 1,
        "mask without an image": 1,
        "mask has a value without a label": 1,
        "all pixels of the mask are ignored": 1,
        "mask and image differ in size": 1,
        "mask is RGB, it should have one channel whose values are class numbers": 1,
    }
    assert "value 5" in conversion.account.examples["mask has a value without a label"][0]
    with pytest.raises(UserError, match="no split 'val'.*try training, validation"):
        cooked("ade20k", folder=tmp_path, split="val")
    with pytest.raises(UserError, match="class names of ADE20K are missing"):
        cooked("ade20k", folder=tmp_path / "images")
