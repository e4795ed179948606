"""CSV, JSON lines and `datasets` folders: columns, cells of every kind, and what is refused."""

import csv
import io
import json

import pytest
from test_write_convert import image, records, save

from vlm_adapt.data.convert import parquet as parquet_rows
from vlm_adapt.data.convert.run import write_dataset
from vlm_adapt.errors import UserError

arrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def images(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        save(tmp_path / "images" / name, image("JPEG"))
    return tmp_path / "images"


def table(path, *rows, delimiter=","):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return save(path, ("\ufeff" + text.getvalue()).encode())  # as spreadsheets write it


def test_csv_by_usual_names(tmp_path, images):
    source = table(
        images / "metadata.csv",
        ["file_name", "caption", "note"],
        ["a.jpg", 'a cat,\n"sitting"', "x"],
        ["b.jpg", " ", "empty"],
        ["gone.jpg", "gone", ""],
        ["", "no image", ""],
        ["a.jpg", "short"],
        ["b.jpg", "é", ""],
    )
    found, done = records(tmp_path / "out", "csv_jsonl", {"source": source})
    assert found == {
        "00000000": ({"caption": 'a cat,\n"sitting"', "id": "00000000"}, ["jpg"]),
        "00000005": ({"caption": "é", "id": "00000005"}, ["jpg"]),
    }
    assert done["refused"] == {
        "row with another number of cells than the header": 1,
        "row says nothing": 1,
        "image file is missing": 1,
        "caption without an image": 1,
    }


def test_csv_by_named_columns(tmp_path, images):
    header = ["img", "q", "choices", "which", "sprache", "no"]
    rows = (
        ["a.jpg|b.jpg", "Same?", "no|no|yes", "compare", "de", "q.1"],
        ["a.jpg", "One?", '["a|b", ""]', "", "", "q.2"],
    )
    source = table(tmp_path / "t.tsv", header, *rows, delimiter="\t")
    options = {"source": source, "images": images, "image": "img", "question": "q", "answers": "choices"}
    options |= {"kind": "which", "lang": "sprache", "id": "no", "separator": "|"}
    found, done = records(tmp_path / "out", "csv_jsonl", options)
    first, second = found.values()
    record = {
        "question": "Same?",
        "answers": ["no", "no", "yes"],
        "kind": "compare",
        "lang": "de",
        "id": "q.1",
    }
    assert first == (record, ["0.jpg", "1.jpg"])
    assert second == ({"question": "One?", "answers": ["a|b"], "id": "q.2"}, ["jpg"])
    assert done["refused"] == {"empty answer": 1} and done["examples"]["empty answer"] == [
        "00000001 (an answer)"
    ]
    with pytest.raises(UserError, match="no column 'choise', did you mean 'choices'. it has img, q"):
        records(tmp_path / "o2", "csv_jsonl", {**options, "answers": "choise"})
    with pytest.raises(UserError, match=r"none of its columns \(img, q, choices.*say which is which"):
        records(tmp_path / "o3", "csv_jsonl", {"source": source})
    semicolons = table(tmp_path / "s.csv", ["text", "lang"], ["plain text", "en"], delimiter=";")
    found, _ = records(tmp_path / "o4", "csv_jsonl", {"source": semicolons, "delimiter": ";"}, check=False)
    assert next(iter(found.values()))[0] == {"text": "plain text", "lang": "en", "id": "00000000"}


def test_json_lines_differ_in_what_they_have(tmp_path, images):
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    lines = [
        {"image": "a.jpg", "captions": ["one", "two"]},
        {"images": ["a.jpg", "b.jpg"], "messages": messages},
        {"image": "b.jpg", "questions": [{"question": "q?", "answers": ["a"]}], "ocr": [{"text": "STOP"}]},
        {"image": "b.jpg", "question": "How many?", "answer": 3},
        {"image": "a.jpg", "messages": messages[:1]},
        {"picture": "a.jpg"},
    ]
    source = save(images / "t.jsonl", "\n".join(map(json.dumps, lines)).encode())
    found, done = records(tmp_path / "out", "csv_jsonl", {"source": source})
    one, two, three, four = found.values()
    assert one[0]["captions"] == ["one", "two"]
    assert two[0]["messages"][0]["content"] == "<image><image>\nWhat?" and two[1] == ["0.jpg", "1.jpg"]
    assert three[0]["questions"][0]["answers"] == ["a"] and three[0]["ocr"] == [{"text": "STOP"}]
    assert four[0]["answers"] == ["3"]
    assert done["refused"] == {"conversation without an answer": 1, "row says nothing": 1}
    listed = save(images / "t.json", lines[:1])
    assert len(records(tmp_path / "list", "csv_jsonl", {"source": listed})[0]) == 1


def feature_table(rows, **more):
    """A table as `datasets` writes it, with its notes about features."""
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
        **more,
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    made = arrow.Table.from_pylist(rows)
    return made.replace_schema_metadata(metadata)


def cell(number):
    return {"bytes": image("PNG", colour=(number % 256, 0, 0)), "path": f"{number}.png"}


def test_parquet(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"photo": cell(n), "label": n % 2, "caption": f"number {n}" if n != 7 else ""} for n in range(50)]
    rows[9]["photo"] = {"bytes": b"<html>", "path": None}
    for part in range(2):
        name = f"train-0000{part}-of-00002-0123456789abcdef.parquet"
        pq.write_table(feature_table(rows[25 * part : 25 * part + 25]), folder / name, row_group_size=10)
    pq.write_table(feature_table(rows[:1]), folder / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"several splits \(test, train\): say which, as in split=train"):
        records(tmp_path / "o", "parquet", {"source": tmp_path})
    monkeypatch.setattr(parquet_rows, "_BATCH", 4)
    options = {"source": tmp_path, "split": "train"}
    found, done = records(tmp_path / "out", "parquet", options, max_count=20)
    assert [record["caption"] for record, _ in found.values()] == [
        f"number {n}" for n in range(50) if n not in (7, 9)
    ]
    assert {tuple(names) for _, names in found.values()} == {("png",)}
    assert done["refused"] == {"row says nothing": 1, "not a JPEG, PNG or WebP image": 1}
    for workers in (2, 0):  # shuffled, rows are read in order and written in another
        again, shuffled = records(tmp_path / f"s{workers}", "parquet", options, shuffle=True, workers=workers)
        assert {key: again[key] for key in sorted(again)} == found and list(again) != list(found)
        assert shuffled["refused"] == done["refused"]
    named, _ = records(tmp_path / "class", "parquet", {**options, "caption": "label"})
    assert [record["caption"] for record, _ in named.values()][:3] == ["cat", "dog", "cat"]


def test_parquet_of_conversations(tmp_path):
    """The Cauldron's layout: lists of images, and texts without places for them."""
    rows = [
        {"images": [cell(1), cell(2)], "texts": [{"user": "Same?", "assistant": "No.", "source": "x"}] * 2},
        {"images": [], "texts": [{"user": "Hi", "assistant": "Ho", "source": "x"}]},
    ]
    path = tmp_path / "d" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pq.write_table(arrow.Table.from_pylist(rows), path)
    found, done = records(tmp_path / "out", "parquet", {"source": path})
    one, two = found.values()
    assert [turn["content"] for turn in one[0]["messages"]] == [
        "<image><image>\nSame?",
        "No.",
        "Same?",
        "No.",
    ]
    assert one[1] == ["0.png", "1.png"] and two[1] == [] and not done["refused"]


def test_saved_to_disk(tmp_path):
    """What `save_to_disk` writes: streams of record batches in data-*.arrow."""
    for split, count in {"train": 12, "validation": 3}.items():
        path = tmp_path / "set" / split / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True)
        made = feature_table(
            [{"image": cell(n), "question": f"{n}?", "answer": str(n)} for n in range(count)]
        )
        with arrow.OSFile(str(path), "wb") as sink, arrow.ipc.new_stream(sink, made.schema) as writer:
            writer.write_table(made, max_chunksize=5)
        save(path.parent / "state.json", {"_data_files": [{"filename": path.name}]})
    found, _ = records(tmp_path / "out", "parquet", {"source": tmp_path / "set", "split": "train"})
    assert [record["answers"] for record, _ in found.values()] == [[str(n)] for n in range(12)]
    with pytest.raises(UserError, match="no split 'dev': it has train, validation"):
        records(tmp_path / "o", "parquet", {"source": tmp_path / "set", "split": "dev"})


def test_a_damaged_parquet_file_is_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "t.parquet"
    pq.write_table(feature_table([{"image": cell(n), "caption": f"c{n}"} for n in range(9)]), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="t.parquet is not a readable parquet or arrow file"):
        write_dataset("parquet", tmp_path / "o", {"source": path}, progress=False)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install"):
        write_dataset("parquet", tmp_path / "o", {"source": path}, progress=False)
    assert not (tmp_path / "o").exists()
