"""Masks that answers drew, scored against those that were meant.

Knows samples, questions and figures; knows nothing about how answers are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_adapt.data.sizes import seen_size
from vlm_adapt.data.token_masks import mask_of
from vlm_adapt.metrics.masks import mask_metrics, overlaps
from vlm_adapt.models.mask_answer import at_size

if TYPE_CHECKING:
    from vlm_adapt.data.reader import Prompt
    from vlm_adapt.data.sample import Sample
    from vlm_adapt.models.build import Assembled


@dataclass
class Meant:
    """The masks that a sample's questions mean.

    Attributes:
        size: (height, width) of the image that masks are of, the last one; None without images.
        masks: for each question mask_HW of 1, 0 and 255 (see data/token_masks.py).
    """

    size: tuple[int, int] | None = None
    masks: list[list[np.ndarray]] = field(default_factory=list)


def masks_meant(sample: Sample, prompts: Sequence[Prompt], max_pixels: int) -> Meant:
    """What a sample's questions mean.

    Raises:
        BadSample: a mask that is not there or cannot be read.
    """
    size = None
    if sample.images:
        width, height = seen_size(sample.images[-1], max_pixels)
        size = (height, width)
    questions = [question for prompt in prompts for question in prompt.asked.questions]
    return Meant(size, [[mask_of(sample, one) for one in question.masks] for question in questions])


def score(drawn: Sequence[Any], question: int, meant: Meant, assembled: Assembled) -> dict[str, Any]:
    """What an answer's masks add to its line of predictions.

    Args:
        drawn: logits_hw of each, None for one that could not be drawn.
        question: number of the question.
    """
    if assembled.masks is None or meant.size is None:
        return {}
    wanted, spec = meant.masks[question], assembled.masks.image_spec
    shown = [None if one is None else at_size(one, spec, *meant.size) for one in drawn]
    if not wanted and not shown:
        return {}
    pairs = overlaps(shown, wanted)
    return {
        "masks": [list(pair) for pair in pairs],
        "mask_iou": [both / union if union else 1.0 for both, union in pairs],
        "masks_missing": max(0, len(wanted) - sum(one is not None for one in shown)),
        "masks_extra": max(0, len(shown) - len(wanted)),
    }


def answer_masks(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures over all answers, and by kind of question where there are kinds."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "masks" in row:
            kinds.setdefault(str(row["kind"]), []).append(row)
    every = [row for kind in kinds.values() for row in kind]
    metrics = _figures(every)
    if metrics and (len(kinds) > 1 or "None" not in kinds):
        metrics["masks_by_kind"] = {kind: _figures(kinds[kind]) for kind in sorted(kinds)}
    return metrics


def _figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pairs = [(both, union) for row in rows for both, union in row["masks"]]
    missing, extra = (sum(row[name] for row in rows) for name in ("masks_missing", "masks_extra"))
    return mask_metrics(pairs, missing, extra)
