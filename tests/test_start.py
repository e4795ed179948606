"""A module of one task is the start of another's: what is copied, when, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.models.check import check_run
from vlm_adapt.models.start import source_folder, starts
from vlm_adapt.train.run import train

torch.set_num_threads(1)
LORA = {"method": "lora", "where": "language", "r": 4, "learning_rate": 1e-3}
FILE = "language-lora/adapter_model.safetensors"


@pytest.fixture(scope="module")
def first(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's output: full on the connector, LoRA on the language."""
    output = tmp_path_factory.mktemp("start") / "first"
    assert train(tiny.run_of(parts, output, train__max_steps=3)) == 0
    return output


def begun(first: Path, **more: Any) -> list[dict[str, Any]]:
    return [LORA | {"start": str(first)} | more]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / FILE)


def test_state_is_carried_over_then_trains_on(parts: Path, first: Path, tmp_path: Path, capsys: Any) -> None:
    before = weights(first / "checkpoint-3")
    # At rate 0 nothing moves: what is saved is what it began from, to the bit.
    still = tiny.run_of(
        parts, tmp_path / "still", adapt=begun(first, learning_rate=1e-30), train__max_steps=1
    )
    assert train(still) == 0
    assert "language-lora begins from" in capsys.readouterr().err
    after = weights(tmp_path / "still" / "checkpoint-1")
    # 1e-30 x Adam's step of 1 is far below the last bit of any weight above 1e-22.
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert any(value.abs().sum() > 0 for key, value in before.items() if "lora_B" in key)
    run = tiny.run_of(
        parts, tmp_path / "on", adapt=begun(first), train__max_steps=2, train__save_total_limit=2
    )
    assert train(run) == 0
    moved = weights(tmp_path / "on" / "checkpoint-2")
    assert not any(torch.equal(before[key], moved[key]) for key in before)


def test_never_again_on_resume(parts: Path, first: Path, tmp_path: Path, capsys: Any) -> None:
    """A checkpoint holds the values themselves, and the source may be gone by then."""
    output, source = tmp_path / "out", tmp_path / "source"
    source.symlink_to(first)
    changes: dict[str, Any] = {"adapt": begun(source), "train__max_steps": 4, "train__save_total_limit": 9}
    assert train(tiny.run_of(parts, output, **changes)) == 0
    whole = weights(output / "checkpoint-4")
    state = json.loads((output / "checkpoint-2" / "state.json").read_text())
    assert state["step"] == 2
    (output / "latest").write_text("checkpoint-2")
    source.unlink()
    capsys.readouterr()
    assert train(tiny.run_of(parts, output, **changes)) == 0
    assert "begins from" not in capsys.readouterr().err
    again = weights(output / "checkpoint-4")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_later_stage_begins_and_earlier_methods_stay(parts: Path, first: Path, tmp_path: Path) -> None:
    """What stage a made of its start is not overwritten by that start when stage b begins."""
    connector = {"method": "full", "where": "connector"}
    stages = [
        {"name": "a", "adapt": [connector | {"start": str(first), "learning_rate": 1e-2}]},
        {"name": "b", "adapt": [connector | {"learning_rate": 1e-30}, *begun(first, learning_rate=1e-30)]},
    ]
    changes = {"stages": stages, "train__max_steps": 2, "train__save_total_limit": 9}
    assert train(tiny.run_of(parts, tmp_path / "out", **changes)) == 0
    name = "connector-full/model.safetensors"
    folders = (first / "checkpoint-3", tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-4")
    begun_from, after_a, after_b = (load_file(folder / name) for folder in folders)
    assert not any(torch.equal(after_a[key], begun_from[key]) for key in after_a)
    assert all(torch.equal(after_b[key], after_a[key]) for key in after_a)
    lora, there = weights(folders[2]), weights(folders[0])
    assert all(torch.equal(lora[key], there[key]) for key in there)


def test_labels() -> None:
    """Two LoRAs of one part are told apart by their order, and `ia3` keeps its digit."""
    lines = [
        Adapt.model_validate(line)
        for line in (
            {"method": "lora", "where": "language", "r": 2},
            {"method": "lora", "where": "language", "r": 4, "start": "x"},
            {"method": "ia3", "where": "language", "start": "y"},
        )
    ]
    assert starts([lines[:1], lines]) == {"language-lora-2": "x", "language-ia3": "y"}
    twice = [lines[1], lines[1].model_copy(update={"start": "z"})]
    assert starts([twice, twice]) == {"language-lora": "x", "language-lora-2": "z"}


def test_a_second_module_may_begin_from_the_only_one(first: Path) -> None:
    assert source_folder(str(first), "language-lora-2") == first / "checkpoint-3" / "language-lora"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"start": "nowhere/at/all"}, "there is no checkpoint 'nowhere/at/all'"),
        ({"where": "vision"}, "holds no 'vision-lora' to begin from: it has connector-full, language-lora"),
    ],
)
def test_told_early(parts: Path, first: Path, tmp_path: Path, line: dict[str, Any], said: str) -> None:
    run = tiny.run_of(parts, tmp_path / "out", adapt=begun(first, **line))
    with pytest.raises(UserError, match=said) as caught:
        check_run(run)
    tiny.sentence(caught)
    check_run(run, train=False)  # a checkpoint of it is evaluated without its start


def test_other_shapes(parts: Path, first: Path, tmp_path: Path) -> None:
    run = tiny.run_of(parts, tmp_path / "out", adapt=begun(first, r=2))
    with pytest.raises(UserError, match=r"has shape \(4, 32\) there and \(2, 32\) here") as caught:
        train(run)
    tiny.sentence(caught)
    assert not (tmp_path / "out").exists()
    run = tiny.run_of(parts, tmp_path / "out", adapt=begun(first, target_modules="q_proj"))
    with pytest.raises(UserError, match="belongs to another model or plan"):
        train(run)
