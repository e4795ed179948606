"""ROUGE-L (Lin 2004) as pycocoevalcap computes it: beta 1.2, the best precision and the best recall.

The two maxima are taken over the references separately, so they may come from different ones. Takes
tokenised strings and knows nothing about tokenising.
"""

from __future__ import annotations

from collections.abc import Sequence

BETA = 1.2


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest sequence of words that occurs in both, in order, gaps allowed."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for column, other in enumerate(b, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """The score of one sample, 0 to 1. An empty text counts as one empty word, as in pycocoevalcap."""
    words = prediction.split(" ")
    precision = recall = 0.0
    for answer in answers:
        others = answer.split(" ")
        common = longest_common_subsequence(words, others)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(others))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
