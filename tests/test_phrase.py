"""Records become sentences: with a task or without, in training, in evaluation and for the held-out loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlm_adapt.config import schema
from vlm_adapt.data.phrase import Phrasing
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks.task import make_task
from vlm_adapt.sentence import Sentence, Text
from vlm_adapt.template import bare_template, plain_template

PLAIN = plain_template("</s>")
TWO_WAY = bare_template("</s>", prompt_is_causal=False)
BOX = {"label": "cat", "box": [0, 0, 5, 5]}


def phrasing(name: str = "", **more: Any) -> Phrasing:
    settings = {key: more.pop(key) for key in list(more) if key not in Phrasing.__dataclass_fields__}
    task = make_task(schema.Task(name=name, **settings)) if name else None
    return Phrasing(more.pop("template", PLAIN), task=task, **more)


def read(sentence: Sentence) -> str:
    """What the model reads; learned text in brackets."""
    return "".join(
        (f"[{one.text}]" if one.learned else one.text) if isinstance(one, Text) else "<image>"
        for one in sentence
    )


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("record", "has"),
    [
        ({"labels": ["cat"]}, "labels"),
        ({"objects": [BOX], "id": 3}, "objects, id"),
        ({"referring": [{"expressions": ["a"], "mask": 0}]}, "referring"),
        ({"ocr": [{"text": "a"}]}, "ocr"),
        ({"text": "a b"}, "text"),
    ],
)
def test_nothing_is_asked_of_it(record: Any, has: str) -> None:
    """What only a task can ask for is refused without one, whichever way it is read."""
    plain = phrasing()
    for call in (
        lambda: plain.training(record, 1, draw()),
        lambda: plain.evaluation(record, 1),
        lambda: plain.references(record, 1),
    ):
        with pytest.raises(BadSample, match=f"nothing is asked of it: give the source a task: it has {has}$"):
            call()


def test_without_a_task() -> None:
    plain = phrasing()
    assert not plain.needs_sizes and plain.images({"caption": "a"}, 3) == [0, 1, 2]
    (sentence,) = plain.training({"caption": "a cat"}, 2, draw())
    assert read(sentence) == "User: <image><image>\nDescribe the image.\nAssistant:[ a cat</s>]"


@pytest.mark.parametrize("template", [PLAIN, TWO_WAY], ids=["causal", "prefix"])
def test_training_and_evaluation_say_the_same(template: Any) -> None:
    """Evaluation's prompt is what training shows before the answer, for every task with no draw in it."""
    branches = template is PLAIN
    for name, record in (
        ("caption", {"caption": "a cat"}),
        ("vqa", {"question": "what?", "answer": "a cat"}),
        ("vqg", {"question": "what?", "answer": "a cat"}),
        ("ocr", {"ocr": [{"text": "STOP"}]}),
        ("detection", {"objects": [BOX]}),
    ):
        one = phrasing(name, template=template, branches=branches)
        images: Any = [(10, 10)] if one.needs_sizes else 1
        (learned,) = one.training(record, images, draw())
        (asked,) = one.evaluation(record, images)
        assert read(learned).startswith(read(asked.sentence) + "[") and learned.image_count == 1
        assert read(one.references(record, images)[0]) == read(learned)
        assert asked.questions[0].answer in read(learned)


def test_captions_are_drawn_and_all_are_references() -> None:
    record = {"captions": ["one", "two", "three"]}
    one = phrasing("caption", prompt="never asked")
    assert {read(one.training(record, 1, draw(seed))[0]).split("[")[1] for seed in range(30)} == {
        " one</s>]",
        " two</s>]",
        " three</s>]",
    }
    (asked,) = one.evaluation(record, 1)
    assert asked.questions[0].text == "Generate the alt_text in en at 0:"
    assert asked.questions[0].answers == ("one", "two", "three")
    (sentence,) = one.references(record, 1)
    assert read(sentence).count("Generate the alt_text") == 3 == read(sentence).count("[")
    assert len(phrasing("caption", template=TWO_WAY, branches=False).references(record, 1)) == 3


def test_references_hold_every_question_and_message() -> None:
    record = {"questions": [{"question": f"q{n}", "answers": ["a", "b", "b"]} for n in range(3)]}
    (sentence,) = phrasing("vqa", questions_per_image=1).references(record, 0)
    assert [f"q{n}" in read(sentence) for n in range(3)] == [True] * 3 and read(sentence).count("[ b") == 3
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert read(phrasing().references(talk, 0)[0]) == "User: a\nAssistant:[ b</s>]"


def test_questions_of_a_task_are_drawn_by_kind() -> None:
    record = {"objects": [BOX], "labels": ["cat", "dog", "bus"]}
    assert len(phrasing("object_aware").training(record, 1, draw())) == 1
    one = phrasing("object_aware", questions_per_kind={"presence": 1}, template=TWO_WAY, branches=False)
    (sentence,) = one.training(record, 1, draw())
    assert " in the image?" in read(sentence) and "Is " in read(sentence)
    asked = phrasing("object_aware").evaluation(record, 1)
    assert [question.kind for question in asked[0].questions] == ["listing", "presence", "subset", "counting"]
    again = phrasing("object_aware").evaluation(record, 1)
    assert [read(one.sentence) for one in asked] == [read(one.sentence) for one in again]


def test_images_of_a_text_task_are_left_out() -> None:
    one = phrasing("span_corruption")
    record = {"text": "a b c d e f", "caption": "a"}
    assert one.images(record, 2) == []
    for images in (0, 2):
        (sentence,) = one.training(record, images, draw())
        assert sentence.image_count == 0 and "<extra_id_0>" in read(sentence)
        assert one.evaluation(record, images)[0].sentence.image_count == 0


def test_state_stays() -> None:
    (sentence,) = phrasing("vqa").training({"question": "q", "answer": "a", "state": [1, 2]}, 1, draw())
    assert sum(getattr(segment, "values", None) == (1.0, 2.0) for segment in sentence) == 1
