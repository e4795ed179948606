"""Checkpoints: written whole or not at all, read without pickles.

Knows folders, pointers and disk space; the layout is drawn in models/restore.py. Frozen weights are
not copied: a few megabytes hold what an adapted model of any size has learned.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlm_adapt import dist
from vlm_adapt.config.load import dump
from vlm_adapt.config.schema import Run
from vlm_adapt.errors import UserError
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.restore import LATEST, STATISTICS
from vlm_adapt.train.engine import Engine

FORMAT = 1


def write_atomically(path: Path, text: str) -> None:
    """Put `text` in a file, so that a reader sees the old or the new contents and nothing between."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save(
    output: Path, run: Run, assembled: AssembledModel, engine: Engine, state: dict[str, Any], keep: int
) -> Path:
    """Write `checkpoint-<step>`; every rank calls it.

    Args:
        state: plain values to resume from; `step` names the folder.
        keep: how many checkpoints to keep, the best one aside.

    Raises:
        UserError: the disk is full or not writable; no half-written checkpoint is left.
    """
    assert assembled.plan is not None
    trained = {
        item.label: {key: engine.whole(p) for key, p in item.method.parameters.items()}
        for item in assembled.plan.attached
    }
    moments, optimizer_step = engine.moments()
    random = dist.gather(_random_state())
    final = output / f"checkpoint-{state['step']}"
    state = state | {
        "format": FORMAT,
        "labels": list(trained),
        "plan": [[line.model_dump(mode="json") for line in stage] for stage in assembled.stages],
        "base": assembled.base,
        "optimizer_step": optimizer_step,
        "world_size": dist.world_size(),
    }

    def write() -> None:
        from safetensors.torch import save_file

        temporary = output / f".{final.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            for item in assembled.plan.attached:  # type: ignore[union-attr]
                item.method.save(temporary / item.label, trained[item.label])  # type: ignore[arg-type]
                item.method.save_latent(temporary / item.label, trained[item.label])  # type: ignore[arg-type]
            assembled.save_words(temporary)
            save_file(moments, temporary / "optimizer.safetensors")
            if statistics := assembled.statistics():
                save_file({k: v.cpu().contiguous() for k, v in statistics.items()}, temporary / STATISTICS)
            for number, tensors in enumerate(random):
                save_file(tensors, temporary / f"random-{number}.safetensors")
            (temporary / "run.yaml").write_text(dump(run), encoding="utf-8")
            (temporary / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
            _sync(temporary)
            if final.exists():
                shutil.rmtree(final)
            os.replace(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        write_atomically(output / LATEST, final.name)
        _prune(output, keep, final.name)

    on_main(write, f"checkpoint '{final}'")
    return final


def on_main(write: Callable[[], None], what: str) -> None:
    """Let the main rank write; a failure there ends every rank with the same sentence."""
    message = ""
    if dist.is_main():
        try:
            write()
        except Exception as error:  # told to all ranks below, then raised
            message = _disk_sentence(error, what)
            if not message:
                dist.gather(f"{what}: {error}")
                raise
    failures = [told for told in dist.gather(message) if told]
    if failures:
        raise UserError(failures[0])


def _disk_sentence(error: Exception, what: str) -> str:
    text = str(error)
    if (
        isinstance(error, OSError)
        or "No space left" in text
        or "I/O error" in text
        or "File too large" in text
    ):
        reason = getattr(error, "strerror", None) or text
        return (
            f"{what} cannot be written ({reason}): nothing half-written was left, and earlier checkpoints "
            "are as they were; free some space or set output_dir elsewhere, then start again to go on"
        )
    return ""


def point_best(output: Path, checkpoint: str) -> None:
    """Let `best` name a checkpoint; it is kept whatever save_total_limit says."""
    write_atomically(output / "best", checkpoint)


def read_moments(folder: Path) -> dict[str, torch.Tensor]:
    """Adam's moments by parameter name.

    Raises:
        UserError: the file is missing or damaged.
    """
    return _read(folder / "optimizer.safetensors")


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): go on from another checkpoint") from error


def restore_random(folder: Path, state: dict[str, Any], seed: int) -> None:
    """This rank's random state; with another world size than saved, a fresh one by seed, step and rank."""
    if state["world_size"] != dist.world_size():
        torch.manual_seed(hash((seed, state["step"], dist.rank())) % 2**63)
        return
    tensors = _read(folder / f"random-{dist.rank()}.safetensors")
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _prune(output: Path, keep: int, newest: str) -> None:
    best = output / "best"
    kept = {newest, best.read_text(encoding="utf-8").strip() if best.is_file() else ""}
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in found[: max(0, len(found) - keep)]:
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
