"""`vlm-adapt scores` end to end: a checkpoint scores its training samples, and a run keeps some of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from vlm_adapt.cli import main
from vlm_adapt.config.load import validate
from vlm_adapt.config.schema import Source
from vlm_adapt.data.score_file import read_score_file
from vlm_adapt.data.select import select
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import build
from vlm_adapt.train.journal import read_journal
from vlm_adapt.train.run import train


@pytest.fixture(scope="module")
def trained(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on 24 samples, with a checkpoint each."""
    output = tmp_path_factory.mktemp("trained") / "out"
    assert train(tiny.run_of(parts, output, train__max_steps=2)) == 0
    return output


def test_scored_then_kept_then_trained(parts, trained, tmp_path, capsys):
    path = tmp_path / "s.safetensors"
    assert main(["scores", str(trained), "--output", str(path), "--batch-size", "5"]) == 0
    said = capsys.readouterr()
    assert "el2n" in said.out and "24 of 24 samples scored" in said.out and str(path) in said.err
    file = read_score_file(path)
    assert set(file.scores) == {"el2n", "grand", "loss", "tokens"} and len(file.keys) == 24
    assert file.made["checkpoints"] == [{"checkpoint": str(trained / "checkpoint-2"), "step": 2}]
    assert all(0 < value < 2**0.5 for value in file.scores["el2n"])

    # One epoch of the six hardest: their keys, and no others, are trained on.
    keep = {"scores": str(path), "by": "grand", "lowest": 0.75}
    source: dict[str, Any] = {"shards": str(parts / "train.tar"), "keep": keep}
    hardest = np.argsort(file.scores["grand"])[-6:]
    given = Source.model_validate(source)
    assert select(given, ShardSet(given.shards)).tolist() == sorted(hardest.tolist())  # type: ignore[union-attr]
    batch = {"train__per_device_train_batch_size": 3, "train__max_steps": 0}
    run = tiny.run_of(parts, tmp_path / "out", data__train=[source], **batch)
    reader = build(run.model, _float32()).reader(run.data.train, 0, run.data)
    assert {reader.key(n).encode() for n in range(len(reader))} == {file.keys[place] for place in hardest}
    assert train(run) == 0
    finish = read_journal(tmp_path / "out")[-1]
    assert finish["step"] == 2 and finish["account"]["read"] == finish["account"]["used"] == 6
    # `limit` counts what is kept.
    limited = build(run.model, _float32()).reader([given.model_copy(update={"limit": 2})], 0, run.data)
    assert [limited.locate(n)[1] for n in range(len(limited))] == sorted(hardest.tolist())[:2]


def _float32() -> Any:
    import torch

    return torch.float32


def test_keep_and_limit_of_the_run_do_not_matter(parts, trained, tmp_path):
    """All samples are scored, so that another range can be chosen later."""
    path = tmp_path / "s.safetensors"
    assert main(["scores", str(trained), "data.train.0.limit=3", "--output", str(path)]) == 0
    assert len(read_score_file(path).keys) == 24
    assert main(["scores", str(trained), "--shards", str(parts / "test.tar"), "--output", str(path)]) == 0
    assert len(read_score_file(path).keys) == 8
    assert main(["scores", str(trained), "--limit", "4", "--output", str(path)]) == 0
    assert len(read_score_file(path).keys) == 4


def test_the_mean_over_checkpoints(trained, tmp_path, capsys):
    folders = [str(trained / f"checkpoint-{step}") for step in (1, 2)]
    found = []
    for number, words in enumerate([folders[:1], folders[1:], folders]):
        path = tmp_path / f"{number}.safetensors"
        assert main(["scores", *words, "--output", str(path)]) == 0
        found.append(read_score_file(path))
    for name in ("el2n", "grand", "loss"):
        one, two, both = (file.scores[name] for file in found)
        assert not np.allclose(one, two)
        np.testing.assert_allclose(both, (one + two) / 2, rtol=1e-6)  # float32 in the file
    assert [line["step"] for line in found[2].made["checkpoints"]] == [1, 2]
    assert main(["scores", *folders]) == 2
    assert "--output" in capsys.readouterr().err


def test_a_picture(trained, tmp_path):
    from PIL import Image

    words = ["--output", str(tmp_path / "s.safetensors"), "--picture", str(tmp_path / "s.png")]
    assert main(["scores", str(trained), *words]) == 0
    with Image.open(tmp_path / "s.png") as image:
        assert image.width > 600 and len(set(image.convert("L").resize((50, 50)).getdata())) > 20


def test_interrupted(trained, tmp_path, monkeypatch):
    """Nothing is left, neither of the file nor beside it."""

    def stopped(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm_adapt.evaluate.difficulty.token_scores", stopped)
    assert main(["scores", str(trained), "--output", str(tmp_path / "new" / "s.safetensors")]) == 130
    assert list(tmp_path.iterdir()) == []
    before = sorted(path.name for path in (trained / "checkpoint-2").iterdir())
    assert main(["scores", str(trained)]) == 130
    assert sorted(path.name for path in (trained / "checkpoint-2").iterdir()) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.workers=0"], "scores needs a checkpoint"),
        (["nowhere"], "nowhere"),
        (["OUT", "--output", "OUT/checkpoint-2/run.yaml"], "ends in .safetensors"),
        (["OUT", "--output", "OUT/checkpoint-2/optimizer.safetensors"], "no file of scores"),
        (["OUT", "--by", "el3n"], "not one of"),
        (["OUT", "--picture", "x.gif"], "a picture ends in"),
        (["OUT", "data.train=[]"], "nothing to score"),
        (["OUT", "--shards", "none.tar"], "none.tar"),
    ],
)
def test_mistakes(trained, capsys, words, sentence):
    assert main(["scores", *(word.replace("OUT", str(trained)) for word in words)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and "Traceback" not in said and said.count("\n") == 1


def test_scores_that_are_not_there(parts, tmp_path):
    source = {"shards": str(parts / "train.tar"), "keep": {"scores": str(tmp_path / "none.safetensors")}}
    run = validate(tiny.run_tree(parts, str(tmp_path / "out"), data__train=[source]), "x")
    with pytest.raises(UserError, match="there is no file of scores"):
        train(run)
    assert not (tmp_path / "out").exists()
