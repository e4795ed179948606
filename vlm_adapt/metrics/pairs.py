"""What all metrics share: checking predictions against references, and means by kind of sample.

Knows nothing about how a prediction is scored.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm_adapt.errors import UserError


def check(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str | None] | None = None
) -> None:
    """Raise UserError unless there is a prediction, at least one reference and (if given) a kind a sample."""
    if not predictions:
        raise UserError("there is nothing to score: the list of predictions is empty")
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions but {len(references)} lists of references to score")
    if kinds is not None and len(kinds) != len(predictions):
        raise UserError(f"{len(predictions)} predictions but {len(kinds)} kinds to score them by")
    for index, answers in enumerate(references):
        if isinstance(answers, str):
            raise UserError(f"the references of sample {index} are one string; give a list of strings")
        if not answers:
            raise UserError(f"sample {index} has no reference to score its prediction against")


def accuracy(scores: Sequence[float], kinds: Sequence[str | None] | None) -> dict[str, float | dict]:
    """`accuracy` (mean, 0 to 1), `samples`, and with kinds `accuracy_by_kind` and `samples_by_kind`.

    A sample whose kind is None counts in `accuracy` only.
    """
    result: dict[str, float | dict] = {"accuracy": sum(scores) / len(scores), "samples": len(scores)}
    groups: dict[str, list[float]] = {}
    for kind, value in zip(kinds or [], scores, strict=False):
        if kind is not None:
            groups.setdefault(kind, []).append(value)
    if groups:
        result["accuracy_by_kind"] = {k: sum(v) / len(v) for k, v in sorted(groups.items())}
        result["samples_by_kind"] = {k: len(v) for k, v in sorted(groups.items())}
    return result
