"""Captions, questions, split captions and OCR become what their papers say, in any language."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from vlm_adapt.config import schema
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks.languages import units
from vlm_adapt.data.tasks.task import make_task

CAPTIONS = {"captions": ["two cats on a sofa", "cats"], "id": 7, "kind": "indoor"}
QUESTIONS = {
    "questions": [
        {"question": "what is it?", "answers": ["a dog", "a cat", "a cat"], "kind": "what", "id": "q1"},
        {"question": "how many?", "answer": "two"},
        {"question": "which animal?", "answer": "a cat"},
    ]
}
RECORDS = {
    "caption": CAPTIONS,
    "split_cap": CAPTIONS,
    "vqa": QUESTIONS,
    "vqg": QUESTIONS,
    "ocr": {"ocr": [{"text": "STOP"}, {"text": " all way "}, {"text": "25"}], "lang": "fr"},
    "object_aware": {
        "objects": [{"label": name, "box": [1, 2, 3, 4]} for name in ("cat", "dog", "cat")],
        "labels": ["cat", "dog", "bus", "tree", "boat"],
    },
    "detection": {"objects": [{"label": name, "box": [1, 2, 3, 4]} for name in ("cat", "dog", "cat")]},
    "span_corruption": {"text": " ".join(f"word{n}" for n in range(40))},
}
SIZES = ((20, 10),)


def task(name: str, **settings: Any) -> Any:
    return make_task(schema.Task(name=name, **settings))


def train(name: str, record: Any, seed: int = 0, **settings: Any) -> Any:
    return task(name, **settings).training(record, np.random.default_rng(seed), SIZES)


@pytest.mark.parametrize("name", RECORDS)
def test_draws_are_the_generators(name: str) -> None:
    """One seed, one result; evaluation is the same every time; what is not the task's is carried on."""
    record = RECORDS[name] | {"state": [1.0], "id": 7}
    made = task(name)
    first, again = (made.training(record, np.random.default_rng(5), SIZES) for _ in range(2))
    assert first == again
    assert made.evaluation(record, SIZES) == made.evaluation(dict(record), SIZES)
    assert first.record["state"] == [1.0] and first.record["id"] == 7
    if name in ("split_cap", "object_aware", "detection", "span_corruption"):
        seen = {str(made.training(record, np.random.default_rng(seed), SIZES)) for seed in range(20)}
        assert len(seen) > 1


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_without_what_is_needed_is_refused(name: str) -> None:
    with pytest.raises(BadSample, match=f"the task '{name}' needs .*: the record has messages, id"):
        train(name, {"messages": [], "id": 7})


def test_caption() -> None:
    told = train("caption", CAPTIONS)
    assert told.record == {"captions": CAPTIONS["captions"], "id": 7, "kind": "indoor"}
    assert told.prompt == "Generate the alt_text in en at 0:"
    assert train("caption", CAPTIONS | {"lang": "de"}, style="paligemma").prompt == "caption de"
    assert train("caption", {"caption": "a"}, lang="EN", prompt="{language} ({lang}) {{}}").prompt == (
        "English (EN) {}"
    )
    assert train("caption", {"caption": "a"}).record == {"captions": ["a"]}


@pytest.mark.parametrize(
    ("lang", "name"), [("zh", "Chinese"), ("zh-Hans", "Chinese"), ("pt_BR", "Portuguese"), ("iw", "Hebrew")]
)
def test_languages(lang: str, name: str) -> None:
    told = train("caption", {"caption": "a", "lang": lang}, prompt="Describe it in {language}:")
    assert told.prompt == f"Describe it in {name}:"


def test_an_unknown_language() -> None:
    record = {"caption": "a", "lang": "tlh"}
    assert train("caption", record).prompt == "Generate the alt_text in tlh at 0:"
    with pytest.raises(BadSample, match="no name is known of its language.*: tlh"):
        train("caption", record, prompt="in {language}")


def test_vqa() -> None:
    told = train("vqa", QUESTIONS | {"lang": "fr"}, lang="en").record["questions"]
    assert told[0] == {
        "question": "Answer in en: what is it?",
        "answers": ["a dog", "a cat", "a cat"],
        "kind": "what",
        "id": "q1",
    }
    assert told[1]["answers"] == ["two"] and len(told) == 3
    one = {"question": "what?", "answer": "it"}
    (asked,) = train("vqa", one, style="paligemma").record["questions"]
    assert asked == {"question": "answer en what?", "answers": ["it"]}


def test_braces_in_a_question_are_words() -> None:
    (asked,) = train("vqa", {"question": "what is {x}?", "answer": "y"}).record["questions"]
    assert asked["question"] == "Answer in en: what is {x}?"


def test_vqg() -> None:
    """The commonest answer is shown; in evaluation, questions of one answer are each other's references."""
    asked = train("vqg", QUESTIONS).record["questions"]
    assert [(q["question"], q["answers"]) for q in asked] == [
        ("Generate a question in en for a cat:", ["what is it?"]),
        ("Generate a question in en for two:", ["how many?"]),
        ("Generate a question in en for a cat:", ["which animal?"]),
    ]
    asked = task("vqg", style="paligemma").evaluation(QUESTIONS).record["questions"]
    assert [(q["question"], q["answers"]) for q in asked] == [
        ("question en a cat", ["what is it?", "which animal?"]),
        ("question en two", ["how many?"]),
    ]


def test_split_cap() -> None:
    """Both parts make the caption; the position counts the words shown; all cuts are equally likely."""
    caption = "two  cats on a sofa"
    counts: Counter[int] = Counter()
    for seed in range(800):
        told = train("split_cap", {"caption": caption}, seed).record
        head, start = told["question"].split(": ")
        position = int(head.rpartition(" ")[2])
        assert len(start.split()) == position and 1 <= position <= 4
        assert f"{start} {told['answer']}".split() == caption.split()
        counts[position] += 1
    # 200 of each are due; 5 standard deviations of a binomial of 800 and 1/4 are 61.
    assert all(abs(counts[n] - 200) < 61 for n in (1, 2, 3, 4))


def test_split_cap_of_one_word() -> None:
    told = train("split_cap", {"caption": " cats "}).record
    assert told == {"question": "Generate the alt_text in en at 0:", "answer": "cats"}
    assert train("split_cap", {"caption": "cats"}, style="paligemma").record["question"] == "caption en"


def test_split_cap_draws_among_captions() -> None:
    answers = {train("split_cap", CAPTIONS, seed).record["answer"] for seed in range(40)}
    assert {"cats", "cats on a sofa", "sofa"} <= answers


def test_languages_without_spaces_are_cut_in_characters() -> None:
    text = "沙发上有 两只猫"
    told = train("split_cap", {"caption": text, "lang": "zh"}, 3).record
    position, start = int(told["question"].split(" at ")[1].split(":")[0]), told["question"].split(": ")[1]
    assert len(start.replace(" ", "")) == position and f"{start}{told['answer']}".replace(" ", "") == (
        text.replace(" ", "")
    )
    assert units("a\n b  c ", "en") == ["a", "\n b", "  c"] and units("猫 犬", "ja") == ["猫", " 犬"]
    assert len(units(text, "en")) == 2


def test_ocr() -> None:
    record = RECORDS["ocr"]
    assert train("ocr", record).record == {
        "question": "Generate the ocr_text in fr:",
        "answer": "STOP all way 25",
    }
    assert train("ocr", record, style="paligemma", separator="\n").record == {
        "question": "ocr",
        "answer": "STOP\nall way\n25",
    }
    with pytest.raises(BadSample, match="needs ocr with a text"):
        train("ocr", {"ocr": []})


def test_ocr_leaves_out_any_text() -> None:
    """Of too many, random ones stay, in order; evaluation asks for all."""
    seen = {train("ocr", RECORDS["ocr"], seed, most_texts=2).record["answer"] for seed in range(60)}
    assert seen == {"STOP all way", "STOP 25", "all way 25"}
    assert task("ocr", most_texts=2).evaluation(RECORDS["ocr"]).record["answer"] == "STOP all way 25"
