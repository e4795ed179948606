"""A model rebuilt from a checkpoint alone: its configuration, plan and trained tensors.

Knows the folder's layout; knows nothing about optimizers. Reads YAML, JSON and safetensors, never a
pickle: a checkpoint may have been sent by anyone.

    checkpoint-<step>/
        run.yaml            the whole run, every default written out
        state.json          step, stage, stream cursor, totals
        <part>-<method>/    what was trained: peft's own format for LoRA, else model.safetensors
        tokenizer/
        connector-statistics.safetensors    of a connector with `normalise: data`
        optimizer.safetensors, random-<rank>.safetensors     to go on training
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vlm_adapt.adapt.method import read_tensors
from vlm_adapt.config.load import read_yaml, validate
from vlm_adapt.config.schema import Run
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import Assembled, build, compute_dtype
from vlm_adapt.models.locate import LATEST, find_checkpoint

STATISTICS = "connector-statistics.safetensors"


def read_checkpoint(folder: Path) -> tuple[Run, dict[str, Any]]:
    """The run and the state of a checkpoint folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    run = validate(read_yaml(folder / "run.yaml"), str(folder / "run.yaml"))
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder / 'state.json'}' cannot be read: {error}") from error
    return run, state


def restore(path: str | Path, dtype: torch.dtype | None = None) -> tuple[Assembled, Run, Path]:
    """The model of a checkpoint, ready to evaluate or chat.

    Args:
        path: a checkpoint folder or a run's output folder.
        dtype: of the computation; by default what the run was trained in, where the machine allows it.
    """
    folder = find_checkpoint(path)
    run, state = read_checkpoint(folder)
    stage = int(state["stage"])
    assembled = build(
        run.model, dtype or compute_dtype(run.train.bf16), run.seed, tokenizer_folder=folder / "tokenizer"
    )
    assembled.adapt([stage_run.adapt for _, stage_run in run.stage_runs()[: stage + 1]])
    load_trained(assembled, folder)
    assembled.model.requires_grad_(False)
    return assembled, run, folder


def load_trained(assembled: Assembled, folder: Path) -> None:
    """Copy a checkpoint's trained tensors into the model's plan; labels that it lacks stay as they are.

    Raises:
        UserError: a file is missing, damaged, or belongs to another model.
    """
    assert assembled.plan is not None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for item in assembled.plan.attached:
        if item.label not in state["labels"]:
            continue
        tensors = item.method.read(folder / item.label)
        for key, parameter in item.method.parameters.items():
            if parameter.shape != tensors[key].shape:
                raise UserError(
                    f"'{folder / item.label}': '{key}' has shape {tuple(tensors[key].shape)} and the model "
                    f"{tuple(parameter.shape)}: the checkpoint belongs to another model"
                )
            with torch.no_grad():
                parameter.copy_(tensors[key])
    statistics = connector_statistics(assembled)
    if statistics:
        connector = assembled.model.connector
        for name, tensor in read_tensors(folder / STATISTICS, statistics).items():
            owner, _, leaf = name.rpartition(".")
            setattr(connector.get_submodule(owner), leaf, tensor.to(statistics[name].device))


def connector_statistics(assembled: Assembled) -> dict[str, torch.Tensor]:
    """What a connector has measured and not trained, by name."""
    connector = assembled.model.connector
    trained = dict(connector.named_parameters())
    return {name: value for name, value in connector.state_dict().items() if name not in trained}


__all__ = [
    "LATEST",
    "STATISTICS",
    "connector_statistics",
    "find_checkpoint",
    "load_trained",
    "read_checkpoint",
    "restore",
]
