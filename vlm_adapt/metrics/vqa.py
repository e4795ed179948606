"""VQA accuracy (Antol et al. 2015), by the rules of the official evaluator of the VQA data set.

An answer is worth min(people who gave it / 3, 1), averaged over the subsets that leave one person out. Texts
are cleaned of punctuation, articles and spelt-out digits only where the people disagree: the official
evaluator compares an answer on which all agree as it stands (but for white space), capitals included.
Knows nothing about models.

What the official rules do not give, and ours do: with fewer than four answers, nobody could reach 1, so as
many matches as there are others are enough; a lone answer is compared after cleaning both sides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlm_adapt.metrics import pairs

NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = frozenset(["a", "an", "the"])
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32  # the official code passes re.UNICODE, which is 32, where re.sub expects a count

# Where the apostrophe belongs in words written without it: their last letters, by first part.
_NOT = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_ENDINGS = {
    "d": "how it someone something there they where who you he",
    "ll": "how it somebody someone something they what who why you",
    "s": "he how somebody someone that there what when where who why",
    "re": "there they what why you",
    "ve": "could might must should they we what where who would you",
}
# Two clitics: written "whod've" or "who'dve" for "who'd've".
_DOUBLE = "he it she somebody someone something there they we who you".split()
_DOUBLE_NOT = "could had might should would".split()
_OTHERS = {
    "maam": "ma'am",
    "notve": "not've",
    "oclock": "o'clock",
    "somebody'd": "somebodyd",  # the wrong way round in the official table
    "twas": "'twas",
    "yall": "y'all",
    **dict.fromkeys(["ow's'at", "'ows'at", "'ow'sat"], "'ow's'at"),
    **dict.fromkeys(["yall'll", "y'allll"], "y'all'll"),
    **dict.fromkeys(["yall'd've", "y'alld've", "y'all'dve"], "y'all'd've"),
}


def _contractions() -> dict[str, str]:
    table = _OTHERS | {f"{stem}nt": f"{stem}n't" for stem in _NOT.split()}
    for ending, stems in _ENDINGS.items():
        table |= {f"{stem}{ending}": f"{stem}'{ending}" for stem in stems.split()}
    for stem in _DOUBLE:
        table |= {f"{stem}d've": f"{stem}'d've", f"{stem}'dve": f"{stem}'d've"}
    for stem in _DOUBLE_NOT:
        table |= {f"{stem}nt've": f"{stem}n't've", f"{stem}n'tve": f"{stem}n't've"}
    return table


CONTRACTIONS = _contractions()


def clean(text: str) -> str:
    """`"The two cats, dont run."` -> `"2 cats don't run"`, by the official rules in the official order.

    A punctuation mark that touches a space anywhere in the text is deleted everywhere, otherwise it becomes a
    space; all are deleted when the text has a comma between digits. A full stop stays before a digit only.
    """
    deleted = _COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if deleted or beside_space else " ")
    result = _FULL_STOP.sub("", result, count=_MOST_FULL_STOPS)
    words = [DIGITS.get(word, word) for word in result.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _straighten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def accuracy_of(prediction: str, answers: Sequence[str]) -> float:
    """The VQA accuracy of one prediction, 0 to 1, against the people's answers (ten in VQAv2)."""
    prediction, answers = _straighten(prediction), [_straighten(answer) for answer in answers]
    if len(set(answers)) > 1 or len(answers) == 1:
        prediction, answers = clean(prediction), [clean(answer) for answer in answers]
    if len(answers) == 1:
        return float(prediction == answers[0])
    same = [answer == prediction for answer in answers]
    enough = min(3, len(answers) - 1)
    return sum(min((sum(same) - one) / enough, 1.0) for one in same) / len(answers)


def sample_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The VQA accuracy of each prediction."""
    pairs.check(predictions, references)
    return [accuracy_of(p, answers) for p, answers in zip(predictions, references, strict=True)]


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str | None] | None = None
) -> dict[str, float | dict]:
    """VQA accuracy of a set: `accuracy` (0 to 1), `samples` and, with kinds, `accuracy_by_kind`."""
    pairs.check(predictions, references, kinds)
    return pairs.accuracy(sample_scores(predictions, references), kinds)
