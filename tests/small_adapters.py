"""Tiny trained runs of some plan on one base, and a batch to compare models on, for tests of adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import rows
import tiny
import torch

from vlm_adapt.export.adapter import save_adapter
from vlm_adapt.models.restore import restore
from vlm_adapt.train.run import train

torch.set_num_threads(1)
RATE = 2e-2  # moves LoRA's B far enough from zero in three steps to be felt


def trained(parts: Path, output: Path, **changes: Any) -> Path:
    """A run of three steps into `output`; returns its checkpoint."""
    changes = {"train__max_steps": 3, "train__save_steps": 0} | changes
    assert train(tiny.run_of(parts, output, **changes)) == 0
    return output / f"checkpoint-{changes['train__max_steps']}"


def lora(**more: Any) -> dict[str, Any]:
    return {"method": "lora", "where": "language", "r": 4, "learning_rate": RATE, **more}


def full(where: str = "connector") -> dict[str, Any]:
    return {"method": "full", "where": where, "learning_rate": RATE}


def batch(ours: Any) -> Any:
    talks = [["<image>what color is the shape?", "red"], ["no", "yes a photo"], ["is<image>it red?", "no"]]
    return rows.batch(ours, [rows.conversation(ours, *talk, seed=i) for i, talk in enumerate(talks)])


def logits(ours: Any) -> torch.Tensor:
    """Of an assembled model, or of a folder's."""
    ours = restore(ours)[0] if isinstance(ours, Path | str) else ours
    return ours.model.logits(batch(ours))


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def several_runs(parts: Path, folder: Path) -> Path:
    """Checkpoints `a` and `b` of one plan with other seeds, `plain` of LoRA alone, and the adapter of `a`."""
    both = [full(), lora()]
    for name, seed in (("a", 0), ("b", 1)):
        trained(parts, folder / f"run-{name}", adapt=both, seed=seed).rename(folder / name)
    trained(parts, folder / "run-plain", adapt=[lora(lora_alpha=4)]).rename(folder / "plain")
    save_adapter(folder / "a", folder / "adapter")
    return folder
