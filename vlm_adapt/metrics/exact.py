"""Exact match for closed answers (easy-vqa, NLVR).

Answers are equal when they are after lowercasing, joining runs of white space, and removing one full stop at
the end. Knows nothing about partial credit, articles or digits: vqa.py does.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_adapt.metrics import pairs


def normalise(text: str) -> str:
    """`" Blue. "` -> `"blue"`."""
    return " ".join(text.lower().split()).removesuffix(".").rstrip()


def sample_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1.0 for each prediction that equals any of its references, else 0.0."""
    pairs.check(predictions, references)
    return [
        float(normalise(prediction) in {normalise(answer) for answer in answers})
        for prediction, answers in zip(predictions, references, strict=True)
    ]


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str | None] | None = None
) -> dict[str, float | dict]:
    """Share of exact matches: `accuracy` (0 to 1), `samples` and, with kinds, `accuracy_by_kind`."""
    pairs.check(predictions, references, kinds)
    return pairs.accuracy(sample_scores(predictions, references), kinds)
