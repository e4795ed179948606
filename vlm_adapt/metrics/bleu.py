"""BLEU over a whole set (Papineni et al. 2002), as pycocoevalcap counts it.

n-gram matches, n-grams and lengths are summed over the samples before anything is divided; the reference
length of a sample is that of the reference closest to the prediction, the shorter one on a tie. Takes
tokenised strings and knows nothing about tokenising.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

# pycocoevalcap's guards against 0/0 show in the last digits of a score of few n-grams, so they are the same.
_TINY, _SMALL = 1e-15, 1e-9


def ngrams(words: Sequence[str], longest: int = 4) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to `longest` words occurs."""
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, longest + 1)
        for start in range(len(words) - size + 1)
    )


def corpus_bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the set, each from 0 to 1, from tokens joined by spaces."""
    matched, guessed = [0] * 4, [0] * 4
    length = reference_length = 0
    for prediction, answers in zip(predictions, references, strict=True):
        words = prediction.split()
        ceiling: Counter[tuple[str, ...]] = Counter()
        for answer in answers:
            ceiling |= ngrams(answer.split())  # the most often that any one reference has it
        for gram, count in (ngrams(words) & ceiling).items():
            matched[len(gram) - 1] += count
        for size in range(4):
            guessed[size] += max(0, len(words) - size)
        length += len(words)
        lengths = [len(answer.split()) for answer in answers]
        reference_length += min(lengths, key=lambda n: (abs(n - len(words)), n))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for size in range(4):
        product *= (matched[size] + _TINY) / (guessed[size] + _SMALL)
        scores.append(product ** (1 / (size + 1)) * brevity)
    return scores
