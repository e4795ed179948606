"""Merged towers of every library, and merges that are refused with nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from small_adapters import full, logits, lora, trained
from tiny import sentence

from vlm_adapt.cli import main
from vlm_adapt.config.load import read_yaml
from vlm_adapt.errors import UserError
from vlm_adapt.export import fold
from vlm_adapt.export.merge import merge_checkpoint

VISION = {"where": "vision", "learning_rate": 2e-2}
LANGUAGE = {"where": "language", "learning_rate": 2e-2}


@pytest.fixture(scope="module")
def both(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of LoRA on tower and language, and a connector."""
    folder = tmp_path_factory.mktemp("both")
    return trained(parts, folder / "run", adapt=[full(), lora(), lora(where="vision", r=2)])


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def timm_folder(folder: Path) -> dict[str, Any]:
    made = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
    folder.mkdir()
    arguments = {"depth": 2, "img_size": 32}
    words = {"architecture": "vit_tiny_patch16_224", "model_args": arguments, "num_classes": 1000}
    words["pretrained_cfg"] = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
    }
    (folder / "config.json").write_text(json.dumps(words))
    save_file(made.state_dict(), folder / "model.safetensors")
    return {"model": str(folder)}


def open_clip_file(folder: Path) -> dict[str, Any]:
    import open_clip

    torch.manual_seed(0)
    folder.mkdir()
    visual = open_clip.create_model("ViT-S-32-alt").visual.state_dict()
    save_file({f"visual.{key}": value for key, value in visual.items()}, folder / "clip.safetensors")
    return {"model": "open_clip:ViT-S-32-alt", "weights": f"file:{folder / 'clip.safetensors'}"}


@pytest.mark.parametrize("tower", [timm_folder, open_clip_file])
def test_towers_of_the_other_libraries(parts: Path, tmp_path: Path, tower: Any) -> None:
    """Their own safetensors file; the name stays, the weights come from the folder."""
    vision = tower(tmp_path / "tower")
    plan = [{"method": "norm_tuning", **VISION}]
    checkpoint = trained(parts, tmp_path / "run", adapt=plan, model__vision=vision, train__max_steps=1)
    receipt = merge_checkpoint(checkpoint, tmp_path / "merged", "float32")
    assert receipt.parts["vision"] == "vision/, in its library's format"
    words = read_yaml(tmp_path / "merged" / "run.yaml")["model"]["vision"]
    assert words["model"] == vision["model"] and words["weights"].endswith("merged/vision/model.safetensors")
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(checkpoint), atol=1e-6, rtol=0)


def test_a_tower_that_its_library_could_not_give_back(parts: Path, tmp_path: Path) -> None:
    """Its positions were fitted to another image size: every weight of it lies on top instead."""
    vision = {"model": str(parts / "vit"), "image_size": 24}
    plan = [lora(where="vision"), full()]
    checkpoint = trained(parts, tmp_path / "run", adapt=plan, model__vision=vision)
    receipt = merge_checkpoint(checkpoint, tmp_path / "merged", "float32")
    assert receipt.parts["vision"] == "vision-full/, on top of the tower as it was"
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(checkpoint), atol=5e-5, rtol=1e-5)


# Refused -------------------------------------------------------------------------------------------------


def test_an_adapter_that_does_nothing(parts: Path, tmp_path: Path) -> None:
    """At a rate of 1e-30 B stays zero, to the last bit that matters."""
    checkpoint = trained(parts, tmp_path / "run", adapt=[lora(learning_rate=1e-30)])
    tensors = load_file(checkpoint / "language-lora" / "adapter_model.safetensors")
    still = {key: torch.zeros_like(t) if "lora_B" in key else t for key, t in tensors.items()}
    save_file(still, checkpoint / "language-lora" / "adapter_model.safetensors")
    with pytest.raises(
        UserError, match="does nothing: the base's logits are the same with and without"
    ) as caught:
        merge_checkpoint(checkpoint, tmp_path / "merged", "float32")
    sentence(caught)
    assert files(tmp_path) == {"run"}


def test_one_side_that_does_nothing(parts: Path, tmp_path: Path) -> None:
    """The connector alone has an effect; the LoRA that is folded has none."""
    checkpoint = trained(parts, tmp_path / "run", adapt=[full(), lora()])
    path = checkpoint / "language-lora" / "adapter_model.safetensors"
    save_file({key: torch.zeros_like(tensor) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match="trained on the language changes no weight of it"):
        merge_checkpoint(checkpoint, tmp_path / "merged", "float32")
    assert files(tmp_path) == {"run"}


def test_above_the_tolerance(both: Path, tmp_path: Path, capsys: Any) -> None:
    target = str(tmp_path / "merged")
    assert main(["adapt", "merge", str(both), target, "--dtype", "bfloat16", "--tolerance", "1e-7"]) == 2
    said = capsys.readouterr().err
    assert "differs from the unmerged by" in said and "nothing was written" in said
    assert not list(tmp_path.iterdir())


def test_a_wrong_fold_is_found(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that leaves one method's scale out changes logits, and the receipt says so."""
    honest = fold.load_method

    def half(item: Any, folder: Path) -> None:
        honest(item, folder)
        if item.where == "language":
            for key, parameter in item.method.parameters.items():
                parameter.data *= 0.9 if "lora_B" in key else 1.0

    monkeypatch.setattr(fold, "load_method", half)
    with pytest.raises(UserError, match="where only the order of sums should"):
        merge_checkpoint(both, tmp_path / "merged", "float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("plan", [[full()], [{"method": "houlsby", **LANGUAGE}, full()]])
def test_nothing_to_fold(parts: Path, tmp_path: Path, plan: list[dict[str, Any]]) -> None:
    checkpoint = trained(parts, tmp_path / "run", adapt=plan, train__max_steps=1)
    with pytest.raises(UserError, match="nothing in .* can be folded into the tower or the language"):
        merge_checkpoint(checkpoint, tmp_path / "merged")


def test_a_full_disk(both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full_disk)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\): nothing was left"):
        merge_checkpoint(both, tmp_path / "merged", "float32")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--dtype 'bf16' is none of float32, bfloat16, float16"):
        merge_checkpoint(both, tmp_path / "merged", "bf16")


def test_made_up_samples(both: Path, parts: Path, tmp_path: Path) -> None:
    """Without the run's shards: noise and words of the vocabulary, which feel both sides."""
    away = tmp_path / "away"
    shutil.copytree(both, away)
    text = (away / "run.yaml").read_text()
    (away / "run.yaml").write_text(text.replace(str(parts / "train.tar"), str(tmp_path / "gone.tar")))
    receipt = merge_checkpoint(away, tmp_path / "merged", "float32")
    assert receipt.samples == "made up" and receipt.tokens > 100 and receipt.effect > 0.1
