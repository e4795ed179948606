"""Frozen features: neighbours against brute force, the linear probe, and the verb `probe`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forks import write
from tiny import sentence

from vlm_adapt.cli import main
from vlm_adapt.data.images import load_image
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate import neighbours
from vlm_adapt.evaluate import probe as probing
from vlm_adapt.evaluate.features import Features, Label, open_pooled
from vlm_adapt.train.run import train as train_run

torch.set_num_threads(1)


def brute_force(features_ND: torch.Tensor, labels: list[str], k: int) -> float:
    """Leave-one-out in plain Python: each pair's cosine, a stable sort, a count."""
    rows = features_ND.double().tolist()

    def cosine(a: list[float], b: list[float]) -> float:
        length = (sum(x * x for x in a) * sum(x * x for x in b)) ** 0.5
        return round(sum(x * y for x, y in zip(a, b, strict=True)) / length, 10) if length else 0.0

    right = 0
    for i, row in enumerate(rows):
        others = sorted((-cosine(row, other), j) for j, other in enumerate(rows) if j != i)[:k]
        votes = Counter(labels[j] for _, j in others)
        best = max(votes.values())
        chosen = next(labels[j] for _, j in others if votes[labels[j]] == best)
        right += chosen == labels[i]
    return right / len(rows)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_leave_one_out_is_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "VALUES_AT_ONCE", 150)  # several rows at a time, none of them all
    generator = torch.Generator().manual_seed(k)
    labels = [f"class {int(c)}" for c in torch.randint(4, (60,), generator=generator)]
    features = 0.5 * torch.randn(60, 5, generator=generator)
    features += torch.tensor([[float(label[-1]) == d for d in range(5)] for label in labels]).float()
    found = neighbours.leave_one_out(features, labels, k)
    assert found == brute_force(features, labels, k)
    assert 0.5 < found < 1


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ties_go_to_the_lower_number(k: int) -> None:
    # Few different vectors, scaled: most neighbours are equally near.
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-1, 2, (40, 2), generator=generator).float()
    features *= torch.tensor([1.0, 3.0, 0.1, 7.0]).repeat(10)[:, None]
    labels = [str(int(c)) for c in torch.randint(3, (40,), generator=generator)]
    assert neighbours.leave_one_out(features, labels, k) == brute_force(features, labels, k)


def test_votes_weighted_like_dino() -> None:
    similar = torch.tensor([[0.9, 0.5, 0.5]]).double()
    labels = torch.tensor([[0, 1, 1]])
    assert neighbours.vote(similar, labels).tolist() == [1]
    # exp(0.9 / 0.07) is 300 times exp(0.5 / 0.07), and there are two of these
    assert neighbours.vote(similar, labels, 0.07).tolist() == [0]
    assert neighbours.vote(similar, torch.tensor([[2, 1, 0]])).tolist() == [2]  # a tie: the nearest


@pytest.mark.parametrize(
    ("features", "labels", "k", "said"),
    [
        (torch.ones(3, 2), [0, 1, 1], 3, "k 3 is not from 1 to 2"),
        (torch.ones(3, 2), [0, 1, 1], 0, "k 0 is not from 1"),
        (torch.full((3, 2), torch.nan), [0, 1, 1], 1, "not finite"),
        (torch.ones(3, 2), [0, 1], 1, "3 vectors and 2 labels"),
    ],
)
def test_neighbours_refuse(features: torch.Tensor, labels: list[int], k: int, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        neighbours.leave_one_out(features, labels, k)
    sentence(caught)


# What is learned from vectors -----------------------------------------------------------------------


def clusters(count: int, classes: int, seed: int, spread: float = 1.0) -> tuple[torch.Tensor, list[str]]:
    """Vectors around a centre for each class; centres are the same for every seed."""
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9)) * 2
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    noise = torch.randn(count, 6, generator=generator) * spread
    return centres[labels] + noise + 5, [f"c{int(one)}" for one in labels]


def as_features(vectors: torch.Tensor, labels: list[str]) -> Features:
    return Features({"vision layer 0": vectors}, labels, Account(), 0)


def test_the_linear_probe_is_at_its_minimum() -> None:
    """D C + C parameters, a gradient of nothing, the same every time, scale and place of channels undone."""
    vectors, words = clusters(80, 4, 1, spread=2.0)
    labels = neighbours.as_numbers(words)
    made = probing.fit_linear(vectors, labels, 4, 0.01)
    assert made.parameters == 6 * 4 + 4
    weight, bias = made.weight_CD.double().requires_grad_(), made.bias_C.double().requires_grad_()
    inputs = (vectors - vectors.mean(0)) / vectors.std(0, correction=0)
    loss = torch.nn.functional.cross_entropy(inputs.double() @ weight.T + bias, labels)
    (loss + 0.005 * weight.square().sum()).backward()
    # Of a loss near 1: float32 sums over 80 rows leave about 1e-6.
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4
    again = probing.fit_linear(vectors, labels, 4, 0.01)
    assert torch.equal(again.weight_CD, made.weight_CD)
    other = probing.fit_linear(vectors * 7 - 3, labels, 4, 0.01)
    torch.testing.assert_close(other(vectors * 7 - 3), made(vectors), atol=2e-3, rtol=1e-3)
    loose, tight = (probing.fit_linear(vectors, labels, 4, p).weight_CD.norm() for p in (1e-4, 1.0))
    assert loose > 2 * tight
    assert probing.choose_penalty(vectors, labels, 4) in probing.PENALTIES


def test_every_way() -> None:
    train, test = as_features(*clusters(120, 4, 1)), as_features(*clusters(40, 4, 2))
    test.labels[0] = "never seen"
    found = probing.probe(train, test, probing.WAYS, [1, 5])
    assert found["unseen"] == 1 and found["classes"] == ["c0", "c1", "c2", "c3"]
    by = {(one["by"], one.get("k")): one for one in found["results"]}
    assert set(by) == {("knn", 1), ("knn", 5), ("linear", None), ("retrieval", None)}
    assert by["linear", None]["accuracy"] > 0.9 and by["linear", None]["parameters"] == 28
    # Brute force: weighted votes of the five nearest by cosine.
    unit = [
        torch.nn.functional.normalize(one.vectors["vision layer 0"].double(), dim=1) for one in (train, test)
    ]
    similar = unit[1] @ unit[0].T
    right = 0
    hits, precisions = 0, []
    for row, label in zip(similar, test.labels, strict=True):
        order = row.argsort(descending=True)
        votes: Counter[str] = Counter()
        for place in order[:5].tolist():
            votes[train.labels[place]] += float(torch.exp(row[place] / 0.07))  # type: ignore[assignment]
        right += votes.most_common(1)[0][0] == label
        same = [train.labels[place] == label for place in order.tolist()]
        if any(same):
            hits += any(same[:5])
            at = [sum(same[: i + 1]) / (i + 1) for i, good in enumerate(same) if good]
            precisions.append(sum(at) / len(at))
    assert by["knn", 5]["accuracy"] == right / 40
    retrieval = by["retrieval", None]
    assert retrieval["queries"] == 39 == len(precisions)
    assert retrieval["recall@5"] == hits / 39
    assert retrieval["mAP"] == pytest.approx(sum(precisions) / 39, abs=1e-12)


def test_alone_is_leave_one_out() -> None:
    test = as_features(*clusters(60, 3, 3, spread=3.0))
    found = probing.probe(None, test, ["knn", "retrieval"], [1])
    want = neighbours.leave_one_out(test.vectors["vision layer 0"], test.labels)
    assert found["results"][0]["accuracy"] == want == found["results"][1]["recall@1"] < 1
    with pytest.raises(UserError, match="give --train"):
        probing.probe(None, test, ["linear"], [1])
    with pytest.raises(UserError, match="k 60 is more than the 59 images"):
        probing.probe(None, test, ["knn"], [60])
    with pytest.raises(UserError, match="every image has the label 'x'"):
        probing.probe(None, as_features(torch.ones(3, 2), ["x"] * 3), ["knn"], [1])


def test_standardised_neighbours_see_every_channel() -> None:
    vectors, labels = clusters(80, 4, 4)
    vectors[:, 5] = 1000 * torch.randn(80, generator=torch.Generator().manual_seed(0))  # says nothing
    train, test = as_features(vectors[:60], labels[:60]), as_features(vectors[60:], labels[60:])
    plain, standard = (
        probing.probe(train, test, ["knn"], [5], standardise=one)["results"][0]["accuracy"]
        for one in (False, True)
    )
    assert standard > plain and standard > 0.8


@pytest.mark.parametrize(
    ("label", "record", "want"),
    [
        (Label("kind"), {"kind": "cat"}, "cat"),
        (Label("labels[0]"), {"labels": ["a", "b"]}, "a"),
        (Label("labels.-1"), {"labels": ["a", "b"]}, "b"),
        (Label("about.sex"), {"about": {"sex": True}}, "true"),
        (Label("n"), {"n": 3}, "3"),
        (Label(question="COLOR"), {"question": "what color is it?", "answer": "Red "}, "red"),
        (
            Label(kind="b"),
            {"questions": [{"question": "x", "answers": ["no", "yes", "yes"], "kind": "b"}]},
            "yes",
        ),
        (Label("labels[2]"), {"labels": ["a"]}, BadSample("field 'labels[2]' is not there")),
        (Label("labels"), {"labels": ["a"]}, BadSample("field 'labels' is no single value")),
        (Label("label"), {"labels": ["a"]}, BadSample("field 'label' is not there")),
        (Label(question="who"), {"question": "what?", "answer": "x"}, BadSample("no question with 'who'")),
    ],
)
def test_labels(label: Label, record: dict[str, Any], want: Any) -> None:
    if isinstance(want, str):
        assert label.of(record) == want
        return
    with pytest.raises(BadSample) as caught:
        label.of(record)
    assert caught.value.reason == want.reason


# From shards to figures -------------------------------------------------------------------------------


def test_a_vector_is_the_mean_over_places(parts: Path) -> None:
    """Of a configuration's tower, layer after layer; in batches or not."""
    path = Path(write(tiny.run_tree(parts, str(parts / "probe"))))
    pooled, _ = open_pooled(path, layers="all")
    shards = ShardSet(str(parts / "train.tar"))
    found = pooled.of(shards, Label(kind="color"), batch_size=5)
    assert list(found.vectors) == ["vision layer 0", "vision layer 1"]
    assert found.labels == ["red", "green", "blue"] * 8 and found.account.used == 24
    _, members = shards.read(7)
    pixels = torch.from_numpy(load_image(members["png"], pooled.tower.image_spec))[None]
    with torch.no_grad():
        layers = pooled.tower(pooled.tower.normalise(pixels), [0, 1])
    for vectors, layer in zip(found.vectors.values(), layers, strict=True):
        torch.testing.assert_close(vectors[7], layer[0].mean(0), atol=1e-6, rtol=1e-5)
    few = pooled.of(shards, Label(kind="color"), batch_size=64, limit=3)
    torch.testing.assert_close(few.vectors["vision layer 1"], found.vectors["vision layer 1"][::8])


def test_the_verb(parts: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, test = str(parts / "train.tar"), str(parts / "test.tar")
    config = write(tiny.run_tree(parts, str(tmp_path / "out")))
    words = ["probe", config, "--train", train, "--test", test, "--kind", "color", "--k", "1,3"]
    assert main([*words, "--layers", "all", "--by", "knn,linear,retrieval"]) == 0
    printed = capsys.readouterr().out
    assert "24 images to learn from, 8 to test; 3 classes" in printed
    assert "always the most common class" in printed and "linear, 99 parameters" in printed
    figures = json.loads((tmp_path / "probe.json").read_text())
    assert len(figures["results"]) == 2 * 4 and figures["samples"]["test"]["used"] == 8
    # An adapted tower, and its connector; images of which some have several and some no label.
    tiny.questions_shard(tmp_path / "more.tar", 6, images=2, first=200)
    mixed = [
        ("a", {"json": b'{"labels": ["x"]}', "png": tiny.image(1)}),
        ("b", {"json": b'{"labels": ["x"]}'}),
    ]
    tiny.shard(tmp_path / "mixed.tar", mixed)
    run = tiny.run_of(parts, tmp_path / "run", train__max_steps=1)
    assert train_run(run) == 0
    words = ["probe", str(tmp_path / "run"), "--test", test, "--test", str(tmp_path / "more.tar")]
    words += ["--test", str(tmp_path / "mixed.tar"), "--question", "what color", "--by", "knn", "--k", "1"]
    assert main([*words, "--after", "connector"]) == 0
    printed = capsys.readouterr().out
    assert "each left out in turn, 14 to test" in printed and "connector" in printed
    assert "test: 6 samples hold several images; the first was read" in printed
    assert "refused 2 x no question with 'what color'" in printed
    assert (tmp_path / "run" / "checkpoint-1" / "probe.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--by", "knm"], "--by 'knm' is not one of knn, linear, retrieval, did you mean 'knn'?"),
        (["--k", "1,0"], "--k '1,0' is no list"),
        (["--label", "x"], "give --label, or --question, or --kind"),
        (["--layers", "all", "--after", "connector"], "--layers is for the vision tower"),
        (["--layers", "x"], "--layers 'x' is not 'all' or numbers"),
        (["--layers", "9"], "vision layer 9 does not exist"),
        (["--after", "language"], "--after 'language' is not one of"),
        (["--after", "connector"], "has not been trained: give a checkpoint"),
        (["--by", "linear"], "give --train"),
        (["--output", "no/such/p.json"], "there is no folder 'no/such'"),
        (["--test", "none.tar"], "none.tar"),
        (["--kind", "smell"], "none of 8 samples has an image and a label"),
        (["--k", "8"], "k 8 is more than the 7 images"),
    ],
)
def test_bad_input(parts: Path, tmp_path: Path, capsys: Any, words: list[str], said: str) -> None:
    config = write(tiny.run_tree(parts, str(tmp_path / "out")))
    given = ["probe", config, "--output", str(tmp_path / "p.json"), *words]
    for option, value in (
        ("--test", str(parts / "test.tar")),
        ("--kind", "color"),
        ("--by", "knn"),
        ("--k", "1"),
    ):
        given += [option, value] if option not in words else []
    assert main(given) == 2
    told = capsys.readouterr().err.strip()
    assert said in told and "Traceback" not in told
    assert not (tmp_path / "p.json").exists()
