"""Span corruption of text: spans are replaced by sentinels, and what they hid is learned.

T5, arXiv:1910.10683, section 3.1.4: 15 % of the tokens in spans of 3 on average. The number of corrupted
words and of spans is fixed by a text's length; where they lie is drawn. Words stand for tokens here, so
that the task does not depend on a tokenizer; languages without spaces are cut in characters.

    Thank you for inviting me to your party last week.
    Thank you <extra_id_0> me to your party <extra_id_1> week.  ->
    <extra_id_0> for inviting <extra_id_1> last <extra_id_2>

T5's code always begins with an intact span and ends with a corrupted one, so that a short text loses its
last words every time. Here texts may begin and end with either, and all arrangements are equally likely.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks.languages import units
from vlm_adapt.data.tasks.prompts import check_prompt
from vlm_adapt.data.tasks.task import SETTINGS, Sizes, Task, Told, carried


@dataclass(frozen=True, config=SETTINGS)
class SpanCorruption(Task):
    """Learns what sentinels hide. Images of the sample are left out.

    Attributes:
        noise_density: share of the words that are hidden.
        mean_span: words a hidden span has on average.
        sentinel: what stands for span {number}.
        sentinels: how many the language knows; no text gets more spans.
        most_words: of a longer text, a random stretch of so many words is used (T5's chunks).
    """

    noise_density: float = Field(default=0.15, gt=0, lt=1)
    mean_span: float = Field(default=3.0, ge=1)
    sentinel: str = "<extra_id_{number}>"
    sentinels: int = Field(default=100, gt=1)
    most_words: int = Field(default=256, gt=1)

    name: ClassVar[str] = "span_corruption"
    prompts: ClassVar[dict[str, str]] = {"pali": "{text}", "paligemma": "{text}"}
    fields: ClassVar[tuple[str, ...]] = ("text",)
    required: ClassVar[tuple[str, ...]] = ("text",)
    keeps_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_prompt("sentinel", self.sentinel, ("number",), ("number",))

    def training(self, record: dict[str, Any], generator: np.random.Generator, sizes: Sizes = ()) -> Told:
        if "text" not in record:
            raise self.lacks(record, "text")
        words = units(record["text"], self.language_of(record))
        if len(words) < 2:
            raise BadSample("a text of one word cannot be corrupted")
        if self._pattern().search(record["text"]):
            raise BadSample("the text holds a sentinel already")
        if len(words) > self.most_words:
            start = int(generator.integers(len(words) - self.most_words + 1))
            words = words[start : start + self.most_words]
            words[0] = words[0].lstrip()
        # One sentinel closes the target.
        spans = hidden_spans(
            len(words), self.noise_density, self.mean_span, generator, most=self.sentinels - 1
        )
        corrupted, target = self.corrupt(words, spans)
        question = self.filled(record, text=corrupted)
        return Told(carried(record) | {"question": question, "answer": target})

    def corrupt(self, words: list[str], spans: list[tuple[int, int]]) -> tuple[str, str]:
        """Replace spans by sentinels.

        Args:
            words: with the white space before them, as `units` gives them.
            spans: (begin, end) of each, in order and apart.

        Returns:
            (the text with sentinels, what they hide)
        """
        shown, hidden, place = "", "", 0
        for number, (begin, end) in enumerate(spans):
            mark = self._mark(number)
            text = "".join(words[begin:end])
            bare = text.lstrip()
            shown += "".join(words[place:begin]) + text[: len(text) - len(bare)] + mark
            hidden += f"{mark} {bare} "
            place = end
        return shown + "".join(words[place:]), hidden + self._mark(len(spans))

    def restore(self, corrupted: str, target: str) -> str:
        """The text that was corrupted: the inverse of `corrupt`, letter for letter."""
        pieces = self._pattern().split(target)  # "", 0, text, 1, text, ..., n, ""
        hidden = {int(n): text.strip() for n, text in zip(pieces[1::2], pieces[2::2], strict=True)}
        return self._pattern().sub(lambda match: hidden[int(match.group(1))], corrupted)

    def _mark(self, number: int) -> str:
        return self.sentinel.format(number=number)

    def _pattern(self) -> re.Pattern[str]:
        before, after = self.sentinel.format(number="\0").split("\0")
        return re.compile(f"{re.escape(before)}([0-9]+){re.escape(after)}")


def hidden_spans(
    length: int, density: float, mean_span: float, generator: np.random.Generator, most: int = 99
) -> list[tuple[int, int]]:
    """Draw the spans that are hidden of a text.

    round(length * density) words, at least one and never all, in round(words / mean_span) spans; between
    two spans lies at least one word. Every arrangement is equally likely.

    Args:
        most: spans there may be; with more, spans get longer.

    Returns:
        (begin, end) of each span, in order.
    """
    noise = min(max(round(length * density), 1), length - 1)
    intact = length - noise
    count = min(max(round(noise / mean_span), 1), most, noise, intact + 1)
    spans = _composition(noise, count, generator)
    # Gaps at the ends may be empty: two more words, one for each of them, make every gap at least one.
    gaps = _composition(intact + 2, count + 1, generator)
    gaps[0] -= 1
    found, place = [], 0
    for gap, span in zip(gaps, spans, strict=False):
        found.append((place + gap, place + gap + span))
        place += gap + span
    return found


def _composition(total: int, parts: int, generator: np.random.Generator) -> list[int]:
    """Positive parts that add up to `total`, every choice of them equally likely."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff([0, *cuts.tolist(), total]).tolist()
