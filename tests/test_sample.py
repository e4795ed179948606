"""Samples are what the documented schema says, or are refused with the rule that is broken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.sample import FIELDS, parse_sample

BOX = [1, 2.5, 30, 40]
ASKED = {"question": "where?", "answer": "<seg>"}
OBJECT = {"label": "cat", "box": BOX}


def parse(record: Any, **files: bytes) -> Any:
    members = {name.replace("_", "."): data for name, data in files.items()}
    return parse_sample("k", {"json": json.dumps(record).encode(), **members})


@pytest.mark.parametrize(
    "record",
    [
        {"labels": ["", "cat", "dog"]},
        {"objects": [OBJECT, OBJECT | {"kind": "x"}]},
        {"objects": []},  # an image without objects is a fact, too
        {"ocr": []},
        {"ocr": [{"text": "STOP"}, {"text": "ahead", "box": BOX}]},
        {"referring": [{"expressions": ["the left cat"], "box": BOX}]},
        {"text": "Some words.", "lang": "de"},
    ],
)
def test_fields(record: Any) -> None:
    assert parse(record).record == record
    assert set(record) & set(FIELDS)


def test_masks() -> None:
    record = {"objects": [OBJECT | {"mask": 10}, OBJECT], "referring": [{"expressions": ["a"], "mask": 2}]}
    sample = parse(record, mask_10_png=b"j", mask_2_png=b"c", mask_png=b"s", jpg=b"i", mask_x_png=b"?")
    assert sample.masks == {2: b"c", 10: b"j"} and list(sample.masks) == [2, 10]
    assert (sample.mask, sample.images) == (b"s", [b"i"])
    assert parse({"text": "a"}).masks == {}
    assert parse(ASKED | {"masks": [{"mask": 2}, {"label": "sky"}]}, mask_2_png=b"c").masks == {2: b"c"}
    assert parse({"text": "a", "masks": "no question's"}).record["masks"]
    with pytest.raises(BadSample, match=r"objects names a mask that is not there: mask\.10\.png"):
        parse(record, mask_2_png=b"c")
    with pytest.raises(BadSample, match=r"referring names a mask that is not there: mask\.2\.png"):
        parse(record, mask_10_png=b"c")
    with pytest.raises(BadSample, match="two masks have one number"):
        parse(record, mask_2_png=b"c", mask_02_png=b"d")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (ASKED | {"masks": "sky"}, "masks of an answer is not a list: it is a str"),
        (ASKED | {"masks": ["sky"]}, "a mask of an answer is not named by a mask or a label: 'sky'"),
        (ASKED | {"masks": [{"mask": 0, "label": "sky"}]}, "is not named by a mask or a label"),
        (ASKED | {"masks": [{"mask": "0"}]}, "a mask of an answer is not a number: '0'"),
        (ASKED | {"masks": [{"mask": 3}]}, r"an answer means a mask that is not there: mask\.3\.png"),
        ({"questions": [ASKED | {"masks": [{"label": ""}]}]}, "empty label of a mask"),
        ({"messages": [{"role": "assistant", "content": "a", "masks": [{}]}]}, "is not named by a mask or"),
        ({"word": "x"}, "json has none of messages, .*, objects, referring, ocr, text"),
        ({"labels": "cat"}, "labels is not a list of names"),
        ({"labels": ["cat", 3]}, "labels is not a list of names"),
        ({"labels": []}, "labels names nothing"),
        ({"labels": ["", " "]}, "labels names nothing"),
        ({"objects": {"label": "cat"}}, "objects is not a list"),
        ({"objects": ["cat"]}, "an entry of objects is not an object"),
        ({"objects": [{"box": BOX}]}, "label of an object is not a text: it is a NoneType"),
        ({"objects": [{"label": " ", "box": BOX}]}, "empty label of an object"),
        ({"objects": [{"label": "cat"}]}, "the box of an object is not four finite numbers"),
        ({"objects": [{"label": "cat", "box": [1, 2, 3]}]}, "not four finite numbers"),
        ({"objects": [{"label": "cat", "box": [1, 2, 3, True]}]}, "not four finite numbers"),
        ({"objects": [{"label": "cat", "box": [1, 2, 3, float("inf")]}]}, "not four finite numbers"),
        ({"objects": [{"label": "cat", "box": [30, 2, 1, 40]}]}, "has no area"),
        ({"objects": [{"label": "cat", "box": [1, 40, 30, 40]}]}, "has no area"),
        ({"objects": [OBJECT | {"mask": "0"}]}, "a mask of objects is not a number from 0: '0'"),
        ({"objects": [OBJECT | {"mask": -1}]}, "a mask of objects is not a number from 0"),
        ({"objects": [OBJECT | {"mask": True}]}, "a mask of objects is not a number from 0"),
        ({"referring": [{"expressions": ["a"]}]}, "referring expressions without box or mask"),
        ({"referring": [{"expressions": [], "box": BOX}]}, "expressions of an object is not a list"),
        ({"referring": [{"expressions": [""], "box": BOX}]}, "empty expressions of an object"),
        ({"referring": [{"expressions": ["a"], "box": [0, 0, 0, 0]}]}, "has no area"),
        ({"ocr": "STOP"}, "ocr is not a list"),
        ({"ocr": [{"text": ""}]}, "empty text of ocr"),
        ({"ocr": [{"text": "a", "box": None}]}, "the box of a text is not four"),
        ({"text": ["a"]}, "text is not a text"),
        ({"text": "\n"}, "empty text"),
        ({"caption": "a", "lang": ""}, "empty lang"),
        ({"caption": "a", "lang": 7}, "lang is not a text"),
        ({"caption": "a", "objects": [{"label": "cat"}]}, "not four finite numbers"),  # whoever uses it
    ],
)
def test_refusals(record: Any, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        parse(record)
