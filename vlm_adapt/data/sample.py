"""A sample as it lies on disk, checked against the documented schema.

Knows which members a sample may have and what its JSON must say; knows nothing about tokens, pixels
or wording. The schema is written out in docs and in `FIELDS`.

    key.jpg | key.png | key.webp     one image;  key.0.jpg, key.1.jpg, ... several, in this order
    key.json                         an object with at least one of FIELDS
    key.mask.png                     semantic mask: a pixel's value i means labels[i]
    key.mask.0.png, key.mask.1.png   binary masks, named by number from objects[] and referring[]

Whether masks have their image's size is for `vlm_adapt.data.masks` to say, where they are read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_adapt.data.problems import BadSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FIELDS = (
    *("messages", "caption", "captions", "question", "questions"),
    *("labels", "objects", "referring", "ocr", "text"),
)
ROLES = ("system", "user", "assistant")
_IMAGE = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})")
_MASK = re.compile(r"mask\.(\d+)\.png")


@dataclass(frozen=True)
class Sample:
    """A checked sample.

    Attributes:
        images: files, in order.
        record: what key.json holds.
        mask: the file of the semantic mask.
        masks: files of binary masks by their numbers.
    """

    key: str
    images: list[bytes]
    record: dict[str, Any]
    mask: bytes | None = None
    masks: dict[int, bytes] = field(default_factory=dict)


def parse_sample(key: str, members: Mapping[str, bytes]) -> Sample:
    """Check a sample's members and give them their roles. Members that the schema does not know stay out.

    Whether the images match the `<image>` placeholders is the encoder's to say.

    Raises:
        BadSample: with the rule that is broken.
    """
    if "json" not in members:
        present = ", ".join(members) or "nothing"
        raise BadSample("no json member", f"it has {present}")
    record, masks = _record(members["json"]), _masks(members)
    for name in ("objects", "referring"):
        for entry in record.get(name, ()):
            if "mask" in entry and entry["mask"] not in masks:
                raise BadSample(f"{name} names a mask that is not there", f"mask.{entry['mask']}.png")
    for reference in _references(record):
        if "mask" in reference and reference["mask"] not in masks:
            raise BadSample("an answer means a mask that is not there", f"mask.{reference['mask']}.png")
    return Sample(key, _images(members), record, members.get("mask.png"), masks)


def _images(members: Mapping[str, bytes]) -> list[bytes]:
    single: list[bytes] = []
    numbered: dict[int, bytes] = {}
    for name, data in members.items():
        match = _IMAGE.fullmatch(name)
        if match is None:
            continue
        if match.group(1) is None:
            single.append(data)
        elif int(match.group(1)) in numbered:
            raise BadSample("two images have one number", name)
        else:
            numbered[int(match.group(1))] = data
    if len(single) + bool(numbered) > 1:
        names = ", ".join(name for name in members if _IMAGE.fullmatch(name))
        raise BadSample("several images without an order: number them 0.jpg, 1.jpg, ...", names)
    if sorted(numbered) != list(range(len(numbered))):
        names = ", ".join(map(str, sorted(numbered)))
        raise BadSample("image numbers do not run from 0 without a gap", names)
    return single or [numbered[number] for number in sorted(numbered)]


def _masks(members: Mapping[str, bytes]) -> dict[int, bytes]:
    masks: dict[int, bytes] = {}
    for name, data in members.items():
        match = _MASK.fullmatch(name)
        if match is None:
            continue
        if int(match.group(1)) in masks:
            raise BadSample("two masks have one number", name)
        masks[int(match.group(1))] = data
    return dict(sorted(masks.items()))


def _record(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("json cannot be read", str(error)) from error
    if not isinstance(record, dict):
        raise BadSample("json is not an object", f"it is a {type(record).__name__}")
    if not any(name in record for name in FIELDS):
        raise BadSample(f"json has none of {', '.join(FIELDS)}", f"it has {', '.join(record) or 'nothing'}")
    if "messages" in record:
        _check_messages(record["messages"])
    if "caption" in record:
        _check_text(record["caption"], "caption")
    if "captions" in record:
        _check_texts(record["captions"], "captions")
    if "question" in record:
        _check_question(record)
    if "questions" in record:
        if not isinstance(record["questions"], list) or not record["questions"]:
            raise BadSample("questions is not a list of questions")
        for question in record["questions"]:
            if not isinstance(question, dict):
                raise BadSample("an entry of questions is not an object")
            _check_question(question)
    if "state" in record:
        _check_state(record["state"])
    for name, check in _CHECKS.items():
        if name in record:
            check(record[name], name)
    return record


def _check_text(value: Any, name: str) -> None:
    if not isinstance(value, str):
        raise BadSample(f"{name} is not a text", f"it is a {type(value).__name__}")
    if not value.strip():
        raise BadSample(f"empty {name}")


def _check_texts(value: Any, name: str) -> None:
    if not isinstance(value, list) or not value:
        raise BadSample(f"{name} is not a list of texts")
    for entry in value:
        _check_text(entry, name)


def _check_question(question: Mapping[str, Any]) -> None:
    _check_text(question.get("question"), "question")
    if "answers" in question:
        _check_texts(question["answers"], "answers")
    elif "answer" in question:
        _check_text(question["answer"], "answer")
    else:
        raise BadSample("question without answer or answers")


def _references(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the mask tokens of a record's answers mean: {"mask": number} or {"label": name}, each checked."""
    own = [record] if "question" in record else []
    for entry in (*own, *record.get("questions", ()), *record.get("messages", ())):
        references = entry.get("masks", [])
        if not isinstance(references, list):
            raise BadSample("masks of an answer is not a list", f"it is a {type(references).__name__}")
        for reference in references:
            if not isinstance(reference, dict) or ("mask" in reference) == ("label" in reference):
                raise BadSample("a mask of an answer is not named by a mask or a label", repr(reference)[:80])
            if "label" in reference:
                _check_text(reference["label"], "label of a mask")
            elif type(reference["mask"]) is not int:
                raise BadSample("a mask of an answer is not a number", repr(reference["mask"])[:80])
            yield reference


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise BadSample("messages is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise BadSample(f"a message has no role of {', '.join(ROLES)}")
        if message["role"] == "assistant":
            _check_text(message.get("content"), "answer")
        elif not isinstance(message.get("content"), str):
            raise BadSample("content of a message is not a text")
    if all(message["role"] != "assistant" for message in messages):
        raise BadSample("messages hold no answer of the assistant")


def _check_state(state: Any) -> None:
    numbers: list[Any] = state if isinstance(state, list) else [None]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise BadSample("state is not a list of finite numbers")


def _check_labels(labels: Any, name: str) -> None:
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise BadSample("labels is not a list of names")
    if not any(label.strip() for label in labels):
        raise BadSample("labels names nothing")


def _entries(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise BadSample(f"{name} is not a list")
    for entry in value:
        if not isinstance(entry, dict):
            raise BadSample(f"an entry of {name} is not an object")
        number = entry.get("mask", 0)
        if type(number) is not int or number < 0:
            raise BadSample(f"a mask of {name} is not a number from 0", repr(number))
    return value


def _check_objects(value: Any, name: str) -> None:
    for entry in _entries(value, name):
        _check_text(entry.get("label"), "label of an object")
        _check_box(entry.get("box"), "an object")


def _check_referring(value: Any, name: str) -> None:
    for entry in _entries(value, name):
        _check_texts(entry.get("expressions"), "expressions of an object")
        if "box" not in entry and "mask" not in entry:
            raise BadSample("referring expressions without box or mask")
        if "box" in entry:
            _check_box(entry["box"], "a referring expression")


def _check_ocr(value: Any, name: str) -> None:
    for entry in _entries(value, name):
        _check_text(entry.get("text"), "text of ocr")
        if "box" in entry:
            _check_box(entry["box"], "a text")


def _check_box(box: Any, whose: str) -> None:
    """[x0, y0, x1, y1] in pixels, with an area. Whether it lies in its image is checked where it is used."""
    numbers: list[Any] = box if isinstance(box, list) else []
    if len(numbers) != 4 or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise BadSample(f"the box of {whose} is not four finite numbers", repr(box)[:80])
    if not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise BadSample(f"the box of {whose} has no area: it is [x0, y0, x1, y1]", repr(box)[:80])


_CHECKS = {
    "labels": _check_labels,
    "objects": _check_objects,
    "referring": _check_referring,
    "ocr": _check_ocr,
    "text": _check_text,
    "lang": _check_text,
}
