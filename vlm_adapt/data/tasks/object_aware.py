"""Object-aware questions, made of a sample's objects: which there are, and whether some are there.

PaLI, arXiv:2209.06794, section 3.2 ("object-aware VQA": listing all objects, and whether a subset of them is
in the image), after Piergiovanni et al. 2022 (arXiv:2209.04372). The wording is PaliGemma's
(arXiv:2407.07726, section 3.2.5), which adds counting.

Objects that nobody marked count as absent: what is asked is only as complete as the annotation.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks.prompts import check_prompt
from vlm_adapt.data.tasks.task import SETTINGS, Sizes, Task, Told, carried
from vlm_adapt.data.tasks.vocabulary import Vocabulary, absent, labels_in, names_of, vocabulary_of

Form = Literal["listing", "presence", "subset", "counting"]


@dataclass(frozen=True, config=SETTINGS)
class ObjectAware(Task):
    """One question of each form; the form is the question's `kind`. `questions_per_image` draws among them.

    Attributes:
        forms: which questions are made.
        listing, presence, subset, counting: their words; {object} is a name, {objects} several.
        yes_answer, no_answer: of presence.
        none_answer: of a subset of which nothing is there.
        separator: between names.
        subset_size: how many names are asked for at once.
        vocabulary: names of objects, or a file with one a line; None takes each sample's `labels`.
    """

    forms: tuple[Form, ...] = Field(default=("listing", "presence", "subset", "counting"), min_length=1)
    listing: str = "What objects are in the image?"
    presence: str = "Is {object} in the image?"
    subset: str = "Which of {objects} are in the image?"
    counting: str = "How many {object}?"
    yes_answer: str = "yes"
    no_answer: str = "no"
    none_answer: str = "none"
    separator: str = ", "
    subset_size: int = Field(default=4, gt=1)
    vocabulary: Vocabulary = None

    name: ClassVar[str] = "object_aware"
    prompts: ClassVar[dict[str, str]] = {
        "pali": "Answer in {lang}: {question}",
        "paligemma": "answer {lang} {question}",
    }
    fields: ClassVar[tuple[str, ...]] = ("question",)
    required: ClassVar[tuple[str, ...]] = ("question",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.forms)) < len(self.forms):
            raise ValueError("forms names one of them twice")
        check_prompt("listing", self.listing, ())
        check_prompt("presence", self.presence, ("object",), ("object",))
        check_prompt("subset", self.subset, ("objects",), ("objects",))
        check_prompt("counting", self.counting, ("object",), ("object",))
        if self.vocabulary is not None:
            names_of(self.vocabulary)

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        if "objects" not in record:
            raise self.lacks(record, "objects")
        makers = {
            "listing": self._listing,
            "presence": self._presence,
            "subset": self._subset,
            "counting": self._counting,
        }
        questions = []
        for form in self.forms:
            asked = makers[form](record, generator)
            if asked is not None:
                question = self.filled(record, question=asked[0])
                questions.append({"question": question, "answer": asked[1], "kind": form})
        if not questions:
            raise BadSample("no object to ask for")
        return Told(carried(record) | {"questions": questions})

    def _listing(self, record: dict[str, Any], generator: np.random.Generator) -> tuple[str, str] | None:
        labels = labels_in(record)
        return (self.listing.format(), self.separator.join(labels)) if labels else None

    def _presence(self, record: dict[str, Any], generator: np.random.Generator) -> tuple[str, str] | None:
        """A name that is there, or as often one that is not."""
        labels = labels_in(record)
        others = absent(vocabulary_of(self.vocabulary, record), labels, 1, generator)
        there = bool(labels) and (not others or generator.random() < 0.5)
        if not there and not others:
            return None
        name = labels[int(generator.integers(len(labels)))] if there else others[0]
        return self.presence.format(object=name), self.yes_answer if there else self.no_answer

    def _subset(self, record: dict[str, Any], generator: np.random.Generator) -> tuple[str, str] | None:
        """Names of which none, some or all are there, every number of them as likely."""
        labels = labels_in(record)
        count = int(generator.integers(min(len(labels), self.subset_size) + 1))
        shown = {labels[place] for place in generator.choice(len(labels), count, replace=False).tolist()}
        names = vocabulary_of(self.vocabulary, record)
        asked = sorted(shown) + absent(names, labels, self.subset_size - count, generator)
        if len(asked) < 2:
            return None
        asked = [asked[place] for place in generator.permutation(len(asked)).tolist()]
        there = [name for name in asked if name in shown]
        question = self.subset.format(objects=self.separator.join(asked))
        return question, self.separator.join(there) or self.none_answer

    def _counting(self, record: dict[str, Any], generator: np.random.Generator) -> tuple[str, str] | None:
        labels = labels_in(record)
        if not labels:
            return None
        name = labels[int(generator.integers(len(labels)))]
        count = sum(entry["label"] == name for entry in record["objects"])
        return self.counting.format(object=name), str(count)
