"""Detection as text: names are asked for, boxes are written as words, and read back.

Pix2Seq, arXiv:2109.10852: corners y0 x0 y1 x1, each coordinate in bins, then the class; objects in random
order in training. PaliGemma, arXiv:2407.07726: "detect a ; b" is answered by "<loc0102>...<loc0991> a ; ..."
with tokens <loc0000> to <loc1023>, which its tokenizer has. For other tokenizers `coordinates: numbers`
writes the bins as plain numbers.

    bin = round(v / size * (bins - 1))        v = bin / (bins - 1) * size

so that a box comes back to within half a bin.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks.task import SETTINGS, Sizes, Task, Told, carried, fixed
from vlm_adapt.data.tasks.vocabulary import Vocabulary, absent, labels_in, names_of, vocabulary_of

SEPARATOR = " ; "
OUTSIDE = 1.0  # pixels by which a box may leave its image: annotations round


class Found(NamedTuple):
    """An object read from text; `box` is [x0, y0, x1, y1] in pixels."""

    label: str
    box: list[float]


@dataclass(frozen=True, config=SETTINGS)
class Detection(Task):
    """All objects of the names asked for.

    Attributes:
        coordinates: `loc` writes <loc0123>, `numbers` 123.
        bins: how many values a coordinate has.
        most_objects: in training, names are drawn so that their objects are not more; evaluation asks
            for all.
        absent: how many names of objects that are not there are asked for, too.
        vocabulary: where absent names come from; a file with one a line, or None for a sample's `labels`.
    """

    coordinates: Literal["loc", "numbers"] = "loc"
    bins: int = Field(default=1024, gt=1, le=10_000)
    most_objects: int | None = Field(default=None, gt=0)
    absent: int = Field(default=0, ge=0)
    vocabulary: Vocabulary = None

    name: ClassVar[str] = "detection"
    prompts: ClassVar[dict[str, str]] = {"pali": "detect {objects}", "paligemma": "detect {objects}"}
    fields: ClassVar[tuple[str, ...]] = ("objects",)
    required: ClassVar[tuple[str, ...]] = ("objects",)
    needs_sizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary is not None:
            names_of(self.vocabulary)

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        objects = self._objects(record, sizes)
        labels = labels_in(record)
        labels = [labels[place] for place in generator.permutation(len(labels)).tolist()]
        kept = self._within(labels, objects)
        names = kept + self._absent(record, labels, generator)
        names = [names[place] for place in generator.permutation(len(names)).tolist()]
        objects = [objects[place] for place in generator.permutation(len(objects)).tolist()]
        shown = [entry for entry in objects if entry["label"] in kept]
        return self._told(record, names, shown, sizes[0])

    def evaluation(self, record: dict[str, Any], sizes: Sizes = ()) -> Told:
        """All names in alphabetical order, objects in the record's."""
        objects = self._objects(record, sizes)
        labels = labels_in(record)
        names = sorted(labels + self._absent(record, labels, fixed(record)))
        return self._told(record, names, objects, sizes[0])

    def _objects(self, record: dict[str, Any], sizes: Sizes) -> list[dict[str, Any]]:
        objects: list[dict[str, Any]] = record.get("objects") or []
        if not objects:
            raise self.lacks(record, "an object")
        if len(sizes) != 1:
            raise BadSample("the task 'detection' needs exactly one image", f"the sample has {len(sizes)}")
        for entry in objects:
            if SEPARATOR.strip() in entry["label"]:
                raise BadSample("the label of an object holds ';', which parts objects", entry["label"])
        return objects

    def _within(self, labels: list[str], objects: list[dict[str, Any]]) -> list[str]:
        """The first labels whose objects are not more than `most_objects`; an object is never left out
        while its name is asked for."""
        if self.most_objects is None:
            return labels
        kept, left = [], self.most_objects
        for label in labels:
            count = sum(entry["label"] == label for entry in objects)
            if count <= left:
                kept.append(label)
                left -= count
        if not kept:
            raise BadSample("each of its labels has more objects than most_objects")
        return kept

    def _absent(self, record: dict[str, Any], labels: list[str], generator: np.random.Generator) -> list[str]:
        if not self.absent:
            return []
        return absent(vocabulary_of(self.vocabulary, record), labels, self.absent, generator)

    def _told(
        self, record: dict[str, Any], names: list[str], objects: list[dict[str, Any]], size: tuple[int, int]
    ) -> Told:
        answer = self.write([(entry["label"], entry["box"]) for entry in objects], size)
        question = self.filled(record, objects=SEPARATOR.join(names))
        return Told(carried(record) | {"question": question, "answer": answer})

    def write(self, objects: list[tuple[str, list[float]]], size: tuple[int, int]) -> str:
        """Objects as text.

        Args:
            objects: (label, [x0, y0, x1, y1] in pixels).
            size: (width, height) of the image.

        Raises:
            BadSample: a box leaves its image by more than a pixel.
        """
        pieces = []
        for label, (x0, y0, x1, y1) in objects:
            pairs = ((y0, size[1]), (x0, size[0]), (y1, size[1]), (x1, size[0]))
            if any(not -OUTSIDE <= value <= length + OUTSIDE for value, length in pairs):
                raise BadSample("a box leaves its image", f"{[x0, y0, x1, y1]} in {size[0]} x {size[1]}")
            words = [self._word(min(max(value / length, 0.0), 1.0)) for value, length in pairs]
            pieces.append(("" if self.coordinates == "loc" else " ").join(words) + f" {label}")
        return SEPARATOR.join(pieces)

    def _word(self, value: float) -> str:
        number = round(value * (self.bins - 1))
        return f"<loc{number:04d}>" if self.coordinates == "loc" else str(number)

    def read(self, text: str, size: tuple[int, int]) -> tuple[list[Found], int]:
        """Objects of a text that a model wrote: the inverse of `write`, to within half a bin.

        Returns:
            (objects, how many pieces are none: other words, no label, bins that cannot be)
        """
        number, between = (r"<loc(\d{4})>", r"\s*") if self.coordinates == "loc" else (r"(\d{1,5})", r"\s+")
        pattern = re.compile(between.join([number] * 4) + r"\s+(\S.*)", re.DOTALL)
        found, unread = [], 0
        for piece in filter(None, (part.strip() for part in text.split(SEPARATOR.strip()))):
            match = pattern.fullmatch(piece)
            bins = [int(word) for word in match.groups()[:4]] if match else []
            if match is None or max(bins) >= self.bins or bins[0] > bins[2] or bins[1] > bins[3]:
                unread += 1
                continue
            y0, x0, y1, x1 = (place / (self.bins - 1) for place in bins)
            box = [x0 * size[0], y0 * size[1], x1 * size[0], y1 * size[1]]
            found.append(Found(match.group(5), box))
        return found, unread
