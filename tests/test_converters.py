"""Each converter on a small source with something wrong in it: what it writes and what it names."""

import json
import tarfile

import pytest
from test_write_convert import image, records, save

from vlm_adapt.errors import UserError


def test_easy_vqa(tmp_path):
    root = tmp_path / "easy" / "data" / "test"
    questions = [
        ["what color?", "red", 7],
        ["a circle?", "no", 7],
        ["which shape?", "circle", 2],
        ["?", "no", 3],
    ]
    save(root / "questions.json", questions)
    for number in (2, 7):
        save(root / "images" / f"{number}.png", image())
    found, done = records(tmp_path / "out", "easy_vqa", {"folder": tmp_path / "easy", "split": "test"})
    assert list(found) == ["test-000002", "test-000007"]
    record, images = found["test-000007"]
    assert images == ["png"] and [q["kind"] for q in record["questions"]] == ["color", "yes_no"]
    assert record["questions"][0] == {
        "id": "test-0",
        "question": "what color?",
        "answers": ["red"],
        "kind": "color",
    }
    assert done["refused"] == {"image file is missing": 1}
    with pytest.raises(UserError, match="no easy-vqa split 'val'"):
        records(tmp_path / "o2", "easy_vqa", {"folder": tmp_path / "easy", "split": "val"})


@pytest.mark.parametrize("group", [True, "false"])
def test_vqav2(tmp_path, group):
    ten = [{"answer": "yes", "answer_id": n} for n in range(9)] + [{"answer": "no", "answer_id": 10}]
    asked = [{"question_id": n, "image_id": 42 if n < 3 else 43, "question": f"q{n}?"} for n in range(1, 5)]
    answered = [
        {"question_id": n, "answers": ten, "answer_type": "yes/no", "image_id": 42} for n in (1, 2, 3)
    ]
    options = {
        "questions": save(tmp_path / "q.json", {"questions": asked}),
        "annotations": save(tmp_path / "a.json", {"annotations": answered}),
        "images": tmp_path / "images",
        "group": group,
    }
    save(tmp_path / "images" / "val2014" / "COCO_val2014_000000000042.jpg", image("JPEG"))
    found, done = records(tmp_path / "out", "vqav2", options)
    item = {"id": "1", "question": "q1?", "answers": ["yes"] * 9 + ["no"], "kind": "yes/no"}
    if group is True:
        assert list(found) == ["000000000042"] and found["000000000042"][0]["questions"][0] == item
    else:
        assert list(found) == ["000000000042-1", "000000000042-2"]
        assert found["000000000042-1"] == (item, ["jpg"])
    assert done["refused"] == {"question without annotation": 1, "image file is missing": 1}


@pytest.mark.parametrize("packed", [True, False])
def test_nlvr(tmp_path, packed):
    root = tmp_path / "dev"
    lines = [
        {"identifier": "10-0", "sentence": "There is a box.", "label": "true"},
        {"identifier": "11-0", "sentence": "No box", "label": "false"},
    ]
    save(root / "dev.json", "\n".join(map(json.dumps, lines)).encode())
    for number in (0, 3):
        save(root / "images" / "1" / f"dev-10-0-{number}.png", image())
    source = root
    if packed:
        source = tmp_path / "n.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(root, "dev")
    found, done = records(tmp_path / "out", "nlvr", {"source": source})
    assert list(found) == ["dev-10-0-0", "dev-10-0-3"]
    assert found["dev-10-0-3"][0] == {
        "question": "Is it true that: There is a box?",
        "answers": ["true"],
        "statement": "There is a box.",
        "id": "dev-10-0-3",
    }
    assert done["refused"] == {"image file is missing": 1}
    chosen = {"source": source, "permutations": "3", "question": "True or false: {statement}"}
    found, _ = records(tmp_path / "one", "nlvr", chosen)
    assert [record["question"] for record, _ in found.values()] == ["True or false: There is a box"]


def turns(*texts):
    return [{"from": "gpt" if place % 2 else "human", "value": text} for place, text in enumerate(texts)]


def test_llava(tmp_path):
    entries = [
        {"id": "a.1/x", "image": "a.jpg", "conversations": turns("<image>\nWhat?", "A cat.")},
        {"id": 7, "image": ["a.jpg", "sub/b.png"], "conversations": turns("<image><image> Same?", "No.")},
        {"conversations": [{"from": "system", "value": "Be kind."}, *turns("Hello", "Hi")]},
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "a.jpg"}}, {"type": "text", "text": "So?"}]},
            {"role": "assistant", "content": "Yes"}]},
        {"id": "gone", "image": "gone.jpg", "conversations": turns("<image>", "x")},
        {"id": "two", "image": "a.jpg", "conversations": turns("<image><image>", "x")},
        {"id": "none", "conversations": turns("Hello", " ")},
        {"id": "odd", "conversations": [{"from": "bing", "value": "?"}]},
        {"id": "open", "conversations": turns("Hello")},
        "text",
    ]  # fmt: skip
    save(tmp_path / "i" / "a.jpg", image("JPEG"))
    save(tmp_path / "i" / "sub" / "b.png", image())
    options = {"conversations": save(tmp_path / "l.json", entries), "images": tmp_path / "i"}
    found, done = records(tmp_path / "out", "llava", options)
    one, two, text, parts = found.values()
    assert list(found)[:2] == ["00000000-a_1_x", "00000001-7"]
    assert one[0]["messages"] == [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A cat."},
    ]
    assert (one[1], two[1], text[1], parts[1]) == (["jpg"], ["0.jpg", "1.png"], [], ["jpg"])
    assert [message["role"] for message in text[0]["messages"]] == ["system", "user", "assistant"]
    assert parts[0]["messages"][0]["content"] == "<image>So?"
    assert sum(done["refused"].values()) == 6 and len(done["refused"]) == 6
    assert any("2 <image> and 1 image" in shown for texts in done["examples"].values() for shown in texts)
    lines = save(tmp_path / "l.jsonl", "\n".join(map(json.dumps, entries[2:3])).encode())
    assert len(records(tmp_path / "lines", "llava", {"conversations": lines})[0]) == 1
    with pytest.raises(UserError, match="say in which folder"):
        records(tmp_path / "o3", "llava", {"conversations": options["conversations"]})


@pytest.mark.parametrize("name", ["coco_captions", "vqav2", "easy_vqa", "nlvr", "llava"])
def test_a_wrong_file_is_one_sentence(tmp_path, name):
    """Each source exists and holds something else."""
    wrong = save(tmp_path / "wrong.json", {"some": "thing"})
    save(tmp_path / "f" / "train" / "questions.json", {"some": "thing"})
    save(tmp_path / "f" / "dev.json", b'{"some": "thing"}')
    options = {
        "coco_captions": {"annotations": wrong, "images": tmp_path},
        "vqav2": {"questions": wrong, "annotations": wrong, "images": tmp_path},
        "easy_vqa": {"folder": tmp_path / "f"},
        "nlvr": {"source": tmp_path / "f"},
        "llava": {"conversations": wrong},
    }[name]
    with pytest.raises(UserError, match="is not a|are not"):
        records(tmp_path / "out", name, options)
    assert not (tmp_path / "out").exists()
