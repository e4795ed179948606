"""`shards inspect`: masks land where they belong, and the figures of padding are those of real batches."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from PIL import Image

from vlm_adapt import cli
from vlm_adapt.config.load import validate
from vlm_adapt.data.collate import collate
from vlm_adapt.data.inspect import summary
from vlm_adapt.data.overlay import COLOURS, Palette, Pen, annotated
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.sample import parse_sample
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.data.sheet import contact_sheet, words
from vlm_adapt.report.feed import open_feed
from vlm_adapt.report.look import bucketed, lines, look, packed_share, padded_share
from vlm_adapt.report.look_chart import draw_look


def png(array: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(record: dict[str, Any], **members: bytes) -> Any:
    """A grey picture of 40 x 30 with the given record and masks (mask, mask_0, ...)."""
    grey = png(np.full((30, 40, 3), 128))
    named = {f"{name.replace('_', '.')}.png": data for name, data in members.items()}
    return parse_sample("k", {"png": grey, "json": json.dumps(record).encode(), **named})


def rgb(text: str) -> np.ndarray:
    return np.array([int(text[place : place + 2], 16) for place in (1, 3, 5)])


def test_a_class_is_coloured_where_its_mask_is() -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 20:40] = 1
    mask[20:] = 255
    street = sample({"labels": ["wall", "cat"], "caption": "x"}, mask=png(mask))
    picture, legend = annotated(street, (40, 30), Pen())
    pixels = np.asarray(picture).astype(int)
    assert pixels.shape == (30, 40, 3)
    for place, colour in (((5, 5), COLOURS[0]), ((15, 30), COLOURS[1])):
        assert np.abs(pixels[place] - (128 + (rgb(colour) - 128) * 0.45)).max() <= 1  # rounding
    assert (pixels[25, 10] == 128).all()  # ignored: nothing is drawn over it
    assert [text for _, text in legend] == ["wall 50%", "cat 17%"]


def test_expressions_and_boxes_are_drawn() -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[:, 25:] = 255
    record = {
        "referring": [{"expressions": ["the right half", "it"], "box": [25, 0, 40, 30], "mask": 0}],
        "objects": [{"label": "cup", "box": [2, 12, 12, 28]}, {"label": "cup", "box": [14, 12, 20, 28]}],
    }
    pen = Pen()
    picture, legend = annotated(sample(record, mask_0=png(mask)), (40, 30), pen)
    pixels = np.asarray(picture).astype(int)
    assert [text for _, text in legend] == ["“the right half”", "cup"]
    assert (pixels[15, 30] != 128).any() and (pixels[28, 22] == 128).all()
    assert (pixels[27, 2] == pen.palette["cup"]).all() and (pixels[20, 7] == 128).all()


def test_large_pictures_keep_their_masks_in_place() -> None:
    """Nearest neighbours of the mask are those of the picture, at any scale."""
    mask = np.zeros((30, 40), np.uint8)
    mask[7:23, 9:31] = 1
    cat = sample({"labels": ["", "cat"], "caption": "x"}, mask=png(np.where(mask, 1, 255)))
    picture, _ = annotated(cat, (400, 300), Pen())
    changed = (np.asarray(picture) != 128).any(axis=2)
    assert (changed == np.kron(mask, np.ones((10, 10))).astype(bool)).all()


def test_a_mask_of_another_size_is_told(tmp_path: Path) -> None:
    wrong = png(np.zeros((10, 10)))
    with pytest.raises(BadSample, match="differ in size"):
        annotated(sample({"labels": ["a"], "caption": "x"}, mask=wrong), (40, 30), Pen())
    grey = png(np.full((30, 40, 3), 128))
    members = {"png": grey, "json": b'{"caption": "x", "labels": ["a"]}', "mask.png": wrong}
    shard = tiny.shard(tmp_path / "a.tar", [("k", members), ("gone", {"png": grey})])
    sheet = np.asarray(Image.open(contact_sheet(ShardSet(shard), tmp_path / "a.png"))).astype(int)
    assert ((sheet[..., 0] > 150) & (sheet[..., 1] < 90)).any()  # the reason, in red


def test_colours_stay_with_their_names_and_differ() -> None:
    palette = Palette()
    first = [palette[f"class {number}"] for number in range(40)]
    assert len(set(first)) == 40 and palette["class 3"] == first[3]


def test_words_of_every_field() -> None:
    record = {"captions": ["a", "b"], "ocr": [{"text": "EXIT"}, {"text": "12"}], "text": "plain"}
    assert words(record) == ["– a", "– b", "Text in it: EXIT | 12", "plain"]


def test_summary_counts_the_new_fields(tmp_path: Path) -> None:
    record = {"objects": [{"label": "cup", "box": [0, 0, 5, 5], "mask": 0}] * 2, "ocr": [{"text": "x"}]}
    mask = png(np.zeros((20, 24)))
    members = {"png": tiny.image(0), "json": json.dumps(record).encode(), "mask.0.png": mask}
    shard = tiny.shard(tmp_path / "a.tar", [("k", members)])
    figures = summary(ShardSet(shard))
    assert figures["objects"] == 2 and figures["labels"] == {"cup": 2} and figures["ocr"] == 1
    assert figures["object_masks"] == 1 and figures["masks"] == 0


def test_useful_shares_by_hand() -> None:
    samples = [[10], [2], [10], [2]]
    assert padded_share(samples, 2) == pytest.approx(24 / 40)
    assert padded_share(samples, 1) == 1.0
    assert padded_share(bucketed(samples, 2), 2) == 1.0
    assert padded_share([[4, 2], [3]], 2) == pytest.approx(9 / 12)  # two texts of a sample are two rows
    assert packed_share([6, 4], 10) == 1.0
    assert packed_share([6], 10) == pytest.approx(0.6)


def test_packing_at_the_issues_lengths() -> None:
    """Mean 281, 95 % below 420, at most 935, in rows of 2048: at least 95 % useful."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(5.6, 0.25, 2000).clip(8, 935).astype(int).tolist()
    assert packed_share(lengths, 2048) > 0.95
    assert padded_share([[length] for length in lengths], 8) < 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    tiny.run_tree(folder)
    generator = np.random.default_rng(0)
    samples = [
        (f"s{n:03d}", {"png": tiny.image(n), "json": json.dumps({"caption": "red " * length}).encode()})
        for n, length in enumerate(generator.integers(1, 60, 40).tolist())
    ]
    tiny.shard(folder / "some.tar", [*samples, ("torn", {"png": b"x", "json": b'{"caption": "x"}'})])
    return folder


def test_lengths_are_those_of_the_batches(folder: Path) -> None:
    run = validate(tiny.run_tree(folder), "x")
    feed = open_feed(run, [str(folder / "some.tar")])
    found = look(feed, 1000)
    assert found.account.read == 41 and sum(found.account.refused.values()) == 1
    assert len(found.lengths) == len(found.sizes) == 40 and set(found.images) == {4}
    rows = [feed.reader.training(number, 0, number, Account()) for number in range(40)]
    assert sorted(found.lengths) == sorted(len(row) for texts in rows for row in texts)
    in_order = [[len(row) for row in texts] for texts in rows]
    batches = [
        collate([row for texts in rows[first : first + 4] for row in texts], **feed.assembled.collate_options)
        for first in range(0, 40, 4)
    ]
    useful = sum(batch.tokens for batch in batches) / sum(batch.ids_BT.numel() for batch in batches)
    assert padded_share(in_order, 4) == pytest.approx(useful)
    assert found.useful["padded"] < found.useful["bucketed"] <= 1
    told = dict(lines(feed, found))
    assert "batches of 4" in told["padded"] and "as this run does" in told["padded"]
    assert told["looked at"].startswith("41 samples: 40 used") and told["image tokens"].startswith("min 4")


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_picture_is_written(folder: Path, tmp_path: Path, suffix: str) -> None:
    feed = open_feed(validate(tiny.run_tree(folder), "x"), [str(folder / "some.tar")])
    path = draw_look(look(feed, 10), tmp_path / "deep" / f"a.{suffix}", (16, 16), 256, "padded")
    assert path.stat().st_size > 2000


def test_the_verb_draws_both_pictures(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny.run_tree(folder)), encoding="utf-8")
    sheet = tmp_path / "sheet.png"
    arguments = [str(folder / "some.tar"), "--config", str(folder / "run.yaml"), "--output", str(sheet)]
    assert cli.main(["shards", "inspect", *arguments, "--encoded", "20"]) == 0
    out = capsys.readouterr().out
    assert "packing saves" in out and "text tokens" in out and "refused 1 x not an image: torn" in out
    for path in (sheet, tmp_path / "sheet-lengths.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and f"picture: {path}" in out
    assert cli.main(["shards", "inspect", str(folder / "some.tar"), "--config", "gone.yaml"]) == 2
