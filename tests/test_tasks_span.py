"""Span corruption: the share and length of what is hidden, where it lies, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from vlm_adapt.config import schema
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.tasks.span_corruption import hidden_spans
from vlm_adapt.data.tasks.task import make_task


def task(**more: Any) -> Any:
    return make_task(schema.Task(name="span_corruption", **more))


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_papers_example() -> None:
    """Raffel et al. 2020, figure 2 (there with <X>, <Y> and <Z>)."""
    words = ["Thank", " you", " for", " inviting", " me", " to", " your", " party", " last", " week."]
    corrupted, target = task().corrupt(words, [(2, 4), (8, 9)])
    assert corrupted == "Thank you <extra_id_0> me to your party <extra_id_1> week."
    assert target == "<extra_id_0> for inviting <extra_id_1> last <extra_id_2>"
    assert task().restore(corrupted, target) == "".join(words)


@pytest.mark.parametrize("length", [2, 3, 5, 10, 20, 67, 100, 400, 512])
def test_figures(length: int) -> None:
    """T5's counts: round(15 %) words, at least one and never all, in round(words / 3) spans."""
    noise = min(max(round(0.15 * length), 1), length - 1)
    for seed in range(50):
        spans = hidden_spans(length, 0.15, 3.0, draw(seed))
        assert sum(end - begin for begin, end in spans) == noise
        assert len(spans) == max(round(noise / 3), 1)
        edges = [edge for span in spans for edge in span]
        assert edges == sorted(set(edges)) and edges[0] >= 0 and edges[-1] <= length  # apart


def test_density_and_span() -> None:
    spans = hidden_spans(1000, 0.5, 5.0, draw(), most=1000)
    assert sum(end - begin for begin, end in spans) == 500 and len(spans) == 100
    assert len(hidden_spans(1000, 0.5, 5.0, draw(), most=99)) == 99
    assert hidden_spans(2, 0.9, 1.0, draw()) in ([(0, 1)], [(1, 2)])
    assert len(hidden_spans(10, 0.9, 1.0, draw())) == 2  # one intact word parts two spans


def test_every_place_is_as_likely() -> None:
    """Of a text with one span of 2 words, it begins at any of 9 places (T5's own code takes the last)."""
    counts = np.zeros(9, int)
    for seed in range(1800):
        ((begin, end),) = hidden_spans(10, 0.15, 3.0, draw(seed))
        assert end - begin == 2
        counts[begin] += 1
    # 200 each; 5 standard deviations of a binomial of 1800 and 1/9 are 67.
    assert (abs(counts - 200) < 67).all(), counts


def test_lengths_of_spans_vary() -> None:
    lengths = [end - begin for seed in range(200) for begin, end in hidden_spans(400, 0.15, 3.0, draw(seed))]
    assert np.mean(lengths) == 3.0 and min(lengths) == 1 and max(lengths) > 6


# Any white space and any letters, sentinels' own letters too.
texts = some.text("ab <>_\n\t.0é猫 ", max_size=120).filter(lambda text: len(text.split()) > 1)


@settings(max_examples=150, deadline=None)
@given(text=texts, seed=some.integers(0, 99), lang=some.sampled_from(["en", "zh"]))
def test_the_way_back(text: str, seed: int, lang: str) -> None:
    made = task(most_words=10_000)
    told = made.training({"text": text, "lang": lang}, draw(seed)).record
    assert made.restore(told["question"], told["answer"]) == text.strip()
    assert told["answer"].count("<extra_id_") == told["question"].count("<extra_id_") + 1


def test_sentinels_prompt_and_languages() -> None:
    made = task(sentinel="[{number}]", prompt="Fill in ({language}): {text}")
    told = made.training({"text": "eins zwei drei", "lang": "de"}, draw()).record
    assert told["question"].startswith("Fill in (German): ") and told["answer"].endswith(" [1]")
    assert not task().keeps_images
    told = task().training({"text": "今日は天気がいい", "lang": "ja"}, draw(3)).record
    assert " " not in told["question"] and "<extra_id_0>" in told["question"]


def test_a_long_text_gives_a_stretch() -> None:
    """Any of them, not its beginning; with no more spans than there are sentinels."""
    text = " ".join(map(str, range(1000)))
    firsts = set()
    for seed in range(20):
        made = task(most_words=20)
        told = made.training({"text": text}, draw(seed)).record
        words = made.restore(told["question"], told["answer"]).split()
        assert words == [str(n) for n in range(int(words[0]), int(words[0]) + 20)]
        firsts.add(int(words[0]))
        asked = task(most_words=20, prompt="Fill in: {text}").training({"text": text}, draw(seed)).record
        assert "  " not in asked["question"] and asked["answer"] == told["answer"]
    assert len(firsts) > 15 and max(firsts) > 600
    few = task(most_words=1000, sentinels=5).training({"text": text}, draw()).record
    assert few["question"].count("<extra_id_") == 4 and few["answer"].endswith("<extra_id_4>")


def test_refusals() -> None:
    with pytest.raises(BadSample, match="a text of one word"):
        task().training({"text": " word "}, draw())
    with pytest.raises(BadSample, match="holds a sentinel already"):
        task().training({"text": "a b <extra_id_7> c"}, draw())
