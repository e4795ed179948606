"""Scores of a segmenter that tells classes by colour, so that every count is known; ranks kept in step."""

from __future__ import annotations

import csv
import json
import math
import threading
from pathlib import Path
from typing import Any

import flat_segmenter as flat
import numpy as np
import pytest

from vlm_adapt import dist
from vlm_adapt.config.schema import Data, Evaluate
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.files import write_scores
from vlm_adapt.evaluate.segment import evaluate
from vlm_adapt.evaluate.segment_scores import SegmentScores, handicaps
from vlm_adapt.metrics.segment import NamedConfusion, harmonic_mean

LABELS = ["sky0", "road1|street", "car2"]
IGNORED = 255


def grid(*rows: str) -> np.ndarray:
    """Digits as classes, 8 x 8; `.` is ignored."""
    small = np.array([[IGNORED if one == "." else int(one) for one in row] for row in rows])
    return small.repeat(8 // small.shape[0], 0).repeat(8 // small.shape[1], 1)


def score(paths: list[Path], model: Any = None, **settings: Any) -> SegmentScores:
    data = Data.model_validate({"evaluate": [{"shards": str(path)} for path in paths]})
    options = {"window": "whole", "batch_size": 2} | settings
    limit, synced = options.pop("limit", None), options.pop("synced", False)
    made = flat.assembled(model or flat.FlatSegmenter())
    return evaluate(made, data, Evaluate(**options), limit=limit, synced=synced)


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of 64 pixels. True and seen, in 16ths: sky 8+4 (all found), road 4+8 (8 found, 4 as car),
    car 4 (found), the rest ignored; the third image is ignored as a whole and so refused."""
    return flat.write_shard(
        tmp_path_factory.mktemp("street") / "street.tar",
        [
            (grid("00", "12"), grid("00", "12"), LABELS),
            (grid("00", "12"), grid("0.", "11"), LABELS),
            (grid("00", "12"), grid("..", ".."), LABELS),
        ],
    )


def test_figures(street: Path) -> None:
    scores = score([street])
    metrics = scores.metrics
    # Pixels: sky 32 + 16; road 16 + 32, of which 16 were taken for car; car 16.
    assert metrics["per_class"]["sky0"] == {"iou": 1.0, "accuracy": 1.0, "pixels": 48}
    assert metrics["per_class"]["road1|street"]["iou"] == pytest.approx(32 / 48)
    assert metrics["per_class"]["car2"]["iou"] == pytest.approx(16 / 32)
    assert metrics["miou"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert metrics["pixel_accuracy"] == pytest.approx(96 / 112)
    assert metrics["pixels"] == 112 and metrics["absent"] == []
    assert metrics["baselines"]["majority"]["class"] == "sky0"
    assert metrics["baselines"]["majority"]["miou"] == pytest.approx(48 / 112 / 3)
    assert metrics["samples"] == metrics["samples_available"] == 3
    assert metrics["account"]["used"] == 2 and metrics["account"]["read"] == 3
    assert [row["key"] for row in scores.predictions] == ["0000", "0001"]
    assert scores.predictions[1]["pixel_accuracy"] == pytest.approx(32 / 48)


def test_loss(street: Path) -> None:
    """A hit costs log(e + 2) - 1 and a miss log(e + 2) nats, over all valid pixels; no penalty in it."""
    cost = math.log(math.e + 2)
    assert score([street]).metrics["loss"] == pytest.approx(cost - 96 / 112, rel=1e-6)
    assert "loss" not in score([street], loss=False).metrics


def test_unseen(street: Path) -> None:
    """A label may be named by a synonym, whatever its case."""
    metrics = score([street], unseen=["Street"]).metrics
    assert metrics["unseen"] == ["road1|street"]
    assert metrics["miou_unseen"] == pytest.approx(2 / 3)
    assert metrics["miou_seen"] == pytest.approx((1 + 1 / 2) / 2)
    assert metrics["harmonic_miou"] == pytest.approx(harmonic_mean(2 / 3, 3 / 4))
    assert set(metrics["baselines"]["chance"]) >= {"miou_seen", "miou_unseen"}
    with pytest.raises(UserError, match="no held-out mask has a label 'roads', did you mean 'road1'"):
        score([street], unseen=["roads"])


def test_a_handicap_favours_unseen_labels() -> None:
    labels = ["road", "Car|automobile", "sky"]
    assert handicaps(labels, ["automobile"], 2.0) == [2.0, 0.0, 2.0]
    assert handicaps(labels, ["automobile"], 0.0) is None
    with pytest.raises(ValueError, match=r"name them in evaluate.unseen"):  # before anything is loaded
        Evaluate(handicap=2.0)


def test_sources_with_labels_of_their_own(street: Path, tmp_path: Path) -> None:
    """Each label set has figures; two sources with one set are one; the mean is over sets."""
    other = flat.write_shard(tmp_path / "other.tar", [(grid("34"), grid("00"), ["cat3", "dog4"])])
    more = flat.write_shard(tmp_path / "more.tar", [(grid("0"), grid("0"), LABELS[::-1])])
    # That mask's 0 is car, and the segmenter sees sky.
    scores = score([street, other, more])
    each = scores.metrics["sources"]
    assert list(each) == ["street.tar + more.tar", "other.tar"]
    assert each["other.tar"]["miou"] == pytest.approx((1 / 2 + 0) / 2)
    assert each["street.tar + more.tar"]["per_class"]["car2"]["iou"] == pytest.approx(16 / (32 + 64))
    means = [one["miou"] for one in each.values()]
    assert scores.metrics["miou"] == pytest.approx(sum(means) / 2)
    table = scores.table()
    assert "street.tar + more.tar" in table and "dog4" in table


def test_table_and_files(street: Path, tmp_path: Path) -> None:
    scores = score([street], unseen=["car2"])
    lines = {line.split("  ")[0]: line.split() for line in scores.table().splitlines()}
    assert lines["road1"][1:] == ["66.7", "66.7", "42.9"]
    assert lines["car2 (unseen)"][2:] == ["50.0", "100.0", "14.3"]
    assert "always sky0" in lines and "drawn evenly" in lines and "mean of unseen" in lines
    assert scores.line().startswith("miou 0.7222")
    write_scores(tmp_path, scores, flat.assembled(flat.FlatSegmenter()), None)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "metrics.json").read_text())["miou_unseen"] == pytest.approx(1 / 2)
    with (tmp_path / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == LABELS and rows[2] == ["road1|street", "0", "32", "16"]
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2


def test_limit_and_nothing_usable(street: Path, tmp_path: Path) -> None:
    assert score([street], limit=2).metrics["samples"] == 2
    bad = flat.write_shard(tmp_path / "bad.tar", [(grid("0"), grid("7"), LABELS)])
    with pytest.raises(UserError, match="none of 1 held-out samples could be used: 1 x mask has a value"):
        score([bad])
    with pytest.raises(UserError, match="blind scores are of answers in words"):
        score([street], blind=True)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(flat.assembled(flat.FlatSegmenter()), Data(), Evaluate())


class World:
    """Ranks as threads: what `dist` says is told between them."""

    def __init__(self, size: int):
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size
        self.here = threading.local()

    def rank(self) -> int:
        return self.here.rank

    def gather(self, value: Any) -> list[Any]:
        self.values[self.rank()] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def total(self, values: list[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def run(self, work: Any) -> list[Any]:
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.here.rank = rank
            try:
                found[rank] = work(rank)
            except BaseException as error:  # told to the test, and the others let go
                found[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one_found in found:
            if isinstance(one_found, BaseException):
                raise one_found
        return found


@pytest.mark.parametrize("trains", [False, True])
def test_ranks_in_step(trains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks with images of other sizes (so other windows) and other labels run the same passes, as a
    model needs whose weights are shared out, and count what one rank counts."""
    draws = np.random.default_rng(0)
    samples = []
    for height, width, labels in ((8, 40, LABELS), (8, 8, LABELS), (30, 9, ["cat1", "dog2"]), (8, 8, LABELS)):
        seen = draws.integers(0, len(labels), (height, width))
        mask = np.where(draws.random(seen.shape) < 0.8, seen, 1)
        samples.append((seen + (labels[0] == "cat1"), mask, labels))
    shard = flat.write_shard(tmp_path / "mixed.tar", samples)
    alone = score([shard], window="sliding", batch_size=1).metrics
    world = World(3)
    for name in ("rank", "gather", "total"):
        monkeypatch.setattr(dist, name, getattr(world, name))
    monkeypatch.setattr(dist, "world_size", lambda: world.size)
    monkeypatch.setattr(dist, "is_main", lambda: world.rank() == 0)
    models = [flat.FlatSegmenter() for _ in range(3)]
    for model in models:
        model.labels.encoder.trains = trains

    def work(rank: int) -> dict[str, Any]:
        return score([shard], models[rank], window="sliding", batch_size=1, synced=True).metrics

    found = world.run(work)
    assert models[0].done == models[1].done == models[2].done
    assert "logits" in models[0].done and models[0].done.count("loss") == 2
    for metrics in found:
        assert metrics["loss"] == pytest.approx(alone["loss"], rel=1e-9)  # float64 sums in another order
        # Counters are dealt to ranks in another order.
        assert {**metrics, "account": 0, "loss": 0} == {**alone, "account": 0, "loss": 0}
        assert metrics["account"]["used"] == 4
    if trains:
        encoded = [[name for names in model.labels.asked for name in names] for model in models]
        assert {name for name in encoded[0]} >= {"cat1", "dog2", *LABELS}


def test_confusions_travel() -> None:
    named = NamedConfusion()
    named.add(np.array([[0, 1]]), np.array([[0, 0]]), ["a", "b"])
    again = NamedConfusion.from_plain(*named.plain())
    assert again.labels == ["a", "b"] and again.confusion.counts_CC.tolist() == [[1, 1], [0, 0]]
