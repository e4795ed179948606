"""A tiny checkpoint to talk to, made without training; shared by the tests of chat and command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from vlm_adapt.config.load import dump, validate


def checkpoint(folder: Path, template: str = "auto", kind: str = "llama", **changes: Any) -> Path:
    """`folder/out` with a checkpoint of a random model; `kind` is `llama` or `t5`."""
    if kind == "t5":
        tiny.t5(folder / "t5")
        changes["model__language"] = {"model": str(folder / "t5")}
        changes["adapt"] = [{"method": "full", "where": "connector"}]
    run = validate(tiny.run_tree(folder, **changes), "tiny")
    language = run.model.language.model_copy(update={"template": template})
    run = run.model_copy(update={"model": run.model.model_copy(update={"language": language})})
    made = folder / "out" / "checkpoint-1"
    made.mkdir(parents=True)
    (made / "run.yaml").write_text(dump(run), encoding="utf-8")
    (made / "state.json").write_text(json.dumps({"stage": 0, "step": 1, "labels": []}), encoding="utf-8")
    tiny.tokenizer(made / "tokenizer", chat=kind == "llama")
    (folder / "out" / "latest").write_text("checkpoint-1", encoding="utf-8")
    return folder / "out"


def picture(path: Path, seed: int = 0) -> Path:
    """A small image file."""
    path.write_bytes(tiny.image(seed))
    return path
