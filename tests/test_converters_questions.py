"""GQA, TextVQA and ShareGPT, laid out as their real sources are: what is written and what is named."""

import base64
import json

import pytest
from test_converters import turns
from test_write_convert import image, records, save

from vlm_adapt.errors import UserError


def gqa_entry(image_id, question, answer, **more):
    types = {"structural": "query", "semantic": "attr", "detailed": "how"}
    sentence = {"fullAnswer": f"It is {answer}."} if answer else {}
    return {"imageId": image_id, "question": question, "answer": answer, **sentence, "types": types} | more


@pytest.mark.parametrize("group", [True, False])
def test_gqa(tmp_path, group):
    entries = {
        "02930152": gqa_entry("2354786", "Is the sky dark?", "yes"),
        "07333408": gqa_entry("2375429", "What is it?", "pole"),
        "07333409": gqa_entry("2375429", "What colour?", "red", types={"structural": "choose"}),
        "05": gqa_entry("n1", "Gone?", "no"),
    }
    folder = tmp_path / "train_all_questions"
    save(folder / "train_all_questions_0.json", dict(list(entries.items())[:2]))
    save(folder / "train_all_questions_1.json", dict(list(entries.items())[2:]))
    save(folder / "test.json", {"9": {"imageId": "2354786", "question": "Unanswered?"}})
    for number in (2354786, 2375429):
        save(tmp_path / "images" / f"{number}.jpg", image("JPEG"))
    options = {"questions": folder, "images": tmp_path / "images", "group": group}
    found, done = records(tmp_path / "out", "gqa", options)
    item = {
        "id": "02930152",
        "question": "Is the sky dark?",
        "answers": ["yes"],
        "kind": "query",
        "types": {"structural": "query", "semantic": "attr", "detailed": "how"},
        "full_answer": "It is yes.",
    }
    if group:
        assert list(found) == ["2354786", "2375429"]
        assert found["2354786"] == ({"questions": [item], "id": "2354786"}, ["jpg"])
        assert [each["kind"] for each in found["2375429"][0]["questions"]] == ["query", "choose"]
    else:
        assert list(found) == ["2354786-02930152", "2375429-07333408", "2375429-07333409"]
        assert found["2354786-02930152"][0] == item
    assert done["refused"] == {"question without an answer": 1, "image file is missing": 1}
    if group:
        assert "with its 1 question(s)" in done["examples"]["image file is missing"][0]
    found, _ = records(tmp_path / "semantic", "gqa", {**options, "kind": "semantic", "group": False})
    assert [record.get("kind") for record, _ in found.values()] == ["attr", "attr", None]
    with pytest.raises(UserError, match="kind is 'colour': say structural"):
        records(tmp_path / "o2", "gqa", {**options, "kind": "colour"})


def textvqa_entry(number, image_id, question, answers, **more):
    sizes = {"image_width": 1000, "image_height": 500}
    return (
        {"question_id": number, "image_id": image_id, "question": question, "answers": answers} | sizes | more
    )


def test_textvqa(tmp_path):
    ten = ["coors"] * 8 + ["coors light", " "]
    entries = [
        textvqa_entry(1, "0054c91397f2fe05", "which brand?", ten, image_classes=["Bottle"], set_name="train"),
        textvqa_entry(2, "0054c91397f2fe05", "which year?", ["1873"] * 10),
        textvqa_entry(3, "005635e119b9f32f", "what?", ["a"] * 10, ocr_tokens=["AS", "", "T.I."]),
        textvqa_entry(4, "f", "gone?", ["a"] * 10),
    ]
    test = [{name: value for name, value in textvqa_entry(5, "x", "?", []).items() if name != "answers"}]
    box = {"top_left_x": 0.1, "top_left_y": 0.2, "width": 0.25, "height": 0.9, "rotation": 0.0}
    read = [
        {
            "image_id": "0054c91397f2fe05",
            "ocr_tokens": ["COORS"],
            "ocr_info": [{"word": "COORS", "bounding_box": box}],
        },
        {"image_id": "another", "ocr_tokens": ["no"], "ocr_info": []},
    ]
    for name in ("0054c91397f2fe05", "005635e119b9f32f"):
        save(tmp_path / "train_images" / f"{name}.jpg", image("JPEG"))
    options = {
        "questions": save(
            tmp_path / "TextVQA_0.5.1_train.json", {"dataset_name": "textvqa", "data": entries + test}
        ),
        "images": tmp_path / "train_images",
        "ocr": save(tmp_path / "TextVQA_Rosetta_OCR_v0.2_train.json", {"data": read}),
    }
    found, done = records(tmp_path / "out", "textvqa", options)
    one, two = found["0054c91397f2fe05"][0], found["005635e119b9f32f"][0]
    assert [len(question["answers"]) for question in one["questions"]] == [9, 10]
    assert one["ocr"] == [{"text": "COORS", "box": [100.0, 100.0, 350.0, 500.0]}]  # cut at the image's edge
    assert two["ocr"] == [{"text": "AS"}, {"text": "T.I."}]
    assert done["refused"] == {
        "empty answer": 1,
        "question without an answer": 1,
        "image file is missing": 1,
    }
    single, _ = records(tmp_path / "single", "textvqa", {**options, "group": "no"})
    assert list(single)[1] == "0054c91397f2fe05-2" and single["0054c91397f2fe05-2"][0]["ocr"] == one["ocr"]


def said(*parts):
    return {"role": "user", "content": list(parts)}


def test_sharegpt(tmp_path):
    picture = image("PNG")
    data = "data:image/png;base64," + base64.b64encode(picture).decode()
    part = {"type": "image_url", "image_url": {"url": data}}
    asked = said({"type": "text", "text": "What? "}, part)
    answer = {"role": "assistant", "content": "A box."}
    entries = [
        {"conversations": turns("<image>Hi", "Ho"), "images": ["a.jpg"], "system": "Be brief.", "tools": ""},
        {"messages": [asked, answer]},
        {"messages": [said({"type": "image"}, {"type": "text", "text": "?"}), answer],
         "images": [str(tmp_path / "i" / "a.jpg")]},
        {"instruction": "<image>Add", "input": "1 and 2", "output": "3", "history": [["Hi", "Ho"]],
         "images": ["a.jpg"]},
        {"messages": [{"role": "user", "content": "What is it?"}, answer], "images": ["a.jpg"], "lang": "en"},
        {"conversations": [*turns("Hi", "Ho"), {"from": "function_call", "value": "{}"}]},
        {"messages": [said({**part, "image_url": {"url": "https://x.org/a.jpg"}}), answer]},
        {"messages": [said({**part, "image_url": {"url": data[:-3]}}), answer]},
        {"conversations": turns("Hi", "Ho"), "chosen": {}},
    ]  # fmt: skip
    save(tmp_path / "i" / "a.jpg", image("JPEG"))
    options = {"conversations": save(tmp_path / "s.json", entries), "images": tmp_path / "i"}
    found, done = records(tmp_path / "out", "sharegpt", options)
    first, second, third, fourth, last = (record["messages"] for record, _ in found.values())
    assert [int(key[:8]) for key in found] == [0, 1, 2, 3, 8]
    assert first[0] == {"role": "system", "content": "Be brief."} and len(first) == 3
    assert second[0]["content"] == "What? <image>" and found["00000001-1"][1] == ["png"]
    assert third[0]["content"] == "<image>?" and found["00000002-2"][1] == ["jpg"]
    assert [turn["content"] for turn in fourth] == ["Hi", "Ho", "<image>Add\n1 and 2", "3"]
    assert [turn["role"] for turn in last] == ["user", "assistant"]
    assert sorted(done["refused"]) == [
        "a turn is spoken by none of human, gpt, system",
        "image is an address, not a file",
        "image written as text cannot be read",
        "placeholders and images differ: it has N <image> and N image(s)",
    ]
    found, _ = records(tmp_path / "inserted", "sharegpt", {**options, "insert": "true"})
    assert found["00000004-4"][0]["messages"][0]["content"] == "<image>\nWhat is it?"
    assert found["00000004-4"][0]["lang"] == "en"


def test_a_damaged_line_is_named_and_a_wrong_file_is_one_sentence(tmp_path):
    lines = [json.dumps({"conversations": turns("Hi", "Ho")}), "{broken", "", json.dumps([1])]
    file = save(tmp_path / "s.jsonl", "\n".join(lines).encode())
    found, done = records(tmp_path / "out", "sharegpt", {"conversations": file})
    assert len(found) == 1 and done["refused"] == {
        "line is not readable JSON": 1,
        "entry is not an object": 1,
    }
    assert "line 2" in done["examples"]["line is not readable JSON"][0]
    wrong = save(tmp_path / "wrong.json", {"some": "thing"})
    for name, options in {
        "gqa": {"questions": wrong, "images": tmp_path},
        "textvqa": {"questions": wrong, "images": tmp_path},
        "sharegpt": {"conversations": wrong},
        "csv_jsonl": {"source": wrong},
        "parquet": {"source": wrong},
    }.items():
        with pytest.raises(UserError, match="is not a"):
            records(tmp_path / name, name, options)
        assert not (tmp_path / name).exists()
