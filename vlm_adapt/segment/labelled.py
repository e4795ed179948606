"""A segmenter asked for labels in words: every pixel gets the one that fits best.

Knows the ask and dense inference; knows nothing about files.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.models.dense_inference import LABELS, DenseInference
from vlm_adapt.segment.ask import Ask
from vlm_adapt.segment.result import Segmentation
from vlm_adapt.text.labels import shown

MOST_SCORES = 2**30  # float32 values of all chances of one image: 4 GB


class Labelled:
    """See segment/kinds.py."""

    def __init__(self, assembled: Any, ask: Ask):
        self.inference = DenseInference(
            assembled.model, ask.window, ask.scales, ask.flip, base_size=ask.base_size
        )
        self.labels, self.scores = ask.labels, ask.scores

    @staticmethod
    def check(ask: Ask, config: Any) -> None:
        """Raises UserError: no labels, too many, or asked for what belongs to promptable models."""
        ask.only(("labels", "window", "scales", "flip", "base_size", "scores"), "a segmenter")
        if not ask.labels:
            raise UserError('a segmenter finds what it is told: give --labels "cat, grass, other"')
        if len(ask.labels) > LABELS:
            raise UserError(
                f"{len(ask.labels):,} labels are more than a mask of 16 bits holds: at most {LABELS:,}"
            )
        DenseInference(None, ask.window, ask.scales, ask.flip, base_size=ask.base_size)

    def __call__(self, pixels_HWC: np.ndarray) -> Segmentation:
        """The best label of every pixel."""
        names = [shown(label) for label in self.labels]
        if not self.scores:
            classes_HW, confidence_HW = self.inference.classes(pixels_HWC, self.labels)
            return Segmentation(classes_HW, names, confidence_HW)
        height, width = pixels_HWC.shape[:2]
        if len(names) * height * width > MOST_SCORES:
            gigabytes = len(names) * height * width * 4 / 1e9
            detail = f"{len(names):,} labels on {width} x {height} pixels are {gigabytes:.0f} GB"
            raise BadSample("scores too large (use fewer labels, or leave out --scores)", detail)
        scores_LHW = self.inference.scores(pixels_HWC, self.labels)
        scores_LHW -= scores_LHW.max(0)
        np.exp(scores_LHW, out=scores_LHW)
        scores_LHW /= scores_LHW.sum(0)
        classes_HW = scores_LHW.argmax(0).astype(np.uint16)
        return Segmentation(classes_HW, names, scores_LHW.max(0), scores_LHW)
