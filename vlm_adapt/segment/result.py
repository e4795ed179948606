"""What a model says of an image: the label of every pixel, and how sure it is. Knows arrays and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NONE = 65535  # of a pixel without a label


@dataclass
class Segmentation:
    """The masks of an image as one map; a pixel has one label or none.

    Args:
        classes_HW: uint16, places in `names`; NONE where there is no label.
        names: as they are shown.
        confidence_HW: float32, 0 to 1, of the pixel's own label; None where a model gives none.
        scores_LHW: chances of every label, for `--scores`.
        scores: a label's score, where the model gives one for the whole mask (SAM's estimate of IoU).
        listed: whether names mean something, and belong into a legend.
        figures: what else is to be told in `--json`.
    """

    classes_HW: np.ndarray
    names: Sequence[str]
    confidence_HW: np.ndarray | None = None
    scores_LHW: np.ndarray | None = None
    scores: Sequence[float] | None = None
    listed: bool = True
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        flat = self.classes_HW.ravel()
        sizes = np.bincount(flat, minlength=NONE + 1)[: len(self.names)]
        self.shares: list[float] = (sizes / flat.size).tolist()
        self.means: list[float | None] = [None] * len(self.names)
        if self.scores is not None:
            self.means = [float(score) for score in self.scores]
        elif self.confidence_HW is not None:
            sums = np.bincount(flat, self.confidence_HW.ravel(), NONE + 1)[: len(self.names)]
            self.means = [
                float(total) / int(size) if size else None for total, size in zip(sums, sizes, strict=True)
            ]

    def rows(self) -> list[dict[str, Any]]:
        """A line a label, the largest first: label, share of the image, mean score (None where absent)."""
        order = sorted(range(len(self.names)), key=lambda place: -self.shares[place])
        return [
            {"label": self.names[place], "share": self.shares[place], "score": self.means[place]}
            for place in order
        ]
