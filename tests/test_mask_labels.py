"""Label sets: what becomes of the values of a mask, and which settings are mistakes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from vlm_adapt.config import schema
from vlm_adapt.data.tasks.masks import LabelSet, Masks, make_masks, shown
from vlm_adapt.data.tasks.task import make_task
from vlm_adapt.errors import UserError

NAMES = ["sky", "car", "", "tree", "car ", "bus"]


def masks(**settings: Any) -> Masks:
    return make_masks(schema.Task(name="masks", **settings))


@pytest.mark.parametrize(
    ("settings", "labels", "classes"),
    [
        ({}, ("sky", "car", "tree", "bus"), (0, 1, None, 2, 1, 3)),
        ({"leave_out": ["car"]}, ("sky", "tree", "bus"), (0, -1, None, 1, -1, 2)),
        ({"keep": ["bus", "sky"]}, ("sky", "bus"), (0, -1, None, -1, -1, 1)),
        (
            {"rename": {"car": "car|automobile"}},
            ("sky", "car|automobile", "tree", "bus"),
            (0, 1, None, 2, 1, 3),
        ),
        ({"rename": {"bus": "car"}}, ("sky", "car", "tree"), (0, 1, None, 2, 1, 1)),
        ({"merge": {"vehicle": ["car", "bus"]}}, ("sky", "vehicle", "tree"), (0, 1, None, 2, 1, 1)),
        (
            {"merge": {"vehicle|car": ["car", "bus"]}, "leave_out": ["vehicle"]},
            ("sky", "tree"),
            (0, -1, None, 1, -1, -1),
        ),
        ({"merge": {"vehicle": ["car", "bus"]}, "keep": ["bus"]}, ("vehicle",), (-1, -1, None, -1, -1, 0)),
        ({"keep": ["car"], "background": "other"}, ("car", "other"), (1, 0, None, 1, 0, 1)),
        ({"leave_out": ["bus"], "background": "sky"}, ("sky", "car", "tree"), (0, 1, None, 2, 1, 0)),
        ({"background": "other"}, ("sky", "car", "tree", "bus"), (0, 1, None, 2, 1, 3)),
    ],
)
def test_sets(settings: dict[str, Any], labels: tuple[str, ...], classes: tuple[int | None, ...]) -> None:
    """By value; values of one name are one class, and the order is that of the data."""
    task = masks(**settings)
    assert task.label_set(NAMES) == LabelSet(labels, classes)
    task.check(NAMES, "a")
    assert pickle.loads(pickle.dumps(task)) == task


def test_no_task_keeps_all() -> None:
    assert make_masks(None) == masks() == Masks() and not Masks().wanted
    assert shown("car | automobile") == "car"


@pytest.mark.parametrize("count", [2, 253, 254, 255, 300, 40_000])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_codes(count: int, kind: type[np.unsignedinteger]) -> None:
    """Every value, against a loop; the last of the type is ignored, whatever labels there are."""
    names = [f"n{number}" if number % 7 else f"n{number % 70}" for number in range(count)]
    found = Masks().label_set(names)
    last, place = np.iinfo(kind).max, {name: number for number, name in enumerate(found.labels)}
    values_HW = np.arange(min(count, last)).astype(kind).reshape(1, -1)
    values_HW = np.concatenate([values_HW, np.full((1, 1), last, kind)], 1)
    codes_HW = found.codes(values_HW)
    assert codes_HW is not None and codes_HW.shape == values_HW.shape
    expected = [0 if value == last else place[names[value]] + 1 for value in values_HW[0].tolist()]
    assert codes_HW[0].tolist() == expected
    assert found.kind is (np.int16 if len(found.labels) < 2**15 else np.int32)
    if count < last:
        assert found.codes(np.array([[0, count]], kind)) is None  # a value beyond the labels
    unused = Masks().label_set([*names, ""])
    if count < last:
        assert unused.codes(np.array([[count]], kind)) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"leave_ot": ["car"]}, "task 'masks' has no setting 'leave_ot', did you mean 'leave_out'?"),
        ({"keep": []}, "keep names no label: name some, or leave it out"),
        ({"rename": {"car": "car|"}}, "label 'car|' has an empty synonym"),
        ({"rename": {"car": " "}}, "a label is renamed to nothing: leave_out takes a label out"),
        ({"background": ""}, "background is the name of a label, and it is empty"),
        ({"rename": {"car": "a"}, "merge": {"b": ["car"]}}, "label 'car' gets two names, one of them 'b'"),
        ({"keep": ["car"], "leave_out": ["car"]}, "label 'car' is in keep and in leave_out"),
        ({"leave_out": "car"}, "task 'masks': leave_out: "),
    ],
)
def test_mistakes_in_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        masks(**settings)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"leave_out": ["bos"]},
            "leave_out of task 'masks': source 'a' has no label 'bos', did you mean 'bus'?",
        ),
        ({"keep": ["zzzzz"]}, "has no label 'zzzzz': it has sky, car, tree, bus"),
        ({"rename": {"trees": "x"}}, "rename of task 'masks': source 'a' has no label 'trees', did you mean"),
        ({"merge": {"x": ["car", "truck"]}}, "merge of task 'masks': source 'a' has no label 'truck'"),
        ({"leave_out": ["sky", "car", "tree", "bus"]}, "task 'masks' leaves no label of source 'a'"),
    ],
)
def test_mistakes_beside_the_data(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        masks(**settings).check(NAMES, "a")
    assert said in str(caught.value)


def test_the_right_task_for_the_model() -> None:
    with pytest.raises(UserError, match="task 'caption' makes words of samples, and a segmenter learns from"):
        make_masks(schema.Task(name="caption"))
    with pytest.raises(UserError, match="task 'masks' is for segmenters .*: a model that answers in words"):
        make_task(schema.Task(name="masks"))
    with pytest.raises(UserError, match="unknown task of masks 'mask', did you mean 'masks'"):
        make_masks(schema.Task(name="mask"))
