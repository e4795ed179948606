"""Masks asked for in words: the answer holds a token for each mask, and says which mask it means.

LISA (Lai et al. 2023, arXiv:2308.00692): semantic segmentation data become questions for a class, referring
expressions become questions for an object; the answer is "Sure, it is <seg>.". What `masks` of a question
refers to is read by `data/token_masks.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks.prompts import check_prompt, fill
from vlm_adapt.data.tasks.task import SETTINGS, Sizes, Task, Told, carried
from vlm_adapt.data.tasks.vocabulary import Vocabulary, absent, names_of, vocabulary_of


@dataclass(frozen=True, config=SETTINGS)
class MasksAsked(Task):
    """What both tasks share.

    Attributes:
        answer: has the field {token} once, and may name what is asked for ({label} or {expression}): a small
            language then has the word beside the token.
        token: as `model.masks.token`.
    """

    answer: str = "Sure, it is {token}."
    token: str = Field(default="<seg>", min_length=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prompt("answer", self.answer, ("token", *self.fields), ("token",))
        if self.answer.count("{token}") != 1:
            raise ValueError("answer has the field {token} more than once, and one mask is asked for")

    def asked(self, question: str, reference: dict[str, Any], **named: str) -> dict[str, Any]:
        """An entry of `questions` whose answer is a mask; `named` is what is asked for."""
        return {
            "question": question,
            "answer": fill(self.answer, {"token": self.token} | named),
            "masks": [reference],
        }


@dataclass(frozen=True, config=SETTINGS)
class ClassMasks(MasksAsked):
    """A question for every class that the sample shows; `questions_per_image` draws among them.

    Classes are those of the semantic mask; without one, the labels that exactly one object has, with its
    mask.

    Attributes:
        smallest: share of the image's pixels below which a class of the semantic mask is not asked for.
        absent: how many classes that are not shown are asked for, too; their answer holds no mask.
        absent_answer: its words; {label} is the class.
        vocabulary: where absent classes come from; a file with one a line, or None for a sample's `labels`.
    """

    smallest: float = Field(default=0.001, ge=0, lt=1)
    absent: int = Field(default=0, ge=0)
    absent_answer: str = "There is no {label} in this image."
    vocabulary: Vocabulary = None

    name: ClassVar[str] = "class_masks"
    prompts: ClassVar[dict[str, str]] = {
        "pali": "Please segment the {label} in this image.",
        "paligemma": "segment {label}",
    }
    fields: ClassVar[tuple[str, ...]] = ("label",)
    required: ClassVar[tuple[str, ...]] = ("label",)
    needs_masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prompt("absent_answer", self.absent_answer, ("label",))
        if self.token in self.absent_answer:
            raise ValueError(f"absent_answer holds {self.token}, and there is no mask")
        if self.vocabulary is not None:
            names_of(self.vocabulary)

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        present, found = self._references(record)
        if not found and not self.absent:
            raise BadSample(f"no class is as large as smallest of the task '{self.name}' asks for")
        questions = [
            self.asked(self.filled(record, label=label), reference, label=label) | {"kind": "present"}
            for label, reference in found.items()
        ]
        if self.absent:
            names = vocabulary_of(self.vocabulary, record)
            for label in absent(names, present, self.absent, generator):
                answer = fill(self.absent_answer, {"label": label})
                question = self.filled(record, label=label)
                questions.append({"question": question, "answer": answer, "kind": "absent"})
        if not questions:
            raise BadSample("no class to ask for")
        return Told(carried(record) | {"questions": questions})

    def _references(self, record: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, Any]]]:
        """Every label that is there, and what is meant by those that are asked for."""
        shown: dict[str, float] | None = record.get("shown")
        if shown is not None:
            large = {name: {"label": name} for name, share in shown.items() if share >= self.smallest}
            return list(shown), large
        objects = record.get("objects", ())
        labels = [entry["label"].strip() for entry in objects]
        alone = {
            label: {"mask": entry["mask"]}
            for label, entry in zip(labels, objects, strict=True)
            if "mask" in entry and labels.count(label) == 1
        }
        if not alone:
            raise self.lacks(record, "a semantic mask, or an object with a mask that is alone of its label")
        return labels, alone


@dataclass(frozen=True, config=SETTINGS)
class ReferringMasks(MasksAsked):
    """A question for every object that expressions refer to and that has a mask.

    One of its expressions is drawn in training; evaluation asks with each.
    """

    name: ClassVar[str] = "referring_masks"
    prompts: ClassVar[dict[str, str]] = {
        "pali": "Please segment {expression} in this image.",
        "paligemma": "segment {expression}",
    }
    fields: ClassVar[tuple[str, ...]] = ("expression",)
    required: ClassVar[tuple[str, ...]] = ("expression",)

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        drawn = []
        for entry in self._entries(record):
            expressions = entry["expressions"]
            drawn.append((expressions[int(generator.integers(len(expressions)))], entry["mask"]))
        return self._told(record, drawn)

    def evaluation(self, record: dict[str, Any], sizes: Sizes = ()) -> Told:
        """Every expression."""
        entries = self._entries(record)
        return self._told(
            record, [(text, entry["mask"]) for entry in entries for text in entry["expressions"]]
        )

    def _entries(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        entries = [entry for entry in record.get("referring", ()) if "mask" in entry]
        if not entries:
            raise self.lacks(record, "referring expressions with a mask")
        return entries

    def _told(self, record: dict[str, Any], pairs: list[tuple[str, int]]) -> Told:
        questions = []
        for text, number in pairs:
            named = {"expression": text.strip()}
            questions.append(self.asked(self.filled(record, **named), {"mask": number}, **named))
        return Told(carried(record) | {"questions": questions})
