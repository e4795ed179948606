"""Masks asked for in words: which questions are made, and that each answer's token means the right mask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from vlm_adapt.config import schema
from vlm_adapt.data.encode import Encoder
from vlm_adapt.data.mask_targets import labels_shown
from vlm_adapt.data.masks import encode_mask
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.reader import Reader
from vlm_adapt.data.sample import parse_sample
from vlm_adapt.data.tasks.task import make_task
from vlm_adapt.data.token_masks import MaskSpec
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.template import plain_template

LABELS = ["circle", "", "a cat", "square", "a cat"]
VALUES = np.repeat(np.array([[0, 0, 2, 4, 255, 255]], np.uint8), 4, 1).repeat(24, 0)
VALUES[:2, :2] = 3  # 4 pixels of 576
REFERRING = [
    {"expressions": ["the left cat", "a cat"], "mask": 1},
    {"expressions": ["the circle"], "box": [0, 0, 4, 4]},
    {"expressions": ["two shapes"], "mask": 0},
]
OBJECTS = [
    {"label": "a cat", "box": [0, 0, 9, 9], "mask": 0},
    {"label": "circle", "box": [0, 0, 9, 9], "mask": 1},
    {"label": "a cat", "box": [0, 0, 5, 5]},
]


def told(name: str, record: dict[str, Any], seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    task = make_task(schema.Task(name=name, **settings))
    assert task is not None
    questions: list[dict[str, Any]] = task.training(record, np.random.default_rng(seed)).record["questions"]
    return questions


def sample(**more: Any) -> dict[str, bytes]:
    members = {"png": tiny.image(1, 24, 24), "mask.png": encode_mask(VALUES)}
    members |= {f"mask.{number}.png": encode_mask(VALUES == number * 2) for number in (0, 1)}
    return members | {"json": json.dumps({"labels": LABELS} | more).encode()}


def test_an_answer_may_name_what_is_asked_for() -> None:
    record = {"labels": LABELS, "shown": {"circle": 0.3, "a cat": 0.3}}
    answers = [one["answer"] for one in told("class_masks", record, answer="The {label} {token}.")]
    assert answers == ["The circle <seg>.", "The a cat <seg>."]
    referring = told("referring_masks", {"referring": REFERRING[2:]}, answer="{expression}: {token}")
    assert [one["answer"] for one in referring] == ["two shapes: <seg>"]
    with pytest.raises(UserError, match="expression"):
        told("class_masks", record, answer="The {expression} {token}.")


def test_labels_shown() -> None:
    """Shares of all pixels; values of one name are one label, ignored pixels none."""
    shown = labels_shown(parse_sample("s", sample()))
    assert shown == pytest.approx({"circle": 188 / 576, "a cat": 192 / 576, "square": 4 / 576})
    for broken, said in (
        (sample(labels=["circle"]), "mask has a value without a label: value 2"),
        ({name: data for name, data in sample().items() if name != "mask.png"}, "no semantic mask"),
    ):
        with pytest.raises(BadSample, match=said):
            labels_shown(parse_sample("s", broken))


def test_class_masks() -> None:
    """A question for every class that is large enough, and for some that are not there."""
    record = {"labels": [*LABELS, "shape"], "shown": {"circle": 0.5, "a cat": 0.3, "square": 0.001}, "id": 3}
    asked = told("class_masks", record, smallest=0.01)
    assert [one["masks"] for one in asked] == [[{"label": "circle"}], [{"label": "a cat"}]]
    assert asked[0]["question"] == "Please segment the circle in this image."
    assert {one["answer"] for one in asked} == {"Sure, it is <seg>."}
    more = told("class_masks", record, absent=3, style="paligemma", token="[SEG]", answer="It is {token} .")
    assert [one["question"] for one in more] == [
        f"segment {x}" for x in ("circle", "a cat", "square", "shape")
    ]
    assert more[0]["answer"] == "It is [SEG] ." and [one["kind"] for one in more] == [
        *["present"] * 3,
        "absent",
    ]
    assert more[3]["answer"] == "There is no shape in this image." and "masks" not in more[3]
    vocabulary = told("class_masks", record, absent=1, vocabulary=["Circle", "dog"])
    assert vocabulary[-1]["question"] == "Please segment the dog in this image."
    with pytest.raises(BadSample, match="no class is as large as smallest"):
        told("class_masks", record, smallest=0.9)


def test_class_masks_of_objects() -> None:
    """Without a semantic mask: an object that is alone of its label."""
    (only,) = told("class_masks", {"objects": OBJECTS})
    assert only["masks"] == [{"mask": 1}] and "the circle" in only["question"]
    with pytest.raises(BadSample, match="the task 'class_masks' needs a semantic mask, or an object with"):
        told("class_masks", {"objects": OBJECTS[::2]})


def test_referring_masks() -> None:
    """One expression of each object with a mask is drawn; evaluation asks with all."""
    record = {"referring": REFERRING}
    drawn = {tuple(one["question"] for one in told("referring_masks", record, seed)) for seed in range(20)}
    assert drawn == {
        ("Please segment the left cat in this image.", "Please segment two shapes in this image."),
        ("Please segment a cat in this image.", "Please segment two shapes in this image."),
    }
    task = make_task(schema.Task(name="referring_masks"))
    assert task is not None
    asked = task.evaluation(record).record["questions"]
    assert [one["masks"] for one in asked] == [[{"mask": 1}], [{"mask": 1}], [{"mask": 0}]]
    with pytest.raises(BadSample, match="the task 'referring_masks' needs referring expressions with a mask"):
        told("referring_masks", {"referring": REFERRING[1:2]})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"answer": "it is there"}, "answer 'it is there' lacks the field '{token}'"),
        ({"answer": "{token} and {token}"}, "answer has the field {token} more than once"),
        ({"absent_answer": "no <seg>"}, "absent_answer holds <seg>, and there is no mask"),
        ({"prompt": "segment it"}, "lacks the field '{label}'"),
        ({"smallest": 2}, "smallest: "),
    ],
)
def test_mistakes(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        make_task(schema.Task(name="class_masks", **settings))
    assert said in str(caught.value)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_mean_their_masks(tmp_path: Path, seed: int) -> None:
    """Through the reader of texts: questions in drawn order, each token with its own question's mask."""
    tokenizer = tiny.tokenizer(tmp_path / "tokenizer", chat=False)
    tokenizer.add_tokens(["<seg>"])
    token = tokenizer.convert_tokens_to_ids("<seg>")
    shards = str(tiny.shard(tmp_path / "s.tar", [("s", sample(objects=OBJECTS, referring=REFERRING))]))
    spec, tasks = ImageSpec((24, 24)), ("class_masks", "referring_masks")
    sources = [schema.Source(shards=shards, task=schema.Task(name=name)) for name in tasks]
    encoder = Encoder(tokenizer, 2, 600, mask_token=token)
    masks = MaskSpec(token, (24, 24), spec, own=False)
    made = Reader(sources, encoder, plain_template("</s>"), None, spec, seed, masks=masks)
    meant = {
        "circle": VALUES == 0,
        "a cat": (VALUES == 2) | (VALUES == 4),
        "square": VALUES == 3,
    }
    account = Account()
    (row,) = made.training(0, 0, 0, account)
    texts = tokenizer.decode(row.ids.clip(0)).split("Please segment the ")[1:]
    assert len(texts) == len(row.masks.targets) == 3 and account.used == 1
    for text, target_HW in zip(texts, row.masks.targets, strict=True):
        name = next(name for name in meant if text.startswith(name))
        assert np.array_equal(target_HW == 1, meant[name] & (VALUES != 255))
        assert np.array_equal(target_HW == 255, VALUES == 255)
    (row,) = made.training(1, 0, 0, account)
    texts = tokenizer.decode(row.ids.clip(0)).split("Please segment ")[1:]
    for text, target_HW in zip(texts, row.masks.targets, strict=True):
        assert np.array_equal(target_HW == 1, VALUES == (0 if text.startswith("two shapes") else 2))
