"""EL2N and the last layer's gradient norm, against autograd and written-out sums."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from vlm_adapt import dist
from vlm_adapt.config.load import validate
from vlm_adapt.config.schema import Data
from vlm_adapt.data.collate import collate
from vlm_adapt.data.score_file import read_score_file
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate import difficulty
from vlm_adapt.evaluate.difficulty import errors, score_samples, token_scores
from vlm_adapt.language.load import load_language
from vlm_adapt.models.build import Assembled, build


def head_gradient(language: Any, hidden_D: torch.Tensor, target: int) -> float:
    """The norm of the gradient of one token's loss with respect to the head's own tensors."""
    head = language.model.get_output_embeddings()
    tensors = [head.weight] + ([head.bias] if head.bias is not None else [])
    loss = functional.cross_entropy(language.logits(hidden_D[None]).float(), torch.tensor([target]))
    gradients = torch.autograd.grad(loss, tensors)
    return float(sum(gradient.double().square().sum() for gradient in gradients).sqrt())


def states(language: Any, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    head = language.model.get_output_embeddings()
    hidden_ND = torch.randn(count, head.weight.shape[1], generator=generator) * 2
    return hidden_ND, torch.randint(head.weight.shape[0], (count,), generator=generator)


def check(language: Any, monkeypatch: Any) -> None:
    hidden_ND, targets_N = states(language)
    found = token_scores(language, hidden_ND, targets_N)
    probabilities = language.logits(hidden_ND).double().softmax(1).detach()
    wanted = probabilities - functional.one_hot(targets_N, probabilities.shape[1])
    # float32 sums over 330 words against float64 ones
    torch.testing.assert_close(found["el2n"].double(), wanted.norm(dim=1), rtol=1e-5, atol=0)
    norms = [head_gradient(language, h, int(t)) for h, t in zip(hidden_ND, targets_N, strict=True)]
    torch.testing.assert_close(found["grand"].double(), torch.tensor(norms).double(), rtol=1e-5, atol=0)
    losses = functional.cross_entropy(language.logits(hidden_ND).double(), targets_N, reduction="none")
    torch.testing.assert_close(found["loss"].double(), losses.detach(), rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(difficulty, "VALUES_AT_ONCE", {"cpu": 2 * probabilities.shape[1]})
    again = token_scores(language, hidden_ND, targets_N)  # rows two at a time
    for name, values in found.items():
        torch.testing.assert_close(again[name], values, rtol=1e-6, atol=1e-6)
    assert not any(values.requires_grad for values in found.values())


@pytest.fixture
def language(parts: Path) -> Any:
    return load_language(parts / "llama", "hub:", "auto", torch.float32)


def test_gradient_norm_is_autograds(language, monkeypatch):
    check(language, monkeypatch)
    hidden_ND, targets_N = states(language)
    found = token_scores(language, hidden_ND, targets_N)
    torch.testing.assert_close(found["grand"], found["el2n"] * hidden_ND.norm(dim=1))  # no bias: EL2N norm(h)


def test_with_a_bias(language, monkeypatch):
    head = language.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(
        torch.randn(head.weight.shape[0], generator=torch.Generator().manual_seed(2))
    )
    check(language, monkeypatch)
    hidden_ND, targets_N = states(language)
    found = token_scores(language, hidden_ND, targets_N)
    wanted = found["el2n"] * (hidden_ND.square().sum(1) + 1).sqrt()
    torch.testing.assert_close(found["grand"], wanted)


def test_with_a_soft_cap(language, monkeypatch):
    """Gemma 2: the gradient goes through the cap, so it is not EL2N times norm(h)."""
    language.config.final_logit_softcapping = 3.0
    check(language, monkeypatch)
    hidden_ND, targets_N = states(language)
    found = token_scores(language, hidden_ND, targets_N)
    assert (found["grand"] < 0.9 * found["el2n"] * hidden_ND.norm(dim=1)).any()


def test_encoder_decoder_with_a_scaled_head(tmp_path, monkeypatch):
    """T5 scales states before the head."""
    check(load_language(tiny.t5(tmp_path), "hub:", "auto", torch.float32), monkeypatch)


def test_certain_and_hopeless_tokens():
    """No difference of nearly equal numbers, no overflow."""
    logits = torch.zeros(3, 4)
    logits[0, 1] = 20.0  # p = 1 - 6e-9
    logits[1, 2] = 3e4  # the target has probability 0
    el2n, loss = errors(logits, torch.tensor([1, 0, 3]))
    wanted = logits.double().softmax(1) - functional.one_hot(torch.tensor([1, 0, 3]), 4)
    torch.testing.assert_close(el2n.double(), wanted.norm(dim=1), rtol=1e-5, atol=0)
    assert 0 < el2n[0] < 1e-8 and el2n[1] == pytest.approx(2**0.5) and loss[1] == pytest.approx(3e4)


@pytest.fixture(scope="module")
def assembled(parts: Path) -> Assembled:
    return build(validate(tiny.run_tree(parts), "x").model, torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Samples of unequal length in two sources; one is damaged, one has captions, one no image."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = []
    for number in range(7):
        asked = [
            {"question": f"what is {'it ' * n}?", "answer": "red " * (number + 1)}
            for n in range(number % 3 + 1)
        ]
        samples.append(
            (f"q{number}", {"json": json.dumps({"questions": asked}).encode(), "png": tiny.image(number)})
        )
    torn = {"json": samples[0][1]["json"], "png": samples[0][1]["png"][:60]}
    words = [
        (
            "c0",
            {
                "json": json.dumps({"captions": ["a red circle", "two cats", "no"]}).encode(),
                "png": tiny.image(9),
            },
        ),
        ("t0", {"json": json.dumps({"question": "yes?", "answer": "no"}).encode()}),
    ]
    one = tiny.shard(folder / "a" / "000000.tar", [*samples, ("torn", torn)])
    two = tiny.shard(folder / "b" / "000000.tar", words)
    return Data(train=[str(one), str(two)])


def score(assembled: Assembled, data: Data, **more: Any) -> Any:
    return score_samples(assembled, assembled.reader(data.train, 0, data), more.pop("batch_size", 4), **more)


def test_mean_over_learned_tokens(assembled, data):
    """Each sample alone, its gradient by autograd token by token, against the batched pass."""
    scored = score(assembled, data, batch_size=3)
    reader, model = scored.reader, assembled.model
    for number in (0, 5, 8, 9):
        sample, phrasing = reader.sample(number)
        batch = collate(reader.references(sample, phrasing), **assembled.collate_options)
        with torch.no_grad():
            hidden = model.language.hidden(model.inputs(batch)).flatten(0, 1)[batch.predict_from_N]
        pairs = list(zip(hidden, batch.targets_N.tolist(), strict=True))
        norms = [head_gradient(model.language, state, target) for state, target in pairs]
        # Other rows of a batch change the padding, hence the order of sums.
        assert scored.scores["grand"][number] == pytest.approx(np.mean(norms), rel=1e-4)
        assert scored.scores["tokens"][number] == len(norms)
    assert scored.scores["tokens"][8] > 6  # all three captions
    assert scored.account.used == 9 and scored.account.refused == {"damaged PNG image": 1}
    assert np.isnan(scored.scores["el2n"][7]) and "torn" in scored.account.named()


def in_ranks(monkeypatch: Any, count: int, call: Any) -> list[Any]:
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


@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 1), (32, 1), (2, 3), (1, 12)])
def test_batches_and_ranks_change_nothing(assembled, data, monkeypatch, batch_size, ranks):
    expected = score(assembled, data)
    # Threads share the model: hooks of one would see the head's calls of another.
    lock, plain = threading.Lock(), difficulty.token_scores
    monkeypatch.setattr(difficulty, "token_scores", lambda *a: _locked(lock, plain, *a))
    for found in in_ranks(monkeypatch, ranks, lambda: score(assembled, data, batch_size=batch_size)):
        for name, values in expected.scores.items():
            np.testing.assert_allclose(found.scores[name], values, rtol=1e-4)  # float32, padded otherwise
        assert (found.account.used, found.account.refused) == (9, {"damaged PNG image": 1})


def _locked(lock: Any, call: Any, *arguments: Any) -> Any:
    with lock:
        return call(*arguments)


def test_a_limit_is_spread(assembled, data):
    scored = score(assembled, data, limit=3)
    assert scored.looked_at.tolist() == [0, 3, 6]
    assert np.flatnonzero(np.isfinite(scored.scores["loss"])).tolist() == [0, 3, 6]


def test_nothing_can_be_scored(assembled, tmp_path):
    path = tiny.shard(tmp_path / "x.tar", [("a", {"json": b"{}"}), ("b", {"json": b"{"})])
    with pytest.raises(UserError, match="none of 2 samples could be scored.*'?a"):
        score(assembled, Data(train=[str(path)]))


def test_a_file_of_the_pass(assembled, data, tmp_path):
    from vlm_adapt.evaluate.scoring import score_file

    scored = score(assembled, data)
    score_file(scored, data.train, {"checkpoints": ["x"]}).write(tmp_path / "s.safetensors")
    back = read_score_file(tmp_path / "s.safetensors")
    assert back.keys == [*(f"q{n}".encode() for n in range(7)), b"torn", b"c0", b"t0"]
    assert back.group.tolist() == [0] * 8 + [1] * 2 and [group.source for group in back.groups] == [0, 1]
    for name, values in scored.scores.items():
        np.testing.assert_array_equal(back.scores[name], values.astype(np.float32))
