"""The masks of a sample that a prompt can mean: of objects, of labels or their connected regions, of words.

Knows a sample's record and mask files; knows nothing about prompts, pixels of images or models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_adapt.data.masks import check_values, ignored_value, read_mask
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.prompt_draws import IGNORED
from vlm_adapt.data.regions import components
from vlm_adapt.data.sample import Sample


@dataclass
class Candidate:
    """A mask of a sample that may be drawn.

    Attributes:
        area: pixels inside.
        draw: gives mask_HW, uint8: 1, 0 and 255.
        words: what it may be called; empty where no words mean it alone.
    """

    area: int
    draw: Callable[[], np.ndarray]
    words: tuple[str, ...] = ()


def shape_masks(sample: Sample, which: str) -> list[Candidate]:
    """Masks for prompts that show a place."""
    if which in ("auto", "objects"):
        entries = [*sample.record.get("objects", ()), *sample.record.get("referring", ())]
        numbers = dict.fromkeys(entry["mask"] for entry in entries if "mask" in entry)
        if numbers or which == "objects":
            return [_binary(sample, [number]) for number in numbers]
    if sample.mask is None:
        return []
    values_HW = _semantic(sample)
    found = []
    for value, _ in _labels(sample, values_HW):
        if which == "labels":
            found.append(_region(values_HW, [value]))
            continue
        numbers_HW = components(values_HW == value)
        for number, area in enumerate(np.bincount(numbers_HW.ravel())[1:].tolist(), 1):
            found.append(_component(values_HW, numbers_HW, number, area))
    return found


def named_masks(sample: Sample) -> list[Candidate]:
    """Masks that words mean: whole labels, all objects of a label, and what expressions refer to."""
    found = []
    for entry in sample.record.get("referring", ()):
        if "mask" in entry:
            # A bar would part synonyms of a label.
            words = tuple(text.replace("|", " ") for text in entry["expressions"])
            found.append(_binary(sample, [entry["mask"]], words))
    if sample.mask is not None:
        values_HW = _semantic(sample)
        by_name: dict[str, list[int]] = {}
        for value, name in _labels(sample, values_HW):
            by_name.setdefault(name, []).append(value)
        return found + [_region(values_HW, values, (name,)) for name, values in by_name.items()]
    objects: dict[str, list[int | None]] = {}
    for entry in sample.record.get("objects", ()):
        objects.setdefault(entry["label"].strip(), []).append(entry.get("mask"))
    for name, masks in objects.items():
        numbers = [number for number in masks if number is not None]
        if len(numbers) == len(masks):  # else some of them are not drawn, and the words mean these too
            found.append(_binary(sample, numbers, (name,)))
    return found


def _semantic(sample: Sample) -> np.ndarray:
    """The semantic mask, checked. Raises BadSample."""
    assert sample.mask is not None
    names = [name.strip() for name in sample.record.get("labels", ())]
    if not names:
        raise BadSample("mask without labels", f"the record has {', '.join(sample.record)}")
    values_HW = read_mask(sample.mask)
    check_values(values_HW, names)
    return values_HW


def _labels(sample: Sample, values_HW: np.ndarray) -> list[tuple[int, str]]:
    """(value, name) of the labels that occur."""
    names = [name.strip() for name in sample.record["labels"]]
    there = np.unique(values_HW).tolist()
    return [(value, names[value]) for value in there if value != ignored_value(values_HW)]


def _binary(sample: Sample, numbers: Sequence[int], words: tuple[str, ...] = ()) -> Candidate:
    inside_HW = np.any([read_mask(sample.masks[number]) > 0 for number in numbers], axis=0)
    return Candidate(int(inside_HW.sum()), lambda: inside_HW.astype(np.uint8), words)


def _region(values_HW: np.ndarray, values: Sequence[int], words: tuple[str, ...] = ()) -> Candidate:
    def draw() -> np.ndarray:
        return _with_unknown(np.isin(values_HW, values), values_HW)

    return Candidate(int(np.isin(values_HW, values).sum()), draw, words)


def _component(values_HW: np.ndarray, numbers_HW: np.ndarray, number: int, area: int) -> Candidate:
    return Candidate(area, lambda: _with_unknown(numbers_HW == number, values_HW))


def _with_unknown(inside_HW: np.ndarray, values_HW: np.ndarray) -> np.ndarray:
    mask_HW = inside_HW.astype(np.uint8)
    mask_HW[values_HW == ignored_value(values_HW)] = IGNORED
    return mask_HW
