"""An adapter alone: all that was trained and nothing else, a few megabytes that go anywhere.

Knows checkpoint folders and methods' files; knows nothing about what methods compute. No weights of the base
are read: shapes are enough to check every tensor.

    FOLDER/
        adapter.json        for people and programs: what it is, counts, bytes, the base it belongs to
        run.yaml            model, plan, and how it is evaluated
        state.json          what loading needs: labels, the plan's lines, marks of the base
        <part>-<method>/    peft's own format where peft has the method; safetensors always
        tokenizer/
        connector-statistics.safetensors    of a connector with `normalise: data`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_adapt import __version__
from vlm_adapt.adapt.plan import flatten
from vlm_adapt.config.load import dump
from vlm_adapt.config.schema import Adapt, Run
from vlm_adapt.errors import UserError
from vlm_adapt.export.folder import check_target, whole_folder
from vlm_adapt.models.build import Assembled
from vlm_adapt.models.restore import (
    STATISTICS,
    build_base,
    check_files,
    find_checkpoint,
    plan_of,
    read_checkpoint,
)

FORMAT = 1
# What methods keep for going on with training alone (see Method.save_latent).
LATENTS = ("latent.safetensors", "allocator.safetensors")
ABOUT = "adapter.json"


def save_adapter(checkpoint: str | Path, target: Path) -> dict[str, Any]:
    """Write the adapter of a checkpoint.

    Returns:
        what `adapter.json` says.

    Raises:
        UserError: no checkpoint, damaged files, or a folder that cannot be written.
    """
    check_target(target)
    folder = find_checkpoint(checkpoint)
    run, state = read_checkpoint(folder)
    assembled, _ = read_trained(folder, run, state)
    assert assembled.plan is not None
    with whole_folder(target) as temporary:
        for item in assembled.plan.attached:
            without = shutil.ignore_patterns(*LATENTS)
            shutil.copytree(folder / item.label, temporary / item.label, ignore=without)
            item.method.read(temporary / item.label)  # whole without them
        copy_beside(folder, temporary)
        lines = flatten(plan_of(run, state))
        about = {"from": f"step {state['step']} of a run"}
        labels = [item.label for item in assembled.plan.attached]
        return write_words(temporary, run, lines, state, labels, about)


def read_trained(
    folder: Path, run: Run, state: Mapping[str, Any]
) -> tuple[Assembled, dict[str, dict[str, Tensor]]]:
    """A checkpoint's model in shapes alone, and its trained tensors by label and file key.

    Raises:
        UserError: a file is missing or damaged, or holds tensors of other shapes.
    """
    check_files(folder, state["labels"])
    assembled = build_base(run, folder, empty=True)
    plan = assembled.adapt([flatten(plan_of(run, dict(state)))])
    missing = [item.label for item in plan.attached if item.label not in state["labels"]]
    if missing:
        raise UserError(f"'{folder}' holds nothing of '{missing[0]}', which its plan names: copy it again")
    found = {}
    for item in plan.attached:
        tensors = item.method.read(folder / item.label)
        for key, parameter in item.method.parameters.items():
            if tensors[key].shape != parameter.shape:
                raise UserError(
                    f"'{folder / item.label}': '{key}' has shape {tuple(tensors[key].shape)} and the model "
                    f"{tuple(parameter.shape)}: the checkpoint belongs to another model"
                )
        found[item.label] = tensors
    return assembled, found


def copy_beside(folder: Path, temporary: Path) -> None:
    """The tokenizer and a connector's statistics go along."""
    if (folder / "tokenizer").is_dir():
        shutil.copytree(folder / "tokenizer", temporary / "tokenizer")
    if (folder / STATISTICS).is_file():
        shutil.copyfile(folder / STATISTICS, temporary / STATISTICS)


def write_words(
    folder: Path,
    run: Run,
    lines: Sequence[Adapt],
    state: Mapping[str, Any],
    labels: Sequence[str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write run.yaml, state.json and adapter.json of an adapter whose methods' folders are there."""
    last = run.stage_runs()[min(int(state["stage"]), len(run.stage_runs()) - 1)][1]
    plain = [line.model_copy(update={"start": None}) for line in lines]
    data = last.data.model_copy(update={"train": ()})
    words = {"output_dir": "out", "adapt": tuple(plain), "adapter": None, "data": data, "stages": ()}
    (folder / "run.yaml").write_text(dump(last.model_copy(update=words)), encoding="utf-8")
    kept = {
        "format": FORMAT,
        "step": state["step"],
        "stage": 0,
        "labels": list(labels),
        "plan": [[line.model_dump(mode="json") for line in plain]],
        "base": state.get("base"),
    }
    (folder / "state.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    told = {
        "what": "an adapter for vlm-adapt: trained tensors without the base they belong to",
        "use": {
            "chat": "vlm-adapt chat FOLDER",
            "evaluate": "vlm-adapt evaluate FOLDER",
            "train": "vlm-adapt train CONFIG adapter=FOLDER",
        },
        **about,
        "methods": {label: _counts(folder / label) for label in labels},
        "base": {part: marks["name"] for part, marks in (state.get("base") or {}).items()},
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "version": __version__,
    }
    (folder / ABOUT).write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
    return told


def _counts(folder: Path) -> dict[str, int]:
    """Numbers and bytes of a method's folder, read off the files' headers."""
    from safetensors import safe_open

    numbers = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            numbers += sum(torch.Size(file.get_slice(key).get_shape()).numel() for key in file.keys())
    return {"numbers": numbers, "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())}
