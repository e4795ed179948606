"""Folders of masks of any kind, and the tables that say what their indexes or colours mean."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_convert_masks import H, W, cooked, picture, values
from test_write_convert import image, save

from vlm_adapt.data.convert.class_table import IGNORED, read_table
from vlm_adapt.data.convert.run import write_dataset
from vlm_adapt.data.masks import encode_mask, read_mask
from vlm_adapt.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"


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
        "mask has a colour without a label": 1,
        "mask of colours is partly transparent or grey": 1,
        "mask has indexes where colours were expected: give a table of indexes": 1,
    }
    assert "colour (1, 2, 3) (of 1 " in conversion.account.examples["mask has a colour without a label"][0]
    with pytest.raises(UserError, match="share a name: a suffix"):
        cooked("mask_folder", **options)
    # Images and masks side by side.
    for path in (tmp_path / "masks" / "sub").iterdir():
        path.rename(tmp_path / "images" / "sub" / path.name)
    options["masks"] = options["images"]
    found, conversion = cooked("mask_folder", mask_suffix="_L", **options)
    assert list(found) == ["sub-rgb", "sub-rgba"] and "image without a mask" not in conversion.account.refused


def test_shards_of_masks(tmp_path):
    """Cooked by the writers: what cannot be used is named, the rest is whole for lint."""
    masks = {"good": picture(values(0, 2)), "bad": picture(values(0, 3)), "turned": picture(values(0, 2).T)}
    options = folder(tmp_path / "source", b"a\nb", **masks)
    done = write_dataset("mask_folder", tmp_path / "out", options, progress=False)
    assert done["samples"] == 1 and done["refused"] == {
        "mask has a value without a label": 1,
        "mask and image differ in size": 1,
    }
    assert done["examples"]["mask and image differ in size"] == ["sub-turned (mask 12 x 16, image 16 x 12)"]
    names = [path.name for path in (tmp_path / "out").glob("*.tar")]
    with tarfile.open(tmp_path / "out" / names[0]) as archive:
        assert archive.getnames() == ["sub-good.jpg", "sub-good.json", "sub-good.mask.png"]


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
        ("t.txt", "r,g,b,name\n1 2 3\tsky\n4 5 6\t\tstreet sign"),
        ("t.csv", "name,r,g,b\nsky,1,2,3\nstreet sign,4,5,6"),
        ("t.csv", "name,index,r,g,b\nsky,9,1,2,3\nstreet sign,8,4,5,6"),
        ("t.json", '{"sky": [1, 2, 3], "street sign": [4, 5, 6]}'),
        (
            "t.json",
            '[{"name": "sky", "color": [1, 2, 3]}, {"name": "street sign", "color": [4, 5, 6]}]',
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
