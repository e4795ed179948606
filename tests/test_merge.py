"""Folded into the base: the same logits with a receipt, in the libraries' own formats, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import full, logits, lora, trained

from vlm_adapt.cli import main
from vlm_adapt.config.load import read_yaml
from vlm_adapt.export.merge import merge_checkpoint
from vlm_adapt.models.restore import restore

VISION = {"where": "vision", "learning_rate": 2e-2}
LANGUAGE = {"where": "language", "learning_rate": 2e-2}


@pytest.fixture(scope="module")
def both(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of LoRA on tower and language, and a connector."""
    folder = tmp_path_factory.mktemp("both")
    return trained(parts, folder / "run", adapt=[full(), lora(), lora(where="vision", r=2)])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_receipt_and_parts(both: Path, tmp_path: Path) -> None:
    receipt = merge_checkpoint(both, tmp_path / "merged", "float32")
    assert sorted(receipt.folded) == ["connector-full", "language-lora", "vision-lora"]
    assert receipt.kept == [] and receipt.samples == "shards" and receipt.argmax_differs == 0
    assert receipt.tokens > 100 and receipt.effect > 0.1
    assert 0 < receipt.largest_difference <= receipt.tolerance < 1e-3
    assert json.loads((tmp_path / "merged" / "receipt.json").read_text())["effect"] == receipt.effect
    assert files(tmp_path / "merged") == {
        *("language", "vision", "connector-full", "tokenizer"),
        *("run.yaml", "state.json", "adapter.json", "receipt.json"),
    }
    # On other inputs than the receipt's; one product in place of three, on logits of about 5.
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(both), atol=5e-5, rtol=1e-5)


def test_the_weights_are_the_formula(both: Path, parts: Path, tmp_path: Path) -> None:
    """W + alpha/r B A, in the file that transformers writes."""
    merge_checkpoint(both, tmp_path / "merged", "float32")
    base = load_file(parts / "llama" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "language" / "model.safetensors")
    adapter = load_file(both / "language-lora" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    down = "model.layers.1.mlp.down_proj"
    up, low = (adapter[f"base_model.model.{down}.lora_{side}.weight"] for side in "BA")
    torch.testing.assert_close(merged[f"{down}.weight"], base[f"{down}.weight"] + 2.0 * up @ low)
    assert {name.rpartition(".")[0] + ".weight" for name in changed} == changed and len(changed) == 14


def test_libraries_load_it(both: Path, tmp_path: Path) -> None:
    """transformers by itself, from the folders alone."""
    import transformers

    merge_checkpoint(both, tmp_path / "merged", "float32")
    language = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "language")
    tower = transformers.AutoModel.from_pretrained(tmp_path / "merged" / "vision")
    ours: Any = restore(tmp_path / "merged")[0]
    for mine, theirs in ((ours.model.language.model, language), (ours.model.vision.model, tower)):
        other = theirs.state_dict()
        assert all(torch.equal(value, other[key]) for key, value in mine.state_dict().items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged" / "language").chat_template


def test_half_the_bytes(both: Path, tmp_path: Path) -> None:
    receipt = merge_checkpoint(both, tmp_path / "merged", "bfloat16")
    tensors = load_file(tmp_path / "merged" / "language" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    # Rounded once more a weight: felt, and no more than the share that TOLERANCES gives bfloat16.
    assert 1e-3 < receipt.largest_difference <= receipt.tolerance
    assert receipt.folding_difference < 1e-4


def test_it_may_be_moved_and_gone_on_from(both: Path, parts: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["adapt", "merge", str(both), str(tmp_path / "made"), "--dtype", "float32"]) == 0
    assert "likeliest word changed: 0 of" in capsys.readouterr().out
    moved = (tmp_path / "made").rename(tmp_path / "moved")
    assert main(["chat", str(moved), "--prompt", "hi", "--max-new-tokens", "3"]) == 0
    text = (moved / "run.yaml").read_text()
    assert "${folder}/language" in text and str(tmp_path) not in text
    model = read_yaml(moved / "run.yaml")["model"]
    assert model["language"]["model"] == f"{moved}/language"
    # A new run on the merged base: equal lines go on, and its own LoRA starts from zero.
    changes = {"model": model, "adapter": str(moved), "adapt": [full(), lora(learning_rate=1e-30)]}
    checkpoint = trained(parts, tmp_path / "run", **changes, train__learning_rate=1e-30)
    assert json.loads((checkpoint / "state.json").read_text())["labels"] == [
        "connector-full",
        "language-lora",
    ]


@pytest.mark.parametrize("beside", ["prompt_tuning", "houlsby", "prefix_tuning"])
def test_what_is_no_change_of_weights_stays_on_top(parts: Path, tmp_path: Path, beside: str) -> None:
    example = {"prompt_tuning": {"num_virtual_tokens": 3}, "prefix_tuning": {"num_virtual_tokens": 3}}
    plan = [lora(), {"method": beside, **LANGUAGE, **example.get(beside, {})}]
    checkpoint = trained(parts, tmp_path / "run", adapt=plan)
    receipt = merge_checkpoint(checkpoint, tmp_path / "merged", "float32")
    assert receipt.folded == ["language-lora"] and receipt.kept == [f"language-{beside}"]
    assert f"language-{beside}" in files(tmp_path / "merged")
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(checkpoint), atol=5e-5, rtol=1e-5)


def test_own_weights_need_no_folding(parts: Path, tmp_path: Path) -> None:
    """What was trained in place is in the base already; a second LoRA of the same layers folds too."""
    plan = [{"method": "bitfit", **VISION}, lora(), lora(r=2, target_modules="q_proj")]
    checkpoint = trained(parts, tmp_path / "run", adapt=plan)
    receipt = merge_checkpoint(checkpoint, tmp_path / "merged", "float32")
    assert receipt.folded == ["vision-bitfit", "language-lora", "language-lora-2"]
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(checkpoint), atol=5e-5, rtol=1e-5)
    # Only what changed is written.
    assert {"vision", "language"} <= files(tmp_path / "merged")
    alone = trained(parts, tmp_path / "alone", adapt=[{"method": "bitfit", **VISION}])
    receipt = merge_checkpoint(alone, tmp_path / "eyes", "float32")
    assert receipt.parts["language"] == "as it was" and "language" not in files(tmp_path / "eyes")
