"""A teacher and its student, for the tests of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

from vlm_adapt.models.build import build
from vlm_adapt.models.teacher import make_teacher
from vlm_adapt.train.run import train

LORA = {"method": "lora", "where": "language", "r": 4, "learning_rate": 1e-3}
ALL = [
    {"method": "lora", "where": "vision", "r": 2, "learning_rate": 1e-3},
    {"method": "full", "where": "connector", "learning_rate": 2e-3},
    LORA,
]
PROMPTS = {"method": "prompt_tuning", "where": "language", "num_virtual_tokens": 3}
DISTIL = {"train__objective": "distillation"}


def trained(parts: Path, output: Path) -> Path:
    """A run's output of three steps at a high rate: far enough from where a student begins."""
    lines = [line | {"learning_rate": 3e-2} for line in ALL]
    assert train(tiny.run_of(parts, output, adapt=lines, train__max_steps=3, train__save_steps=0)) == 0
    return output


def student(parts: Path, teacher: Path | str, **changes: Any) -> Any:
    """A model of the same parts, adapted, with its teacher."""
    run = tiny.run_of(
        parts, parts / "none", **({"adapt": ALL} | DISTIL | changes), train__teacher=str(teacher)
    )
    made = build(run.model, torch.float32, run.seed)
    made.adapt([run.adapt])
    made.model.objective = "distillation"
    made.model.teacher = make_teacher(made, run)
    return made
