"""Scores of segmentations: worked by hand, and counted pixel by pixel with loops on real masks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from vlm_adapt.errors import UserError
from vlm_adapt.metrics.segment import Confusion, EpisodeCounts, NamedConfusion, harmonic_mean

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"

TRUTH = np.array([[0, 0, 1], [1, 2, -1]])
GUESS = np.array([[0, 1, 1], [1, 0, 2]])


def counted(guess: np.ndarray, truth: np.ndarray, classes: int) -> Confusion:
    confusion = Confusion(classes)
    confusion.add(guess, truth)
    return confusion


def test_by_hand() -> None:
    """Five valid pixels. Class 0: 1 hit, union 3; class 1: 2 of 3; class 2: none of 1; 3 is nowhere."""
    one = counted(GUESS, TRUTH, 4)
    assert one.counts_CC.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(one.iou_C, [1 / 3, 2 / 3, 0, math.nan])
    np.testing.assert_array_equal(one.accuracy_C, [1 / 2, 1, 0, math.nan])
    assert one.miou() == pytest.approx(1 / 3)
    assert one.miou([1, 3]) == pytest.approx(2 / 3)
    assert one.pixel_accuracy() == pytest.approx(3 / 5)
    assert one.mean_accuracy() == pytest.approx(1 / 2)
    assert one.frequency_weighted_iou() == pytest.approx((2 / 3 + 4 / 3 + 0) / 5)
    # Background 0: 1 hit of union 3; foreground 1, 2: hits (1,1) x2, union 5 - 1.
    assert one.fb_iou() == pytest.approx((1 / 3 + 2 / 4) / 2)
    figures = one.to_dict(["sky", "road", "pole", "car"])
    assert figures["absent"] == ["car"] and list(figures["per_class"]) == ["sky", "road", "pole"]
    assert figures["per_class"]["road"] == {"iou": pytest.approx(2 / 3), "accuracy": 1.0, "pixels": 2}


def test_predicted_and_never_true_counts() -> None:
    one = counted(np.array([[1, 0]]), np.array([[0, 0]]), 2)
    assert one.miou() == pytest.approx((1 / 2 + 0) / 2)
    assert one.to_dict(["a", "b"])["per_class"]["b"] == {"iou": 0.0, "accuracy": None, "pixels": 0}


def test_baselines() -> None:
    """The majority's figures are those of a prediction that is it everywhere; chance, of many draws."""
    one = counted(GUESS, TRUTH, 4)
    always = counted(np.zeros_like(TRUTH), TRUTH, 4)
    majority = one.majority()
    assert majority["class"] == 0
    assert majority["miou"] == pytest.approx(always.miou())
    assert majority["pixel_accuracy"] == pytest.approx(always.pixel_accuracy())
    draws = np.random.default_rng(0)
    truth = draws.choice(4, size=(500, 1000), p=[0.6, 0.3, 0.09, 0.01])
    drawn = counted(draws.integers(0, 4, truth.shape), truth, 4)
    # Half a million draws: the rarest class has 1,250 hits, within a standard deviation of 3 %.
    np.testing.assert_allclose(drawn.iou_C, drawn.chance_C(), rtol=0.1)


def test_nothing_but_ignored() -> None:
    one = counted(np.zeros((2, 2), int), np.full((2, 2), -1), 2)
    assert math.isnan(one.miou()) and math.isnan(one.pixel_accuracy()) and math.isnan(one.fb_iou())
    assert one.to_dict(["a", "b"])["absent"] == ["a", "b"]


@pytest.mark.parametrize(
    ("guess", "truth", "words"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), "differ in shape"),
        (np.full((2, 2), 2), np.zeros((2, 2), int), "class 2 of the prediction"),
        (np.zeros((2, 2), int), np.full((2, 2), 255), "class 255 of the truth"),
        (np.full((2, 2), -1), np.zeros((2, 2), int), "class -1 of the prediction"),
    ],
)
def test_refused(guess: np.ndarray, truth: np.ndarray, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Confusion(2).add(guess, truth)


def test_ranks_merge() -> None:
    draws = np.random.default_rng(1)
    truth, guess = draws.integers(-1, 3, (4, 5, 6)), draws.integers(0, 3, (4, 5, 6))
    parts = [counted(guess[::2], truth[::2], 3), counted(guess[1::2], truth[1::2], 3)]
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].counts_CC, counted(guess, truth, 3).counts_CC)


def test_by_name() -> None:
    """Images with labels of their own, in any order, and a label twice: as if all had had one list."""
    named, other = NamedConfusion(), NamedConfusion()
    named.add(np.array([[0, 1]]), np.array([[0, 0]]), ["cat", "dog"])
    other.add(np.array([[0, 1, 2]]), np.array([[0, -1, 1]]), ["dog", "sea", "dog"])
    named.merge(other)
    assert named.labels == ["cat", "dog", "sea"]
    assert named.confusion.counts_CC.tolist() == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]


def loops(guess: np.ndarray, truth: np.ndarray, classes: int) -> tuple[list[float], float, float]:
    """IoU of each class, pixel accuracy and mean accuracy, counted one pixel after another."""
    inter, union, found, there = [0] * classes, [0] * classes, [0] * classes, [0] * classes
    right = total = 0
    for p, t in zip(guess.ravel().tolist(), truth.ravel().tolist(), strict=True):
        if t == -1:
            continue
        total, right = total + 1, right + (p == t)
        there[t] += 1
        found[t] += p == t
        union[t] += 1
        if p == t:
            inter[t] += 1
        else:
            union[p] += 1
    iou = [i / u if u else math.nan for i, u in zip(inter, union, strict=True)]
    accuracies = [f / n for f, n in zip(found, there, strict=True) if n]
    return iou, right / total, sum(accuracies) / len(accuracies)


@pytest.mark.skipif(not CAMVID.exists(), reason="the real masks are not here")
def test_against_a_loop_on_real_masks() -> None:
    """Random answers, half of them right, on three frames."""
    from vlm_adapt.data.masks import read_mask

    draws = np.random.default_rng(2)
    confusion, truths, guesses = Confusion(11), [], []
    for path in sorted((CAMVID / "val_masks").glob("*.png"))[::40]:
        truth = read_mask(path.read_bytes()).astype(np.int16)
        truth[truth == 11] = -1
        drawn = draws.integers(0, 11, truth.shape)
        guess = np.where((draws.random(truth.shape) < 0.5) & (truth >= 0), truth, drawn)
        confusion.add(guess, truth)
        truths.append(truth)
        guesses.append(guess)
    assert len(truths) == 3
    iou, accuracy, mean_accuracy = loops(np.stack(guesses), np.stack(truths), 11)
    np.testing.assert_array_equal(confusion.iou_C, iou)
    assert confusion.pixel_accuracy() == accuracy
    assert confusion.mean_accuracy() == pytest.approx(mean_accuracy, rel=1e-12)  # another order of adding
    assert confusion.miou() == pytest.approx(np.nanmean(iou), rel=1e-12)


def test_episodes_accumulate() -> None:
    """A small object found twice, a large one missed: summed 8 / 108, where a mean over images says 2 / 3."""
    counts, other = EpisodeCounts(2), EpisodeCounts(2)
    small, large = np.zeros((20, 20), int), np.zeros((20, 20), int)
    small[:2, :2] = 1
    large[:10, :10] = 1
    counts.add(0, small, small)
    counts.add(0, np.zeros_like(large), large)
    other.add(0, small, small)
    other.add(1, small, np.where(small, 1, -1), times=2)
    counts.merge(other)
    np.testing.assert_array_equal(counts.iou_C, [8 / 108, 1])
    assert counts.miou() == pytest.approx((8 / 108 + 1) / 2)
    # Foreground: hits 4 + 0 + 4 + 2 x 4, unions 4 + 100 + 4 + 8. Background: hits 396 + 300 + 396 + 0, unions
    # 396 + 400 + 396 + 0.
    assert counts.fb_iou() == pytest.approx((16 / 116 + 1092 / 1192) / 2)
    assert counts.episodes_C.tolist() == [3, 2]


def test_a_class_without_episodes_is_left_out() -> None:
    counts = EpisodeCounts(2)
    counts.add(1, np.array([[1, 0]]), np.array([[1, 1]]))
    assert counts.miou() == pytest.approx(1 / 2) and math.isnan(counts.iou_C[0])


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.2, 0.6) == pytest.approx(0.3)
    assert harmonic_mean(0.0, 0.6) == 0 and harmonic_mean(0.0, 0.0) == 0
    assert math.isnan(harmonic_mean(math.nan, 0.5))
