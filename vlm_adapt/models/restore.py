"""A model rebuilt from a checkpoint alone: its configuration, plan and trained tensors.

Knows the folder's layout; knows nothing about optimizers. Reads YAML, JSON and safetensors, never a
pickle: a checkpoint may have been sent by anyone.

    checkpoint-<step>/
        run.yaml            the whole run, every default written out
        state.json          step, stage, stream cursor, totals; the plan's lines, and marks of the base
        <part>-<method>/    what was trained: peft's own format for LoRA, else model.safetensors
        tokenizer/          of a model that answers in words
        connector-statistics.safetensors    what a connector measured and did not train: means and
                            deviations of `normalise: data`, running statistics of batch norms
        optimizer.safetensors, random-<rank>.safetensors     to go on training
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from vlm_adapt.adapt import METHODS
from vlm_adapt.adapt.method import read_tensors
from vlm_adapt.adapt.plan import Attached
from vlm_adapt.config.load import read_yaml, validate
from vlm_adapt.config.schema import Adapt, Run
from vlm_adapt.errors import UserError
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.build import Assembled, build, compute_dtype
from vlm_adapt.models.fingerprint import check_base
from vlm_adapt.models.locate import LATEST, find_checkpoint

STATISTICS = "connector-statistics.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def read_checkpoint(folder: Path) -> tuple[Run, dict[str, Any]]:
    """The run and the state of a checkpoint or adapter folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    run = validate(read_yaml(folder / "run.yaml"), str(folder / "run.yaml"))
    path = folder / "state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(state, dict) or not {"step", "stage", "labels"} <= set(state):
        raise UserError(f"'{path}' is damaged: it does not say step, stage and labels; copy it again")
    try:
        for line in (line for stage in plan_of(run, state) for line in stage):
            METHODS.check(line.method)
    except UserError as error:
        raise UserError(f"'{folder}': {error}") from error
    return run, state


def plan_of(run: Run, state: dict[str, Any]) -> list[list[Adapt]]:
    """The lines that a checkpoint's methods were attached by, stage by stage.

    Raises:
        UserError: the state holds something else.
    """
    if "plan" not in state:
        return [list(one.adapt) for _, one in run.stage_runs()[: int(state["stage"]) + 1]]
    try:
        return [[Adapt.model_validate(line) for line in stage] for stage in state["plan"]]
    except (TypeError, ValidationError) as error:
        raise UserError("the plan in its state.json is damaged: copy it again") from error


def restore(path: str | Path, dtype: torch.dtype | None = None) -> tuple[Assembled, Run, Path]:
    """The vision-language model of a checkpoint or adapter, ready to chat; arguments as `restore_any`.

    Raises:
        UserError: also, where it is of another kind.
    """
    folder = find_checkpoint(path)
    read_checkpoint(folder)[0].language_model  # noqa: B018 - a sentence, before anything is loaded
    return restore_any(folder, dtype)


def restore_any(path: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Run, Path]:
    """The model of a checkpoint or adapter, of whatever kind, ready to evaluate.

    Args:
        path: a checkpoint folder, a run's output folder, or an adapter's folder.
        dtype: of the computation; by default what the run was trained in, where the machine allows it.

    Raises:
        UserError: a file is missing or damaged, or the base is another one now.
    """
    folder = find_checkpoint(path)
    run, state = read_checkpoint(folder)
    check_files(folder, state["labels"])
    assembled = build_base(run, folder, dtype)
    assembled.adapt(plan_of(run, state))
    load_trained(assembled, folder)
    assembled.model.requires_grad_(False)
    return assembled, run, folder


def build_base(run: Run, folder: Path, dtype: torch.dtype | None = None, empty: bool = False) -> Any:
    """The model of a checkpoint before anything is attached; its own tokenizer, if it has one."""
    tokenizer = folder / "tokenizer"
    return build(
        run.model,
        dtype or compute_dtype(run.train.bf16),
        run.seed,
        tokenizer_folder=tokenizer if tokenizer.is_dir() else None,
        empty=empty,
    )


def load_trained(assembled: AssembledModel, folder: Path) -> None:
    """Copy a checkpoint's trained tensors into the model's plan; labels that it lacks stay as they are.

    Raises:
        UserError: a file is missing, damaged, or belongs to another model; or the base is another one.
    """
    assert assembled.plan is not None
    _, state = read_checkpoint(folder)
    check_files(folder, state["labels"])
    check_base(state.get("base"), assembled.base, f"'{folder}'", state["labels"])
    for item in assembled.plan.attached:
        if item.label in state["labels"]:
            load_method(item, folder / item.label)
    load_statistics(assembled, folder)


def load_method(item: Attached, folder: Path) -> None:
    """Copy the tensors in a method's folder into its parameters.

    Raises:
        UserError: a file is missing, damaged, or holds other tensors.
    """
    tensors = item.method.read(folder)
    for key, parameter in item.method.parameters.items():
        if parameter.shape != tensors[key].shape:
            raise UserError(
                f"'{folder}': '{key}' has shape {tuple(tensors[key].shape)} and the model "
                f"{tuple(parameter.shape)}: the checkpoint belongs to another model"
            )
        with torch.no_grad():
            parameter.copy_(tensors[key])
    item.begun = True


def load_statistics(assembled: AssembledModel, folder: Path) -> None:
    """Give the connector what was measured and not trained, if it has such.

    Raises:
        UserError: the file is missing, damaged, or another connector's.
    """
    statistics = assembled.statistics()
    if statistics:
        part = assembled.statistics_part
        for name, tensor in read_tensors(folder / STATISTICS, statistics).items():
            owner, _, leaf = name.rpartition(".")
            setattr(part.get_submodule(owner), leaf, tensor.to(statistics[name].device))


def check_files(folder: Path, labels: Sequence[str]) -> None:
    """Refuse pickles, under whatever name: they are never opened, since opening one runs what it says.

    Raises:
        UserError: a method's folder holds one in place of safetensors.
    """
    for label in labels:
        found = [path for path in sorted((folder / label).glob("*")) if path.is_file()]
        tensors = [path for path in found if path.suffix == ".safetensors"]
        pickles = [path for path in found if path.suffix in PICKLES]
        if pickles and not tensors:
            raise UserError(
                f"'{pickles[0]}' is a pickle, which could run any code and is not opened: ask for the "
                "adapter as safetensors"
            )
        for path in tensors:
            with path.open("rb") as file:
                first = file.read(2)
            if first in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
                raise UserError(
                    f"'{path}' is no safetensors file but a pickle, which could run any code and is not "
                    "opened: ask for the adapter as safetensors"
                )


__all__ = [
    "LATEST",
    "STATISTICS",
    "build_base",
    "check_files",
    "find_checkpoint",
    "load_method",
    "load_statistics",
    "load_trained",
    "plan_of",
    "read_checkpoint",
    "restore",
    "restore_any",
]
