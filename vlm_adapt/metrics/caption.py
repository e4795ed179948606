"""Scores of captions: BLEU-1 to 4, ROUGE-L, CIDEr-D and, where it can run, METEOR.

Equal to pycocoevalcap's on the same captions. Knows how the scores are put together; each is computed in a
file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_adapt.errors import UserError
from vlm_adapt.metrics import pairs
from vlm_adapt.metrics.bleu import corpus_bleu
from vlm_adapt.metrics.cider import cider_d
from vlm_adapt.metrics.meteor import meteor
from vlm_adapt.metrics.ptb_tokenizer import tokenize
from vlm_adapt.metrics.rouge import rouge_l


def _tokens(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    flat = iter(tokenize([answer for answers in references for answer in answers]))
    return tokenize(predictions), [[next(flat) for _ in answers] for answers in references]


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str | None] | None = None
) -> dict[str, float | dict]:
    """Caption scores of a set.

    Args:
        predictions: one caption a sample.
        references: one or more human captions a sample.
        kinds: not used; a caption has no kind of question. (Checked for length all the same.)

    Returns:
        `BLEU-1` to `BLEU-4`, `ROUGE-L` and `METEOR` from 0 to 1, `CIDEr` from 0 to 10 (papers print it times
        100 and call 1.2 "120"), `samples`, and `absent`: {"METEOR": why} where it cannot be computed.

    Raises:
        UserError: nothing to score, or lists of different lengths.
    """
    pairs.check(predictions, references, kinds)
    guesses, answers = _tokens(predictions, references)
    result: dict[str, float | dict] = {
        f"BLEU-{size}": value for size, value in enumerate(corpus_bleu(guesses, answers), start=1)
    }
    overlap = [rouge_l(guess, truth) for guess, truth in zip(guesses, answers, strict=True)]
    consensus = cider_d(guesses, answers)
    result["ROUGE-L"] = sum(overlap) / len(overlap)
    result["CIDEr"] = sum(consensus) / len(consensus)
    try:
        result["METEOR"] = meteor(guesses, answers)[0]
    except UserError as reason:  # no Java, no jar, or a jar that does not run: the other scores still count
        result["absent"] = {"METEOR": str(reason)}
    result["samples"] = len(predictions)
    return result


def sample_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, 0 to 10."""
    pairs.check(predictions, references)
    return cider_d(*_tokens(predictions, references))
