"""How many bad samples a run bears, and that every one of them is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import sentence

from vlm_adapt.config.load import validate
from vlm_adapt.config.schema import Data
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.train.budget import Budget
from vlm_adapt.train.journal import read_journal
from vlm_adapt.train.run import train


def mask(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shard_of(path: Path, good: int, bad: int) -> str:
    """Samples of which `bad` have a mask that is not of the image's size (24 x 20)."""
    record = json.dumps({"question": "what is it?", "answer": "a cat", "labels": ["cat"]}).encode()
    samples = []
    for number in range(good + bad):
        size = (24, 20) if number < good else (20, 24)
        members = {"png": tiny.image(number), "json": record, "mask.png": mask(*size)}
        samples.append((f"s{number}", members))
    return str(tiny.shard(path, samples))


def budget_of(folder: Path, limits: dict, names: int = 2) -> Budget:
    sources = [
        {"shards": "x.tar", "name": f"source{n}", "max_refused": 0.2 if n else None} for n in range(names)
    ]
    data = Data(train=tuple(sources), **limits)
    return Budget(data, [f"source{n}" for n in range(names)], Account(), 0, folder)


def step(used: dict[str, int], refused: dict[str, int]) -> Account:
    account = Account()
    for name, count in used.items():
        for _ in range(count):
            account.use(source=name, tokens=5)
    for name, count in refused.items():
        for number in range(count):
            account.refuse(f"k{number}", BadSample("damaged image", "cut off"), name)
    return account


def run(budget: Budget, *accounts: Account) -> None:
    for number, account in enumerate(accounts, 1):
        budget.add(budget.counts(account), account, number)


def test_the_whole_share(tmp_path):
    budget = budget_of(tmp_path, {"max_refused": 0.1})
    run(budget, step({"source0": 45}, {"source0": 4}))  # 4 of 49: too few to judge
    run(budget, step({"source0": 5}, {}))
    with pytest.raises(UserError) as caught:
        run(budget, step({"source0": 1}, {"source0": 3}))
    assert "7 of 58 samples (data.max_refused 0.1) were refused: 7 x damaged image" in sentence(caught)
    lines = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text().splitlines()]
    assert len(lines) == 7 and lines[0] == {
        "step": 1,
        "source": "source0",
        "key": "k0",
        "reason": "damaged image: cut off",
    }


def test_the_share_of_a_source(tmp_path):
    budget = budget_of(tmp_path, {"max_refused": 1.0})
    with pytest.raises(UserError) as caught:
        run(budget, *[step({"source0": 60, "source1": 15}, {"source0": 10, "source1": 5})] * 3)
    assert "15 of 60 samples of 'source1' (its max_refused 0.2)" in sentence(caught)
    assert budget.shares()["source0"]["samples"] == 180


def test_bad_samples_in_a_row(tmp_path):
    budget = budget_of(tmp_path, {"max_refused": 1.0, "max_refused_in_a_row": 10})
    bad, good = step({"source0": 9}, {"source1": 4}), step({"source1": 1}, {"source1": 4})
    run(budget, bad, bad, good, bad)  # a good one in between
    with pytest.raises(UserError) as caught:
        run(budget, bad)
    assert "10 and more of 'source1' in a row" in sentence(caught)


def test_a_run_stops_and_names_them(parts, tmp_path):
    tree = tiny.run_tree(
        parts,
        str(tmp_path / "out"),
        data={"train": [shard_of(tmp_path / "a.tar", 40, 20)], "lanes": 2, "workers": 0},
        train__max_steps=30,
    )
    with pytest.raises(UserError) as caught:
        train(validate(tree, "x"))
    assert "x mask and image differ in size" in sentence(caught)
    named = [json.loads(line) for line in (tmp_path / "out" / "refused.jsonl").read_text().splitlines()]
    assert {line["key"] for line in named} <= {f"s{n}" for n in range(40, 60)}
    assert all(line["source"] == "a.tar" and "differ in size" in line["reason"] for line in named)
    # A run that bears them goes through, and its account says how many there were.
    tree["data"]["max_refused"] = 0.5
    tree["train"]["max_steps"] = 15
    train(validate(tree, "x"), fresh=True)
    finish = next(line for line in read_journal(tmp_path / "out") if line.get("event") == "finish")
    assert finish["account"]["used"] == 40 and sum(finish["account"]["refused"].values()) == 20
    named = (tmp_path / "out" / "refused.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in named}) == len(named) == 20
