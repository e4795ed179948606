"""Adapters that are cut off, pickles, of unknown methods or none at all: one sentence, and nothing is run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small_adapters import copied, several_runs
from tiny import sentence

from vlm_adapt.cli import main
from vlm_adapt.errors import UserError
from vlm_adapt.models.adapters import Adapters
from vlm_adapt.models.restore import restore

FILE = "language-lora/adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See small_adapters.several_runs."""
    return several_runs(parts, tmp_path_factory.mktemp("runs"))


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def damage(folder: Path, how: str, mark: Path) -> None:
    path = folder / FILE
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "cut in the header":
        path.write_bytes(path.read_bytes()[:20])
    elif how == "pickle inside":
        path.write_bytes(pickle.dumps(Trap(mark)))
    elif how == "torch file inside":
        torch.save({"x": torch.zeros(2)}, path)
    elif how == "pickle beside":
        path.unlink()
        path.with_name("adapter_model.bin").write_bytes(pickle.dumps(Trap(mark)))
    elif how == "no folder":
        path.rename(folder / "elsewhere")
        (folder / "language-lora" / "adapter_config.json").unlink()
        (folder / "language-lora").rmdir()
    elif how == "no run.yaml":
        (folder / "run.yaml").unlink()
    elif how == "state cut":
        (folder / "state.json").write_text((folder / "state.json").read_text()[:50])
    elif how == "state of something else":
        (folder / "state.json").write_text("[1]")
    else:
        state = json.loads((folder / "state.json").read_text())
        if how == "unknown method":
            state["plan"][0][1]["method"] = "lorra"
        elif how == "unknown setting":
            state["plan"][0][1]["rr"] = 4
        else:
            state["plan"] = [["lora"]]
        (folder / "state.json").write_text(json.dumps(state))


BAD = {
    "cut": "adapter_model.safetensors' is cut off",
    "cut in the header": "adapter_model.safetensors' is cut off",
    "pickle inside": "is no safetensors file but a pickle, which could run any code and is not opened",
    "torch file inside": "is no safetensors file but a pickle",
    "pickle beside": "adapter_model.bin' is a pickle, which could run any code",
    "no folder": "adapter_model.safetensors': the checkpoint is not complete",
    "no run.yaml": "there is no config file",
    "state cut": "state.json' cannot be read",
    "state of something else": "state.json' is damaged",
    "unknown method": "unknown adaptation method 'lorra', did you mean 'lora'",
    "unknown setting": "has no setting 'rr'",
    "no lines": "the plan in its state.json is damaged",
}


@pytest.mark.parametrize("how", BAD)
def test_bad_files(runs: Path, tmp_path: Path, how: str, capsys: Any) -> None:
    """One sentence and exit code 2 from every verb, and nothing that was sent is ever run."""
    folder, mark = copied(runs / "adapter", tmp_path / "bad"), tmp_path / "mark"
    damage(folder, how, mark)
    with pytest.raises(UserError) as caught:
        restore(folder)
    assert BAD[how] in sentence(caught)
    several = Adapters.open(runs / "a")
    with pytest.raises(UserError) as caught:
        several.add("bad", folder)
    assert BAD[how] in sentence(caught) and several.names == ["checkpoint"]
    assert main(["adapt", "save", str(folder), str(tmp_path / "made")]) == 2
    said = capsys.readouterr().err
    assert BAD[how] in said and said.count("vlm-adapt: ") == 1 and "Traceback" not in said
    assert not (tmp_path / "made").exists() and not mark.exists()


def test_no_checkpoint_at_all(tmp_path: Path, capsys: Any) -> None:
    for path, said in ((tmp_path, "holds no checkpoint"), (tmp_path / "x", "there is no checkpoint")):
        assert main(["adapt", "save", str(path), str(tmp_path / "made")]) == 2
        assert said in capsys.readouterr().err
