"""Adapters as files: saved alone with all they need, evaluated, talked to, and gone on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_adapters import copied, full, logits, lora, several_runs, trained
from tiny import run_of, sentence

from vlm_adapt.cli import main
from vlm_adapt.errors import UserError
from vlm_adapt.export.adapter import save_adapter
from vlm_adapt.export.folder import disk_sentence
from vlm_adapt.train.run import train

FILE = "language-lora/adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See small_adapters.several_runs."""
    return several_runs(parts, tmp_path_factory.mktemp("runs"))


# Saved alone ---------------------------------------------------------------------------------------------


def test_an_adapter_carries_everything_but_the_base(runs: Path) -> None:
    names = {path.relative_to(runs / "adapter").parts[0] for path in (runs / "adapter").rglob("*")}
    assert names == {
        *("adapter.json", "run.yaml", "state.json", "tokenizer"),
        *("connector-full", "language-lora"),
    }
    assert torch.equal(logits(runs / "adapter"), logits(runs / "a"))
    about = json.loads((runs / "adapter" / "adapter.json").read_text())
    # r (in + out) of the seven layers of two blocks; float32, and the file's own header
    assert about["methods"]["language-lora"]["numbers"] == 4096
    assert 4 * 4096 < about["methods"]["language-lora"]["bytes"] < 2 * 4 * 4096
    assert sum(path.stat().st_size for path in (runs / "adapter").rglob("*")) < 120_000
    plan = yaml.safe_load((runs / "adapter" / "run.yaml").read_text())
    assert [line["method"] for line in plan["adapt"]] == ["full", "lora"] and not plan["data"]["train"]


def test_stages_become_one_plan(parts: Path, tmp_path: Path) -> None:
    stages = [{"name": "one", "adapt": [full()]}, {"name": "two", "adapt": [full(), lora()]}]
    checkpoint = trained(parts, tmp_path / "run", stages=stages, train__max_steps=2).parent / "checkpoint-4"
    save_adapter(checkpoint, tmp_path / "adapter")
    assert torch.equal(logits(tmp_path / "adapter"), logits(checkpoint))


@pytest.mark.parametrize("method", ["binary_adapter", "piggyback"])
def test_what_only_training_needs_stays_behind(parts: Path, tmp_path: Path, method: str) -> None:
    line = {"method": method, "where": "language", "learning_rate": 1e-2}
    checkpoint = trained(parts, tmp_path / "run", adapt=[line], train__max_steps=2)
    label = f"language-{method}"
    assert (checkpoint / label / "latent.safetensors").is_file()
    save_adapter(checkpoint, tmp_path / "adapter")
    assert not list((tmp_path / "adapter").rglob("latent*"))
    # 1e-4: floats made again of bits and two statistics.
    torch.testing.assert_close(logits(tmp_path / "adapter"), logits(checkpoint), atol=1e-4, rtol=1e-4)


def test_evaluate_and_chat_take_it(parts: Path, runs: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = copied(runs / "adapter", tmp_path / "adapter")
    assert main(["evaluate", str(adapter), f"data.evaluate={parts / 'test.tar'}"]) == 0
    assert (adapter / "evaluation" / "metrics.json").is_file()
    assert main(["chat", str(adapter), "--prompt", "hi", "--max-new-tokens", "3"]) == 0
    assert main(["adapt", "save", str(adapter), str(tmp_path / "again")]) == 0
    assert "language-lora" in capsys.readouterr().out


def test_nothing_half_written(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vlm_adapt.export.adapter as room

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "copy_beside", full_disk)
    with pytest.raises(UserError, match=r"'.*/made' cannot be written \(No space left on device\)") as caught:
        save_adapter(runs / "a", tmp_path / "made")
    sentence(caught)
    assert not list(tmp_path.iterdir())
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "mine").touch()
    with pytest.raises(UserError, match="is there already and not empty"):
        save_adapter(runs / "a", tmp_path / "made")


# Gone on from --------------------------------------------------------------------------------------------


def test_equal_lines_go_on_and_others_stay(parts: Path, runs: Path, tmp_path: Path) -> None:
    """The adapter's LoRA trains on, its connector acts and stays, a new method comes on top."""
    lines = [lora(learning_rate=1e-30), {"method": "bitfit", "where": "vision", "learning_rate": 1e-30}]
    changes = {"adapt": lines, "adapter": str(runs / "adapter"), "train__save_steps": 1}
    checkpoint = trained(parts, tmp_path / "run", **changes)
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["labels"] == ["connector-full", "vision-bitfit", "language-lora"]
    for name in (FILE, "connector-full/model.safetensors"):
        # At a rate of 1e-30 no weight above 1e-22 moves.
        before, after = load_file(runs / "adapter" / name), load_file(checkpoint / name)
        assert all(torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(logits(checkpoint), logits(runs / "a"), atol=1e-6, rtol=0)


def test_resumed_without_the_adapter(parts: Path, runs: Path, tmp_path: Path) -> None:
    source = copied(runs / "adapter", tmp_path / "source")
    changes: dict[str, Any] = {"adapt": [lora()], "adapter": str(source), "train__save_total_limit": 9}
    checkpoint = trained(parts, tmp_path / "run", train__save_steps=1, **changes)
    whole = logits(checkpoint)
    source.rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "latest").write_text("checkpoint-1")
    assert torch.equal(logits(trained(parts, tmp_path / "run", train__save_steps=1, **changes)), whole)
    with pytest.raises(UserError, match=f"there is no checkpoint '{source}'"):
        train(run_of(parts, tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_a_run_on_another_base_is_refused(parts: Path, runs: Path, tmp_path: Path) -> None:
    changes = {"model__language": {"model": str(parts / "llama"), "weights": "random:3"}}
    run = run_of(parts, tmp_path / "run", adapt=[lora()], adapter=str(runs / "adapter"), **changes)
    with pytest.raises(UserError, match=r"language '.*llama', and this is '.*llama \(random:3\)'") as caught:
        train(run)
    sentence(caught)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_while_folders_are_copied_is_one_reason() -> None:
    error = shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'"), ("c", "d", "other")])
    said = disk_sentence(error, Path("made"))
    assert said.startswith("'made' cannot be written ([Errno 28] No space left on device): nothing was left")
