"""Scores of segmentations: one confusion matrix over all pixels, and what is read off it.

Counts are summed over all images before anything is divided: an IoU is never averaged over images. Pure
functions of class numbers in numpy, without torch; knows nothing about models, files or ranks, but counts
are plain sums, so those of ranks merge in any order.

Rules, where tools differ. A class that occurs neither in the truth nor in any prediction has no IoU: it is
named (`absent`) and left out of every mean. One that is predicted and never true has IoU 0 and counts. An
accuracy needs pixels of the class in the truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vlm_adapt.errors import UserError

IGNORE = -1


class Confusion:
    """Pixels by true class (rows) and predicted class (columns): `counts_CC`, int64."""

    def __init__(self, classes: int, counts_CC: np.ndarray | None = None):
        self.counts_CC = np.zeros((classes, classes), np.int64) if counts_CC is None else counts_CC

    def add(self, predicted_HW: np.ndarray, truth_HW: np.ndarray, ignore: int = IGNORE) -> None:
        """Count an image's pixels; those whose truth is `ignore` do not count.

        Raises:
            UserError: the two differ in shape, or a class number is out of range.
        """
        if predicted_HW.shape != truth_HW.shape:
            raise UserError(f"prediction {predicted_HW.shape} and truth {truth_HW.shape} differ in shape")
        valid_HW = truth_HW != ignore
        truth_V, predicted_V = truth_HW[valid_HW].astype(np.int64), predicted_HW[valid_HW].astype(np.int64)
        classes = len(self.counts_CC)
        for what, values_V in (("truth", truth_V), ("prediction", predicted_V)):
            if values_V.size and not 0 <= values_V.min() <= values_V.max() < classes:
                wrong = int(values_V.min()) if values_V.min() < 0 else int(values_V.max())
                raise UserError(f"class {wrong} of the {what} is not among 0 to {classes - 1}")
        counts = np.bincount(truth_V * classes + predicted_V, minlength=classes * classes)
        self.counts_CC += counts.reshape(classes, classes)

    def merge(self, other: Confusion) -> None:
        """Add another rank's counts to these."""
        self.counts_CC += other.counts_CC

    @property
    def pixels_C(self) -> np.ndarray:
        """True pixels of each class."""
        return self.counts_CC.sum(1)

    @property
    def iou_C(self) -> np.ndarray:
        """Intersection over union of each class; NaN where the union is empty."""
        hits_C = np.diagonal(self.counts_CC)
        return _ratio(hits_C, self.pixels_C + self.counts_CC.sum(0) - hits_C)

    @property
    def accuracy_C(self) -> np.ndarray:
        """Share of each class's pixels that are found; NaN where it has none."""
        return _ratio(np.diagonal(self.counts_CC), self.pixels_C)

    def miou(self, classes: Iterable[int] | None = None) -> float:
        """Mean IoU over these classes (all), absent ones left out; NaN if none is left."""
        iou_C = self.iou_C
        return mean(iou_C if classes is None else iou_C[list(classes)])

    def pixel_accuracy(self) -> float:
        """Share of pixels that are right."""
        total = int(self.counts_CC.sum())
        return int(np.trace(self.counts_CC)) / total if total else math.nan

    def mean_accuracy(self) -> float:
        """Mean over classes of the share of their pixels that are found."""
        return mean(self.accuracy_C)

    def frequency_weighted_iou(self) -> float:
        """IoU weighted by each class's share of true pixels."""
        pixels_C = self.pixels_C
        there_C = pixels_C > 0
        weighted = float((self.iou_C[there_C] * pixels_C[there_C]).sum())
        return weighted / float(pixels_C.sum()) if there_C.any() else math.nan

    def fb_iou(self, background: int = 0) -> float:
        """Mean IoU of background and foreground, all other classes taken as one."""
        back_C = np.arange(len(self.counts_CC)) == background
        groups_2C = np.stack([back_C, ~back_C]).astype(np.int64)
        return Confusion(2, groups_2C @ self.counts_CC @ groups_2C.T).miou()

    def majority(self) -> dict[str, Any]:
        """What always answering the most frequent true class would score on the same pixels."""
        pixels_C = self.pixels_C
        most, total = int(pixels_C.argmax()), int(pixels_C.sum())
        share = int(pixels_C[most]) / total if total else math.nan
        classes = max(1, int(np.count_nonzero(pixels_C)))
        return {"class": most, "miou": share / classes, "pixel_accuracy": share}

    def chance_C(self) -> np.ndarray:
        """IoU of each class that evenly drawn answers would come to; NaN where it has no true pixel."""
        pixels_C, classes = self.pixels_C, len(self.counts_CC)
        expected_C = pixels_C / classes
        union_C = pixels_C + pixels_C.sum() / classes - expected_C
        return np.where(pixels_C > 0, expected_C / np.maximum(union_C, 1e-12), math.nan)

    def to_dict(self, labels: Sequence[str]) -> dict[str, Any]:
        """All figures, with classes by name; absent classes are named and have no figures."""
        iou_C, accuracy_C, pixels_C = self.iou_C, self.accuracy_C, self.pixels_C
        majority = self.majority()
        majority["class"] = labels[majority["class"]]
        chance = {"miou": mean(self.chance_C()), "pixel_accuracy": 1 / len(labels)}
        return {
            "miou": self.miou(),
            "pixel_accuracy": self.pixel_accuracy(),
            "mean_accuracy": self.mean_accuracy(),
            "frequency_weighted_iou": self.frequency_weighted_iou(),
            "per_class": {
                label: {"iou": float(iou), "accuracy": _known(accuracy), "pixels": int(pixels)}
                for label, iou, accuracy, pixels in zip(labels, iou_C, accuracy_C, pixels_C, strict=True)
                if not math.isnan(iou)
            },
            "absent": [label for label, iou in zip(labels, iou_C, strict=True) if math.isnan(iou)],
            "pixels": int(self.counts_CC.sum()),
            "baselines": {"majority": majority, "chance": chance},
        }


class NamedConfusion:
    """A confusion matrix that grows with the labels it meets: each image may bring labels of its own."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.confusion = Confusion(0)

    @property
    def labels(self) -> list[str]:
        """In the order of rows and columns."""
        return list(self.places)

    def add(
        self, predicted_HW: np.ndarray, truth_HW: np.ndarray, labels: Sequence[str], ignore: int = IGNORE
    ) -> None:
        """Count an image whose class numbers mean these labels; equal labels are one class."""
        own = Confusion(len(labels))
        own.add(predicted_HW, truth_HW, ignore)
        self._enter(own.counts_CC, labels)

    def merge(self, other: NamedConfusion) -> None:
        """Add counts of another, label by label."""
        self._enter(other.confusion.counts_CC, other.labels)

    def plain(self) -> tuple[list[str], np.ndarray]:
        """Labels and counts_CC, to be sent to another rank."""
        return self.labels, self.confusion.counts_CC

    @classmethod
    def from_plain(cls, labels: Sequence[str], counts_CC: np.ndarray) -> NamedConfusion:
        """The inverse of `plain`."""
        made = cls()
        made._enter(counts_CC, labels)
        return made

    def _enter(self, counts_CC: np.ndarray, labels: Sequence[str]) -> None:
        for label in labels:
            self.places.setdefault(label, len(self.places))
        grown = len(self.places) - len(self.confusion.counts_CC)
        if grown:
            self.confusion = Confusion(0, np.pad(self.confusion.counts_CC, (0, grown)))
        place_C = np.array([self.places[label] for label in labels], np.int64)
        np.add.at(self.confusion.counts_CC, (place_C[:, None], place_C[None, :]), counts_CC)


class EpisodeCounts:
    """Intersections and unions of the few- and zero-shot protocols, per class over all episodes.

    An episode asks for one class: its foreground is that class and its background all else. As HSNet (Min et
    al. 2021, arXiv 2104.01538) and LSeg (Li et al. 2022, arXiv 2201.03546) count: mIoU is the mean over the
    classes of the foreground's IoU, FB-IoU the mean of background's and foreground's, each summed over all
    classes first. Row 0 is the background, row 1 the foreground.
    """

    def __init__(self, classes: int):
        self.intersection_2C = np.zeros((2, classes), np.int64)
        self.union_2C = np.zeros((2, classes), np.int64)
        self.episodes_C = np.zeros(classes, np.int64)

    def add(
        self,
        number: int,
        predicted_HW: np.ndarray,
        truth_HW: np.ndarray,
        times: int = 1,
        ignore: int = IGNORE,
    ) -> None:
        """Count an episode of class `number` that comes so many times.

        Args:
            predicted_HW, truth_HW: 1 class, 0 other; truth may be `ignore`.
        """
        own = Confusion(2)
        own.add(predicted_HW, truth_HW, ignore)
        hits_2 = np.diagonal(own.counts_CC)
        self.intersection_2C[:, number] += times * hits_2
        self.union_2C[:, number] += times * (own.counts_CC.sum(0) + own.counts_CC.sum(1) - hits_2)
        self.episodes_C[number] += times

    def merge(self, other: EpisodeCounts) -> None:
        """Add another rank's counts to these."""
        self.intersection_2C += other.intersection_2C
        self.union_2C += other.union_2C
        self.episodes_C += other.episodes_C

    @property
    def iou_C(self) -> np.ndarray:
        """Foreground IoU of each class; NaN where no episode had a pixel of it, true or predicted."""
        return _ratio(self.intersection_2C[1], self.union_2C[1])

    def miou(self) -> float:
        """Mean foreground IoU over the classes that have one."""
        return mean(self.iou_C)

    def fb_iou(self) -> float:
        """Mean of background's and foreground's IoU."""
        return mean(_ratio(self.intersection_2C.sum(1), self.union_2C.sum(1)))


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b); 0 where one is 0, NaN where one is."""
    return 2 * first * second / (first + second) if first + second else 0.0


def mean(values: np.ndarray) -> float:
    """Mean of those that are numbers; NaN if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / np.maximum(below, 1), math.nan)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
