"""A sample as it lies on disk, checked against the documented schema.

Knows which members a sample may have and what its JSON must say; knows nothing about tokens, pixels
or wording. The schema is written out in docs and in `FIELDS`.

    key.jpg | key.png | key.webp     one image;  key.0.jpg, key.1.jpg, ... several, in this order
    key.json                         an object with at least one of messages, caption(s), question(s)
    key.mask.png                     optional, for segmentation
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_adapt.data.problems import BadSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FIELDS = ("messages", "caption", "captions", "question", "questions")
ROLES = ("system", "user", "assistant")
_IMAGE = re.compile(rf"(?:(\d+)\.)?(?:{'|'.join(IMAGE_EXTENSIONS)})")


@dataclass(frozen=True)
class Sample:
    """A checked sample: its key, image files in order, JSON record, and mask file if it has one."""

    key: str
    images: list[bytes]
    record: dict[str, Any]
    mask: bytes | None = None


def parse_sample(key: str, members: Mapping[str, bytes]) -> Sample:
    """Check a sample's members and give them their roles. Members that the schema does not know stay out.

    Whether the images match the `<image>` placeholders is the encoder's to say.

    Raises:
        BadSample: with the rule that is broken.
    """
    if "json" not in members:
        present = ", ".join(members) or "nothing"
        raise BadSample("no json member", f"it has {present}")
    return Sample(key, _images(members), _record(members["json"]), members.get("mask.png"))


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
