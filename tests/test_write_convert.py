"""Writers and converters: whole shards or none, in webdataset's format; nothing lost unnamed."""

import errno
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from vlm_adapt.data.convert import CONVERTERS
from vlm_adapt.data.convert.run import check_options, write_dataset
from vlm_adapt.data.index import SIDECAR
from vlm_adapt.data.inspect import contact_sheet, summary, words
from vlm_adapt.data.sample import parse_sample
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.data.write import SUMMARY, UNFINISHED, Shard, ShardWriter
from vlm_adapt.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def image(format="PNG", colour=(200, 0, 0), size=(16, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def save(path: Path, content) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(path)


def samples(count: int):
    for number in range(count):
        yield {"__key__": f"ä/{number:05d}", "0.jpg": bytes(50 + number), "json": {"caption": f"né {number}"}}


def records(folder, name: str, options, **more):
    """What a converter wrote: {key: (record, image extensions)}, and its summary."""
    done = write_dataset(name, folder, options, progress=False, **{"workers": 0, **more})
    shards = ShardSet(folder)
    assert not shards.problems and len(shards) == done["samples"]
    found = {}
    for key, members in shards:
        sample = parse_sample(key, members)
        found[key] = (sample.record, [name for name in members if name != "json"])
    return found, done


def test_webdataset_reads_what_is_written(tmp_path):
    with ShardWriter(tmp_path, max_count=4) as writer:
        for sample in samples(10):
            writer.write(sample)
        assert writer.count == 10
    names = ["000000.tar", "000001.tar", "000002.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, *(n + SIDECAR for n in names)])
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [sample["__key__"] for sample in samples(10)]
    assert [json.loads(sample["json"]) for sample in read] == [sample["json"] for sample in samples(10)]
    assert [(k, m["0.jpg"]) for k, m in ShardSet(tmp_path)] == [(s["__key__"], s["0.jpg"]) for s in read]


def test_bounded_and_the_same_bytes_every_time(tmp_path):
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name, max_bytes=8000) as writer:
            for sample in samples(12):
                writer.write(sample)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert len(first) > 2 and [a.read_bytes() for a in first] == [b.read_bytes() for b in second]
    assert all(path.stat().st_size <= 10240 for path in first)


def test_a_full_disk_leaves_whole_shards_only(tmp_path):
    writer = ShardWriter(tmp_path, max_count=3)
    with pytest.raises(UserError, match="no space left to write .*000001.tar"), writer:
        for number, sample in enumerate(samples(10)):
            if number == 5:
                writer._shard._file = _Full(writer._shard._file)
            writer.write(sample)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.tar", "000000.tar" + SIDECAR]
    assert len(ShardSet(tmp_path)) == 3


class _Full:
    """A file on a disk that has just filled up."""

    def __init__(self, file):
        self.close = file.close

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_error_midway_leaves_no_part(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path) as writer:
        writer.write(next(samples(1)))
        raise KeyError("something else")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sample, reason",
    [
        ({"__key__": "a.b", "json": {}}, "cannot be a key"),
        ({"__key__": "a/", "json": {}}, "cannot be a key"),
        ({"__key__": "ä/00000", "json": {}}, "two samples have the key"),
        ({"__key__": "a", "JPG": b""}, "lower case"),
        ({"__key__": "a"}, "no members"),
    ],
)
def test_samples_that_webdataset_would_misread_are_refused(tmp_path, sample, reason):
    with ShardWriter(tmp_path) as writer:
        writer.write(next(samples(1)))
        with pytest.raises(UserError, match=reason):
            writer.write(sample)


def test_folders_are_not_mixed(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write(next(samples(1)))
    with pytest.raises(UserError, match="already holds 1 shard"):
        ShardWriter(tmp_path)
    with ShardWriter(tmp_path, overwrite=True):
        assert not list(tmp_path.iterdir())
    save(tmp_path / "mine.tar", b"precious")
    with pytest.raises(UserError, match="other archives"):
        ShardWriter(tmp_path, overwrite=True)
    assert (tmp_path / "mine.tar").exists()


@pytest.fixture
def coco(tmp_path):
    folder = tmp_path / "coco"
    for number in (1, 2, 4):
        save(folder / "images" / f"{number:012d}.jpg", image("JPEG") if number != 4 else b"<html>")
    names = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in (1, 2, 3, 4, 5)]
    texts = [(1, "a cat"), (2, "a dog "), (1, "one cat"), (3, "gone"), (4, "html"), (2, " ")]
    captions = [{"image_id": n, "caption": text} for n, text in texts]
    return {
        "annotations": save(folder / "c.json", {"images": names, "annotations": captions}),
        "images": str(folder / "images"),
    }


def test_coco_captions(tmp_path, coco):
    found, done = records(tmp_path / "out", "coco_captions", coco)
    assert found == {
        "000000000001": ({"captions": ["a cat", "one cat"], "id": "1"}, ["jpg"]),
        "000000000002": ({"captions": ["a dog"], "id": "2"}, ["jpg"]),
    }
    assert sorted(done["refused"].values()) == [1, 1, 1, 1]  # missing, not an image, no caption, empty
    assert any("000000000003.jpg" in text for text in done["examples"]["image file is missing"])


def test_again_returns_at_once_and_anything_else_starts_anew(tmp_path, coco, monkeypatch):
    out = tmp_path / "out"
    done = write_dataset("coco_captions", out, coco, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("vlm_adapt.data.convert.run.Entries", None)
        assert write_dataset("coco_captions", out, coco, progress=False) == done
    with pytest.raises(UserError, match="already holds"):
        write_dataset("coco_captions", out, coco, limit=1, progress=False)
    with pytest.raises(UserError, match="does not exist"):  # and nothing is removed before that is known
        write_dataset("coco_captions", out, {**coco, "images": "nowhere"}, overwrite=True, progress=False)
    assert len(ShardSet(out)) == 2
    assert write_dataset("coco_captions", out, coco, limit=1, overwrite=True, progress=False)["samples"] == 1
    (out / "000000.tar").write_bytes(b"broken")
    assert write_dataset("coco_captions", out, coco, limit=1, progress=False)["samples"] == 1
    assert len(ShardSet(out)) == 1


def test_an_interrupted_conversion_is_not_read(tmp_path, coco, monkeypatch):
    out, finish = tmp_path / "out", Shard.finish

    def interrupted(self):
        finish(self)
        raise KeyboardInterrupt  # a shard has its name, but nobody has noted that its task is done

    monkeypatch.setattr(Shard, "finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset("coco_captions", out, coco, max_count=1, workers=0, progress=False)
    monkeypatch.undo()
    assert {path.name for path in out.iterdir()} == {"000000.tar", "000000.tar" + SIDECAR, UNFINISHED}
    with pytest.raises(UserError, match="not all written"):
        ShardSet(out)
    done = write_dataset("coco_captions", out, coco, max_count=1, workers=0, progress=False)
    assert done["samples"] == 2
    assert {path.name for path in out.glob("*.tar")} == {shard["name"] for shard in done["shards"]}
    assert (out / SUMMARY).exists() and not (out / UNFINISHED).exists()
    (out / done["shards"][1]["name"]).unlink()
    with pytest.raises(UserError, match="lacks 1 of its 2 shards"):
        ShardSet(out)


def test_damaged_images_are_refused_where_they_are_looked_at(tmp_path, coco):
    picture = Path(coco["images"]) / "000000000002.jpg"
    picture.write_bytes(image("JPEG", size=(64, 64))[:-200])
    assert write_dataset("coco_captions", tmp_path / "a", coco, workers=0, progress=False)["samples"] == 2
    done = write_dataset("coco_captions", tmp_path / "b", coco, check=True, workers=0, progress=False)
    assert done["samples"] == 1 and done["check"] is True
    assert [key for keys in done["examples"].values() for key in keys if key.startswith("000000000002 ")]


def test_options():
    with pytest.raises(UserError, match="unknown converter 'coco_caption', did you mean 'coco_captions'"):
        check_options("coco_caption", {})
    with pytest.raises(UserError, match="no option 'imags', did you mean 'images'"):
        check_options("coco_captions", {"imags": "x"})
    with pytest.raises(UserError, match="needs the option 'annotations'"):
        check_options("coco_captions", {"images": "x"})
    words = {"questions": "q", "annotations": "a", "images": "i"}
    assert check_options("vqav2", {**words, "group": "false"})["group"] is False
    assert all(callable(CONVERTERS.load(name)) for name in CONVERTERS)


def test_inspect(tmp_path):
    with ShardWriter(tmp_path / "s") as writer:
        two = {"0.png": image(), "1.jpg": image("JPEG", size=(300, 20))}
        writer.write({"__key__": "a", **two, "json": {"captions": ["two", "deux"]}})
        asked = [{"question": "q?", "answers": ["x", "y", "x"], "kind": "k"}] * 2
        writer.write({"__key__": "b", "png": image(), "json": {"questions": asked}})
        writer.write({"__key__": "c", "jpg": b"text", "json": {"caption": "c"}})
    shards = ShardSet(tmp_path / "s")
    figures = summary(shards)
    assert (figures["samples"], figures["images"], figures["questions"], figures["kinds"]) == (
        3,
        3,
        2,
        {"k": 2},
    )
    assert figures["images_per_sample"] == {"1": 1, "2": 1} and figures["width"]["max"] == 300
    assert figures["refused"] == {"not an image": 1} and "c" in figures["examples"]["not an image"][0]
    json.dumps(figures)
    sheet = np.asarray(Image.open(contact_sheet(shards, tmp_path / "out" / "sheet.png", count=2)))
    assert sheet.shape[1] == 2 * 228 and (sheet != 255).any()
    assert words({"questions": asked})[0] == "Q: q?  A: x / y"


@pytest.mark.skipif(not SHARED.exists(), reason="needs shared/data")
def test_real_files(tmp_path):
    folder = SHARED / "coco_mini"
    options = {
        "annotations": folder / "annotations" / "captions_val.json",
        "images": folder / "images" / "val",
    }
    found, done = records(tmp_path / "coco", "coco_captions", options)
    assert len(found) == 155 and not done["refused"]
    found, done = records(tmp_path / "nlvr", "nlvr", {"source": SHARED / "nlvr_dev.tar", "permutations": 0})
    assert len(found) == 989 and not done["refused"]
    assert re.match("Is it true that: .*[^.]\\?$", next(iter(found.values()))[0]["question"])
