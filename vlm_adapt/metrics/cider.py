"""CIDEr-D (Vedantam, Zitnick and Parikh 2015) as pycocoevalcap computes it.

Cosine of tf-idf vectors of 1- to 4-grams with the prediction's weights clipped to the reference's, damped by
a Gaussian of the difference in length (sigma 6), averaged over n and the references, times 10. Document
frequencies come from the references of the evaluated set itself, so a set of one sample scores 0 and scores
of different sets cannot be compared. Takes tokenised strings and knows nothing about tokenising.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from vlm_adapt.metrics.bleu import ngrams

SIGMA = 6.0


class _Vector:
    """tf-idf weights of a text by n-gram size, their norms, and its length (counted in word pairs)."""

    def __init__(self, text: str, documents: Counter[tuple[str, ...]], log_samples: float):
        self.weights: list[dict[tuple[str, ...], float]] = [{}, {}, {}, {}]
        self.length = 0
        for gram, count in ngrams(text.split()).items():
            inverse = log_samples - math.log(max(1, documents[gram]))
            self.weights[len(gram) - 1][gram] = count * inverse
            self.length += count * (len(gram) == 2)
        self.norms = [math.sqrt(sum(w * w for w in weights.values())) for weights in self.weights]


def _similarity(guess: _Vector, truth: _Vector) -> float:
    total = 0.0
    for size in range(4):
        there = truth.weights[size]
        shared = [gram for gram in guess.weights[size] if gram in there]
        product = sum(min(guess.weights[size][gram], there[gram]) * there[gram] for gram in shared)
        norms = guess.norms[size] * truth.norms[size]
        total += product / norms if norms else product
    return total * math.exp(-((guess.length - truth.length) ** 2) / (2 * SIGMA**2)) / 4


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of each sample, 0 to 10, from tokens joined by spaces; the set's score is their mean."""
    documents: Counter[tuple[str, ...]] = Counter()
    for answers in references:
        documents.update({gram for answer in answers for gram in ngrams(answer.split())})
    log_samples = math.log(len(references))
    scores = []
    for prediction, answers in zip(predictions, references, strict=True):
        guess = _Vector(prediction, documents, log_samples)
        similar = [_similarity(guess, _Vector(answer, documents, log_samples)) for answer in answers]
        scores.append(10 * sum(similar) / len(similar))
    return scores
