"""Scores: equal to hand computation on a model whose every answer and loss is a function of its image."""

from __future__ import annotations

import copy
import io
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from vlm_adapt import dist
from vlm_adapt.config.load import validate
from vlm_adapt.config.schema import Data, Evaluate
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.run import evaluate
from vlm_adapt.evaluate.scores import Scores
from vlm_adapt.models.build import build
from vlm_adapt.models.locate import find_checkpoint
from vlm_adapt.train.journal import read_journal
from vlm_adapt.train.run import train

COUNT = 10


class Grey:
    """Says the grey value of its image; a target's loss is that value times its id modulo 7."""

    masks = None  # it draws none

    def __init__(self, tokenizer: Any, vision: Any):
        self.tokenizer, self.vision = tokenizer, vision

    def eval(self):
        return self

    def inputs(self, batch):
        """Grey value of each row; -1 where it has no image."""
        greys = torch.full((len(batch.ids_BT),), -1.0)
        starts = batch.image_lengths_I.cumsum(0) - batch.image_lengths_I
        rows = batch.image_positions_K[starts] // batch.ids_BT.shape[1]
        greys[rows] = batch.pixels_ICHW[: len(rows)].float().mean((1, 2, 3))
        return batch, greys

    def language(self, inputs, predict_from_N, targets_N):
        batch, greys = inputs
        losses_N = greys[predict_from_N // batch.ids_BT.shape[1]] * (targets_N % 7) / 100
        return losses_N.sum(), losses_N

    def generate(self, batch, settings, stop_ids):
        _, greys = self.inputs(batch)
        words = [
            self.tokenizer.encode(f"{int(grey)}")
            for grey, row in zip(greys, batch.writers_BW, strict=True)
            for _ in row[row >= 0]
        ]
        return words if batch.keys else []


def grey(number: int) -> int:
    return 10 + 20 * number


def picture(value: int) -> bytes:
    """One even grey, which resizing leaves as it is."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def assembled(parts):
    """Everything real but the model."""
    made = build(validate(tiny.run_tree(parts), "x").model, torch.float32)
    made.model = Grey(made.tokenizer, made.model.vision)  # type: ignore[assignment]
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    """Ten greys; the even ones are asked twice, of which the second is answered wrongly."""
    samples = []
    for number in range(COUNT):
        asked = [{"question": "grey?", "answer": str(grey(number)), "kind": "right", "id": f"q{number}"}]
        if number % 2 == 0:
            asked.append({"question": "and now?", "answer": "no", "kind": "wrong"})
        record = json.dumps({"questions": asked}).encode()
        samples.append((f"s{number}", {"json": record, "png": picture(grey(number))}))
    path = tiny.shard(tmp_path_factory.mktemp("grey") / "grey.tar", samples)
    return Data(evaluate=[str(path)])


def test_scores_by_hand(assembled, data):
    scores = evaluate(assembled, data, Evaluate(batch_size=4, blind=True))
    assert scores.metrics["accuracy"] == pytest.approx(10 / 15)
    assert scores.metrics["accuracy_by_kind"] == {"right": 1.0, "wrong": 0.0}
    assert (scores.metrics["questions"], scores.metrics["samples"]) == (15, COUNT)
    # The sample half the set away is shown instead, so nothing is right.
    blind = scores.metrics["blind"]
    assert (blind["accuracy"], blind["accuracy_by_kind"]) == (0.0, {"right": 0.0, "wrong": 0.0})
    first = scores.predictions[0]
    assert (first["key"], first["id"], first["question"]) == ("s0", "q0", "grey?")
    for row in scores.predictions:
        number = int(row["key"][1:])
        assert row["prediction"] == str(grey(number))
        assert row["blind_prediction"] == str(grey((number + 5) % COUNT))
        assert row["score"] == float(row["kind"] == "right")


def test_loss_and_gain_by_hand(assembled, data):
    """Loss is a mean over tokens, the gain a mean over samples, with the standard error of that mean."""
    metrics = evaluate(assembled, data, Evaluate(batch_size=3, blind=True)).metrics
    words = [[str(grey(n)), *(["no"] if n % 2 == 0 else [])] for n in range(COUNT)]
    ids = [[i for word in line for i in assembled.tokenizer.encode(word + "<|im_end|>")] for line in words]
    tokens = np.array([len(line) for line in ids])
    weight = np.array([sum(i % 7 for i in line) for line in ids])  # of a sample's loss, tokens summed
    greys = np.array([grey(n) / 100 for n in range(COUNT)])
    own, other = greys * weight, np.roll(greys, -5) * weight
    assert metrics["loss"] == pytest.approx(own.sum() / tokens.sum())
    assert metrics["blind_loss"] == pytest.approx(other.sum() / tokens.sum())
    gains = (other - own) / tokens
    assert abs(gains.mean()) > 0.01
    assert metrics["image_gain"]["nats_per_token"] == pytest.approx(gains.mean(), abs=1e-7)
    assert metrics["image_gain"]["standard_error"] == pytest.approx(gains.std(ddof=1) / math.sqrt(COUNT))


def in_ranks(monkeypatch, count: int, call: Any) -> list[Any]:
    """Run `call` as each of `count` ranks, in threads that gather from one another."""
    local, values, results = threading.local(), [None] * count, [None] * count
    barrier = threading.Barrier(count, timeout=30)

    def gather(value: Any) -> list[Any]:
        values[local.rank] = value
        barrier.wait()
        found = copy.deepcopy(values)
        barrier.wait()
        return found

    monkeypatch.setattr(dist, "rank", lambda: local.rank)
    monkeypatch.setattr(dist, "world_size", lambda: count)
    monkeypatch.setattr(dist, "gather", gather)

    def work(rank: int) -> None:
        local.rank = rank
        results[rank] = call()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def rounded(value: Any) -> Any:
    """Float sums in another order agree to 9 digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.9g}") if isinstance(value, float) else value


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (32, 1), (4, 2), (2, 3), (1, 12)])
def test_batches_and_ranks_change_nothing(assembled, data, monkeypatch, size, ranks):
    expected = evaluate(assembled, data, Evaluate(batch_size=8, blind=True))
    settings = Evaluate(batch_size=size, blind=True)
    found = in_ranks(monkeypatch, ranks, lambda: evaluate(assembled, data, settings, synced=ranks > 1))
    for scores in found:
        assert scores.predictions == expected.predictions
        assert rounded(scores.metrics) == rounded(expected.metrics)


def test_a_limit_is_spread_and_named(assembled, data):
    scores = evaluate(assembled, data, Evaluate(), limit=4)
    assert (scores.metrics["samples"], scores.metrics["samples_available"]) == (4, COUNT)
    assert [row["key"] for row in scores.predictions if row["kind"] == "right"] == ["s0", "s2", "s5", "s7"]
    assert scores.metrics["account"]["read"] == 4
    again = evaluate(assembled, data, Evaluate(blind=True), limit=4).predictions
    assert [row["blind_prediction"] for row in again if row["kind"] == "right"] == [
        str(grey(n)) for n in (5, 7, 0, 2)
    ]


def test_bad_held_out_samples_are_counted(assembled, tmp_path):
    record = json.dumps({"question": "grey?", "answer": "30"}).encode()
    both = json.dumps(
        {"messages": [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "x"}]}
    )
    samples = [
        ("good", {"json": record, "png": picture(30)}),
        ("torn", {"json": record, "png": picture(50)[:60]}),
        ("two", {"json": both.encode(), "png": picture(70)}),
        ("text", {"json": record}),
        ("other", {"json": record, "png": picture(90)}),
    ]
    path = tiny.shard(tmp_path / "bad.tar", samples)
    scores = evaluate(assembled, Data(evaluate=[str(path)]), Evaluate(blind=True))
    account = scores.metrics["account"]
    assert (account["read"], account["used"], sum(account["refused"].values())) == (5, 3, 2)
    assert {row["key"]: row["blind_prediction"] for row in scores.predictions} == {
        "good": "70",  # the image is whole, though its own sample is not
        "text": "-1",  # it has no image to take away
        "other": "70",
    }
    tiny.shard(path, samples[1:3])
    with pytest.raises(UserError, match="none of 2 held-out samples"):
        evaluate(assembled, Data(evaluate=[str(path)]), Evaluate())
    tiny.shard(path, samples[:1])
    with pytest.raises(UserError, match="blind scores need another sample with 1 image"):
        evaluate(assembled, Data(evaluate=[str(path)]), Evaluate(blind=True))
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(assembled, Data(), Evaluate())


def test_two_metrics_of_one_name_stay_apart(assembled, data):
    metrics = evaluate(assembled, data, Evaluate(metrics=("exact_match", "vqa"))).metrics
    assert metrics["accuracy"] == pytest.approx(10 / 15)
    assert metrics["vqa"]["accuracy"] == pytest.approx(10 / 15) and metrics["questions"] == 15


def test_metrics_of_a_run(parts, tmp_path):
    """What the README's table is made from."""
    tiny.questions_shard(tmp_path / "three.tar", 6, questions=3)
    held_out = {"data__evaluate": [str(tmp_path / "three.tar")]}
    tree = tiny.run_tree(parts, str(tmp_path / "out"), train__max_steps=2, **held_out)
    tree["evaluate"] |= {"blind": True}
    assert train(validate(tree, "x")) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for node in (metrics, metrics["blind"]):
        assert set(node["accuracy_by_kind"]) == {"shape", "color", "yes_no"} and 0 <= node["accuracy"] <= 1
    assert {"loss", "blind_loss", "image_gain"} <= set(metrics)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 18 and all((tmp_path / "out" / row["image"]).is_file() for row in rows)


def curve(monkeypatch, losses: list[float], **metrics: Any) -> None:
    """Let the evaluations of a run find these losses."""
    left = iter(losses)
    counts = {"samples": 1, "samples_available": 1}
    found = lambda *a, **b: Scores({"loss": next(left), **counts, **metrics})  # noqa: E731
    monkeypatch.setattr("vlm_adapt.evaluate.run.evaluate", found)


def scored_tree(parts: Path, output: Path, **changes: Any) -> dict[str, Any]:
    held_out = {"data__evaluate": [str(parts / "test.tar")], "train__eval_steps": 1}
    saves = {"train__save_total_limit": 1, "train__max_steps": 5, "train__save_steps": 1}
    return tiny.run_tree(parts, str(output), **(held_out | saves | changes))


@pytest.mark.parametrize(("greater", "best"), [(False, 2), (True, 4)])
def test_the_best_is_kept(parts, tmp_path, monkeypatch, greater, best):
    curve(monkeypatch, [float("nan"), 1.0, 3.0, 4.0, 2.0])
    tree = scored_tree(parts, tmp_path / "out")
    tree["evaluate"] |= {"greater_is_better": greater}
    train(validate(tree, "x"))
    output = tmp_path / "out"
    assert (output / "best").read_text() == f"checkpoint-{best}"
    assert sorted(path.name for path in output.glob("checkpoint-*")) == sorted(
        {f"checkpoint-{best}", "checkpoint-5"}
    )
    assert find_checkpoint(output).name == f"checkpoint-{best}"
    # Scored on every sample at the last step: not scored again at the end (the sixth would fail).
    assert sum(line.get("event") == "evaluate" for line in read_journal(output)) == 5


def test_a_checkpoint_knows_the_best_so_far(parts, tmp_path, monkeypatch):
    """Gone on with after the best: a worse one does not take its place."""
    curve(monkeypatch, [3.0, 1.0])
    tree = scored_tree(parts, tmp_path / "out")
    with pytest.raises(StopIteration):  # the third evaluation kills the run
        train(validate(tree, "x"))
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "state.json").read_text())["best"] == 1.0
    curve(monkeypatch, [2.0, 2.5, 1.5])
    train(validate(tree, "x"))
    assert (tmp_path / "out" / "best").read_text() == "checkpoint-2"


def test_a_metric_that_is_not_there(parts, tmp_path, monkeypatch):
    curve(monkeypatch, [3.0], accuracy=0.5)
    tree = scored_tree(parts, tmp_path / "out")
    tree["evaluate"] |= {"best_metric": "acuracy"}
    with pytest.raises(UserError, match="'acuracy' is not among the scores.*'accuracy'"):
        train(validate(tree, "x"))
