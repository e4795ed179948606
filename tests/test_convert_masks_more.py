"""Converters of masks, on small sources: PASCAL VOC, COCO-Stuff, panoptic, and folders of any kind."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_convert_masks import H, W, cooked, picture, values
from test_write_convert import image, save

from vlm_adapt.data.convert.class_table import IGNORED, read_table
from vlm_adapt.data.masks import encode_mask, read_mask
from vlm_adapt.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"


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


def folder(root: Path, table: bytes, name="classes.txt", suffix="", **masks: bytes) -> dict[str, str]:
    for key, mask in masks.items():
        save(root / "images" / "sub" / f"{key}.jpg", image("JPEG"))
        save(root / "masks" / "sub" / f"{key}{suffix}.png", mask)
    labels = save(root / name, table)
    return {"images": str(root / "images"), "masks": str(root / "masks"), "labels": labels}


def test_mask_folder_of_indexes(tmp_path):
    mask, wide = values(0, 4), values(0, 4) + (values(0, 4) == 3) * 65532
    options = folder(
        tmp_path,
        b"# of the scene\n0 sky\n1: street sign\n2 car\n3 void\n",
        grey=picture(mask),
        palette=picture(mask, "P"),
        deep=encode_mask(wide, 300),
        more=picture(values(0, 6)),
        colours=image(),
        turned=picture(mask.T),
        void=picture(np.full((H, W), 3)),
        noise=b"text",
    )
    found, conversion = cooked("mask_folder", ignore="void", **options)
    assert list(found) == ["sub-deep", "sub-grey", "sub-palette"]
    expected = np.where(mask == 3, 255, mask)
    for members in found.values():
        assert members["json"]["labels"] == ["sky", "street sign", "car"]
        assert (read_mask(members["mask.png"]) == expected).all()
        assert read_mask(members["mask.png"]).dtype == np.uint8
    assert conversion.account.refused == {
        "mask has a value without a label": 1,
        "mask has colours where indexes were expected: give a table of colours": 1,
        "mask and image differ in size": 1,
        "all pixels of the mask are ignored": 1,
        "mask is not a PNG": 1,
    }
    found, _ = cooked("mask_folder", **options)
    assert found["sub-grey"]["mask.png"] == (tmp_path / "masks" / "sub" / "grey.png").read_bytes()
    many = "\n".join(f"{n} c{n}" for n in range(300)).encode()
    options["labels"] = save(tmp_path / "many.txt", many)
    found, _ = cooked("mask_folder", **options)
    assert read_mask(found["sub-deep"]["mask.png"]).tolist() == wide.tolist()
    assert read_mask(found["sub-grey"]["mask.png"]).dtype == np.uint16  # 255 may be a label now


def test_mask_folder_of_colours(tmp_path):
    colours = np.array([[128, 0, 0], [0, 128, 64], [128, 0, 192], [0, 0, 0]], np.uint8)
    mask = values(0, 4)
    odd = colours[mask].copy()
    odd[2, 3] = 1, 2, 3
    clear = np.dstack([colours[mask], np.full((H, W), 255)])
    half = np.dstack([colours[mask], np.full((H, W), 128)])
    options = folder(
        tmp_path,
        b"128 0 0\t\tBuilding\n0 128 64\t\tBicyclist\n128 0 192\t\tBuilding\n0 0 0\t\tVoid\n",
        suffix="_L",
        rgb=picture(colours[mask], "RGB"),
        rgba=picture(clear, "RGBA"),
        half=picture(half, "RGBA"),
        odd=picture(odd, "RGB"),
        index=picture(mask, "P"),
    )
    found, conversion = cooked("mask_folder", mask_suffix="_L", ignore="0,0,0", **options)
    assert list(found) == ["sub-rgb", "sub-rgba"]
    for members in found.values():
        assert members["json"]["labels"] == ["Building", "Bicyclist"]
        assert (read_mask(members["mask.png"]) == np.array([0, 1, 0, 255])[mask]).all()
    assert conversion.account.refused == {
        "mask has a value without a label": 1,
        "mask of colours is partly transparent or grey": 1,
        "mask has indexes where colours were expected: give a table of indexes": 1,
    }
    assert "(1, 2, 3) (1 such" in conversion.account.examples["mask has a value without a label"][0]
    with pytest.raises(UserError, match="share a name: a suffix"):
        cooked("mask_folder", **options)
    # Images and masks side by side.
    for path in (tmp_path / "masks" / "sub").iterdir():
        path.rename(tmp_path / "images" / "sub" / path.name)
    options["masks"] = options["images"]
    found, conversion = cooked("mask_folder", mask_suffix="_L", **options)
    assert list(found) == ["sub-rgb", "sub-rgba"] and "image without a mask" not in conversion.account.refused


def test_images_turned_by_their_exif(tmp_path):
    options = folder(tmp_path, b"a\nb", upright=picture(values(0, 2).T), lying=picture(values(0, 2)))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("upright", "lying"):
        path = tmp_path / "images" / "sub" / f"{name}.jpg"
        Image.open(path).save(path, exif=exif)
    found, conversion = cooked("mask_folder", **options)
    assert list(found) == ["sub-upright"]
    assert conversion.account.refused == {"mask and image differ in size": 1}


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.txt", "sky 0\nstreet sign 2"),
        ("t.csv", "name,index\nsky,0\nstreet sign,2"),
        ("t.csv", "id;name;extra\n0;sky;x\n2;street sign;y"),
        ("t.csv", "0,sky\n2,street sign"),
        ("t.json", '{"sky": 0, "street sign": 2}'),
        ("t.json", '{"0": "sky", "2": "street sign"}'),
        ("t.json", '["sky", "", "street sign"]'.replace('"", ', '"x", ')),
        ("t.json", '{"classes": [{"name": "sky", "id": 0}, {"name": "street sign", "index": 2}]}'),
        ("t.yaml", "train: {a: b}\nclasses:\n  0: sky\n  2: street sign\n"),
    ],
)
def test_tables_of_indexes(tmp_path, name, content):
    table = read_table(save(tmp_path / name, content.encode()), "x" if '"x"' in content else "")
    assert table.labels == ["sky", "", "street sign"] and not table.coloured
    assert {key: value for key, value in table.lookup.items() if value != IGNORED} == {0: 0, 2: 2}


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.txt", "sky 1 2 3\nstreet sign 4 5 6"),
        ("t.txt", "1 2 3 sky\n4 5 6 street sign"),
        ("t.csv", "name,r,g,b\nsky,1,2,3\nstreet sign,4,5,6"),
        ("t.csv", "name,index,r,g,b\nsky,9,1,2,3\nstreet sign,8,4,5,6"),
        ("t.json", '{"sky": [1, 2, 3], "street sign": [4, 5, 6]}'),
        (
            "t.json",
            '[{"name": "sky", "id": 7, "color": [1, 2, 3]}, {"name": "street sign", "color": [4, 5, 6]}]',
        ),
    ],
)
def test_tables_of_colours(tmp_path, name, content):
    table = read_table(save(tmp_path / name, content.encode()))
    assert table.labels == ["sky", "street sign"] and table.coloured
    assert table.lookup == {(1, 2, 3): 0, (4, 5, 6): 1}


def test_tables_that_are_renumbered_or_refused(tmp_path):
    table = read_table(save(tmp_path / "t.json", {"background": 0, "object": 255}))
    assert table.labels == ["background", "object"] and table.lookup == {0: 0, 255: 1}
    merged = read_table(save(tmp_path / "m.txt", b"road 0\ncar 1\nroad 2\n"))
    assert merged.labels == ["road", "car"] and merged.lookup == {0: 0, 1: 1, 2: 0}
    for name, content, why in (
        ("a.txt", b"1 lane 2", "not one name and its numbers"),
        ("b.txt", b"sky 0\nsea 0", "0 is both 'sky' and 'sea'"),
        ("c.txt", b"sky 0\nsea 1 2 3", "some classes have an index, some a colour"),
        ("d.txt", b"", "no classes"),
        ("e.txt", b"sky 1 2", "neither an index nor a colour"),
        ("f.txt", b"sky 1 2 300", "neither an index nor a colour"),
        ("g.json", b"{", "cannot be used"),
        ("h.yaml", b"a: [", "cannot be used"),
        ("i.json", b'[{"name": "x"}]', "cannot be used"),
    ):
        with pytest.raises(UserError, match=why):
            read_table(save(tmp_path / name, content))
    names = save(tmp_path / "n.txt", b"sky\nsea")
    for ignore in ("see", "0,0,0", "99999"):
        with pytest.raises(UserError, match=f"ignore '{ignore}' is neither a class nor an index"):
            read_table(names, ignore)
    with pytest.raises(UserError, match="no class that is not ignored"):
        read_table(names, "sky::1")


@pytest.mark.skipif(not SHARED.exists(), reason="no shared data")
def test_camvid(tmp_path):
    names = "sky building pole road pavement tree sign fence car pedestrian bicyclist unlabelled".split()
    options = {name: SHARED / "camvid" / place for name, place in (("images", "val"), ("masks", "val_masks"))}
    table = save(tmp_path / "classes.json", json.dumps(names).encode())
    found, conversion = cooked("mask_folder", labels=table, ignore="unlabelled", **options)
    assert len(found) == conversion.total == 101 and not conversion.account.refused
    for key, members in found.items():
        stored = np.asarray(Image.open(SHARED / "camvid" / "val_masks" / f"{key}.png"))
        assert (read_mask(members["mask.png"]) == np.where(stored == 11, 255, stored)).all()
