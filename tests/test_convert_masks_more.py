"""Converters of masks, on small sources with faults: PASCAL VOC, COCO-Stuff, panoptic."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from test_convert_masks import H, W, cooked, picture, values
from test_write_convert import image, save

from vlm_adapt.data.masks import read_mask
from vlm_adapt.errors import UserError


def test_pascal_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    save(root / "ImageSets" / "Segmentation" / "val.txt", b"2007_1\n2007_2\n2007_3\n")
    mask = np.where(values(0, 30) > 20, 255, values(0, 30))
    boxes = "".join(
        f"<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>{x}</xmin><ymin>3</ymin>"
        f"<xmax>16.0</xmax><ymax>12</ymax></bndbox><part><name>head</name></part></object>"
        for name, hard, x in (("dog", 0, 1), ("cat", 1, 5), ("cow", 0, 40), ("cow", 0, ""))
    )
    xml = f"<annotation><size><width>{W}</width><height>{H}</height></size>{boxes}</annotation>"
    for number in (1, 2):
        save(root / "JPEGImages" / f"2007_{number}.jpg", image("JPEG"))
        save(root / "SegmentationClass" / f"2007_{number}.png", picture(mask, "P"))
    save(root / "Annotations" / "2007_1.xml", xml.encode())
    found, conversion = cooked("pascal_voc", folder=tmp_path, split="val", objects=True)
    assert list(found) == ["2007_1"]
    record = found["2007_1"]["json"]
    assert record["objects"] == [{"label": "dog", "box": [0, 2, 16, 12]}]
    assert len(record["labels"]) == 21 and record["labels"][12] == "dog"
    assert (read_mask(found["2007_1"]["mask.png"]) == mask).all()
    with Image.open(io.BytesIO(found["2007_1"]["mask.png"])) as written:
        assert written.mode == "L"
    assert conversion.account.refused == {
        "object marked as difficult (difficult=true keeps it)": 1,
        "box has no area inside its image": 1,
        "box is not four numbers": 1,
        "boxes cannot be read": 2,
    }
    found, conversion = cooked("pascal_voc", folder=root, split="val")
    assert list(found) == ["2007_1", "2007_2"] and conversion.account.refused == {"image file is missing": 1}
    with pytest.raises(UserError, match="no list 'train.txt'; splits there: val"):
        cooked("pascal_voc", folder=root)


def test_coco_stuff(tmp_path):
    root = tmp_path / "stuffthingmaps" / "train2017"
    lines = ["0: unlabeled", *(f"{n}: {'' if n == 12 else f'c{n}'}" for n in range(1, 183))]
    save(tmp_path / "labels.txt", "\n".join(lines).encode())
    mask = np.where(values(0, 180) == 11, 255, values(0, 180))
    for name, content in {"a": mask, "b": np.full((H, W), 11), "c": np.full((H, W), 182), "d": mask}.items():
        save(root / f"{name}.png", picture(content))
        if name != "d":
            save(tmp_path / "images" / f"{name}.jpg", image("JPEG"))
    found, conversion = cooked("coco_stuff", masks=root, images=tmp_path / "images")
    assert list(found) == ["a"] and found["a"]["json"]["labels"][:2] == ["c1", "c2"]
    assert found["a"]["mask.png"] == (root / "a.png").read_bytes()  # not written anew
    assert conversion.account.refused == {"mask has a value without a label": 2, "image file is missing": 1}
    examples = conversion.account.examples["mask has a value without a label"]
    assert ["value 11" in examples[0], "value 182" in examples[1]] == [True, True]
    things = save(tmp_path / "i.json", {"categories": [{"id": 1, "name": "person"}]})
    stuff = save(tmp_path / "s.json", {"categories": [{"id": n, "name": f"s{n}"} for n in range(92, 184)]})
    options = {"masks": root, "images": tmp_path / "images", "labels": f"{things}::{stuff}"}
    _, conversion = cooked("coco_stuff", **options)
    assert conversion.account.refused["mask has a value without a label"] == 3  # c2 to c90 have no name
    with pytest.raises(UserError, match="names no things or no stuff"):
        cooked("coco_stuff", **{**options, "labels": things})
    other = tmp_path / "stuff_train2017_pixelmaps"
    other.mkdir()
    with pytest.raises(UserError, match="counts classes from 92"):
        cooked("coco_stuff", **{**options, "masks": other})


def test_coco_panoptic(tmp_path):
    ids = np.zeros((H, W), np.int64)
    ids[:6, :8], ids[:6, 8:], ids[6:9] = 70_000, 5, 300
    pixels = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    infos = [
        {"id": 70_000, "category_id": 200},
        {"id": 5, "category_id": 1},
        {"id": 300, "category_id": 1, "iscrowd": 1},
    ]
    content = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(1, 6)],
        "categories": [
            {"id": 1, "name": "person", "isthing": 1},
            {"id": 200, "name": "rug", "isthing": 0},
        ],
        "annotations": [
            {"image_id": n, "file_name": f"{n}.png", "segments_info": found}
            for n, found in (
                (1, infos),
                (2, infos[:2]),
                (3, [*infos, {"id": 9, "category_id": 1}]),
                (4, [{"id": 5, "category_id": 77}]),
                (5, infos),
            )
        ],
    }
    for number in range(1, 6):
        save(tmp_path / "i" / f"{number}.jpg", image("JPEG"))
        save(tmp_path / "m" / f"{number}.png", picture(pixels, "RGB") if number < 5 else picture(ids > 0))
    options = {"masks": tmp_path / "m", "images": tmp_path / "i"}
    options["annotations"] = save(tmp_path / "p.json", content)
    found, conversion = cooked("coco_panoptic", **options)
    assert list(found) == ["000000000001"]
    members = found["000000000001"]
    assert members["json"] == {"labels": ["person", "rug"], "id": "1"}
    expected = np.where(ids == 70_000, 1, np.where(ids == 0, 255, 0))
    assert (read_mask(members["mask.png"]) == expected).all()
    assert conversion.account.refused == {
        "mask has a segment that its annotation does not list": 1,
        "annotation lists a segment that has no pixels": 1,
        "segment of an unknown category": 1,
        "panoptic mask is not RGB": 1,
    }
    found, conversion = cooked("coco_panoptic", objects="all", **options)
    members = found["000000000001"]
    assert members["json"]["objects"] == [
        {"label": "person", "box": [8, 0, 16, 6], "mask": 0},
        {"label": "rug", "box": [0, 0, 8, 6], "mask": 1},
    ]
    assert (read_mask(members["mask.1.png"]) == (ids == 70_000)).all()
    assert conversion.account.refused["crowd region (crowd=true keeps it)"] == 3
    found, _ = cooked("coco_panoptic", objects="things", crowd=True, **options)
    assert [entry["box"] for entry in found["000000000001"]["json"]["objects"]] == [
        [8, 0, 16, 6],
        [0, 6, 16, 9],
    ]
    with pytest.raises(UserError, match="is none of none, things, all"):
        cooked("coco_panoptic", objects="some", **options)
