"""The page of samples: image, question, prediction, truth, wrong ones first, with filters.

Knows the lines of `predictions.jsonl`; knows nothing about metrics. Every text of a sample is escaped; an
image is opened, made small and written again as a JPEG, and only from inside the run's folder.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlm_adapt.report.words import count, number

EMPTY = "<i>empty</i>"
SIDE = 320  # pixels of the longer side of an image in the report
_DATA_URI = re.compile(r"data:image/(?:jpeg|png|webp|gif);base64,([A-Za-z0-9+/=\s]+)")
_TITLES = {
    "wrong": "Wrong",
    "partly": "Partly right",
    "right": "Right",
    "low": "Lower half",
    "high": "Upper half",
}


def states(samples: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """wrong, partly or right for scores from 0 to 1; where they go higher, low or high against the median."""
    scores = [s["score"] if isinstance(s.get("score"), int | float) else None for s in samples]
    known = [score for score in scores if score is not None]
    if not known:
        return [None] * len(samples)
    if max(known) > 1:  # CIDEr: no score is "right"
        middle = statistics.median(known)
        return [None if s is None else "low" if s < middle else "high" for s in scores]
    return [None if s is None else "wrong" if s <= 0 else "right" if s >= 0.999 else "partly" for s in scores]


def choose(samples: Sequence[Mapping[str, Any]], most: int) -> list[int]:
    """Places of at most `most` samples, worst first; taken in turn from every state and kind, so that each
    filter finds some."""
    found = states(samples)
    groups: dict[tuple[str, str], list[int]] = {}
    for place, (sample, state) in enumerate(zip(samples, found, strict=True)):
        groups.setdefault((str(state), str(sample.get("kind"))), []).append(place)

    def value(place: int) -> float:
        return samples[place]["score"] if found[place] else 0.0

    for group in groups.values():
        group.sort(key=lambda place: ("image" not in samples[place], value(place)))  # pictures first
    chosen: list[int] = []
    depth = 0
    while len(chosen) < min(most, len(samples)):
        for group in groups.values():
            if depth < len(group) and len(chosen) < most:
                chosen.append(group[depth])
        depth += 1
    order = {"wrong": 0, "low": 0, "partly": 1, "right": 2, "high": 2}
    return sorted(chosen, key=lambda place: (order.get(str(found[place]), 3), value(place), place))


def picture(value: Any, folder: Path, inside: Path) -> str | None:
    """The image as a data URI of a small JPEG; None if it is absent, broken or outside the run's folder."""
    from PIL import Image

    if not isinstance(value, str) or not value:
        return None
    try:
        if value.startswith("data:"):
            match = _DATA_URI.fullmatch(value)
            if match is None:
                return None
            source: Any = io.BytesIO(base64.b64decode(match[1], validate=False))
        else:
            source = (folder / value).resolve()
            if not source.is_relative_to(inside.resolve()):
                return None
        with Image.open(source) as image:
            image.draft("RGB", (SIDE, SIDE))
            small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _card(sample: Mapping[str, Any], state: str | None, source: str | None) -> str:
    kind = sample.get("kind")
    answers = sample.get("answers") or []
    answers = [answers] if isinstance(answers, str) else list(map(str, answers))
    tally = {answer: answers.count(answer) for answer in answers}
    truths = [f"{answer} ×{n}" if n > 1 else answer for answer, n in tally.items()]
    if sum(map(len, truths)) < 60:
        truths = [" · ".join(truths)] if truths else []
    lines = [("answer", [str(sample.get("prediction"))]), ("truth", truths)]
    if sample.get("blind_prediction") is not None:
        lines.append(("blind", [str(sample["blind_prediction"])]))
    facts = "".join(
        f'<dt>{name}</dt><dd class="{name}">'
        f"{''.join(f'<span>{escape(t) if t.strip() else EMPTY}</span>' for t in texts)}</dd>"
        for name, texts in lines
        if texts
    )
    alt = escape(f"Image of sample {sample.get('key', '')}")
    image = (
        f'<img src="{source}" alt="{alt}" loading="lazy">'
        if source
        else '<div class="no-image">no image</div>'
    )
    badge = ""
    if state:
        score = sample["score"]
        words = _TITLES[state] if state in ("wrong", "right") else f"score {number(score)}"
        badge = f'<span class="badge">{words}</span>'
    question = escape(str(sample.get("question") or ""))
    return (
        f'<article class="card {state or ""}" data-state="{state or ""}" '
        f'data-kind="{escape(str(kind or ""))}">'
        f'<div class="frame">{image}{badge}</div><div class="body">'
        f"{f'<h3>{question}</h3>' if question else ''}<dl>{facts}</dl>"
        f'<p class="key-line"><span>{escape(str(sample.get("key", "")))}</span>'
        f"<span>{escape(str(kind)) if kind else ''}</span></p></div></article>"
    )


def gallery(
    samples: Sequence[Mapping[str, Any]], folder: Path, inside: Path, most: int
) -> tuple[str, list[str]]:
    """The section's HTML (empty without samples) and notes on what could not be shown.

    Args:
        samples: lines of `predictions.jsonl`. folder: what their image paths are relative to.
        inside: the folder that images must lie in. most: samples to show.
    """
    if not samples:
        return "", []
    found = states(samples)
    chosen = choose(samples, most)
    cards, missing = [], 0
    for place in chosen:
        source = picture(samples[place].get("image"), folder, inside)
        missing += source is None and samples[place].get("image") is not None
        cards.append(_card(samples[place], found[place], source))
    notes = (
        [f"{missing} image(s) of the samples shown are absent, broken or outside the run."] if missing else []
    )
    shown = [found[place] for place in chosen]
    buttons = [
        f'<button type="button" aria-pressed="true" data-show="">All <b>{count(len(chosen))}</b></button>'
    ]
    for state, title in _TITLES.items():
        if state in shown:
            buttons.append(
                f'<button type="button" aria-pressed="false" data-show="{state}">{title} '
                f"<b>{count(shown.count(state))}</b></button>"
            )
    kinds = list(dict.fromkeys(str(samples[place]["kind"]) for place in chosen if samples[place].get("kind")))
    picker = ""
    if len(kinds) > 1:
        options = "".join(f'<option value="{escape(kind)}">{escape(kind)}</option>' for kind in sorted(kinds))
        picker = (
            f'<label>Kind <select id="kind"><option value="">every kind</option>{options}</select></label>'
        )
    how_many = f"{count(len(samples))} samples"
    if len(chosen) < len(samples):
        how_many = f"{count(len(chosen))} of {count(len(samples))} samples, some of every kind and outcome"
    total = {state: found.count(state) for state in ("wrong", "partly", "right")}
    tally = ", ".join(f"{count(n)} {state}" for state, n in total.items() if n)
    return (
        f'<section id="samples"><h2>Samples</h2><p class="lead">{how_many}, the worst first.'
        f"{f' In all: {tally}.' if tally else ''}</p>"
        '<div class="filters"><div class="buttons" role="group" aria-label="Outcome">'
        f'{"".join(buttons)}</div>{picker}<span id="shown" role="status"></span></div>'
        f'<div class="grid-of-cards">{"".join(cards)}</div>'
        f'<p id="nothing" hidden>No sample shown here is of that kind and outcome.</p></section>'
    ), notes
