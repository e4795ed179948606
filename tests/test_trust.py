"""What a run promises: it trains what it says, frozen weights stay, and no file of its can run code."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from forks import ROOT
from tiny import run_of, sentence

from vlm_adapt.errors import UserError
from vlm_adapt.models.build import build
from vlm_adapt.models.restore import restore
from vlm_adapt.models.vlm import VisionLanguageModel
from vlm_adapt.train import run as run_room
from vlm_adapt.train.contract import Contract
from vlm_adapt.train.engine import Engine, zero_settings
from vlm_adapt.train.journal import read_journal
from vlm_adapt.train.run import train

# The contract of trainability ------------------------------------------------------------------------


@pytest.mark.parametrize(("deepspeed", "bf16"), [("zero0", False), ("zero2", True), ("zero3", True)])
def test_frozen_weights_are_the_base_bit_for_bit(parts, tmp_path, monkeypatch, deepspeed, bf16):
    """And are held in the compute dtype, what trains in float32; each part at its own rate."""
    loops = []
    kind = run_room.StageLoop
    monkeypatch.setattr(run_room, "StageLoop", lambda *a: loops.append(kind(*a)) or loops[-1])
    run = run_of(parts, tmp_path / "out", train__max_steps=6, train__deepspeed=deepspeed, train__bf16=bf16)
    assert train(run) == 0
    (loop,) = loops
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = dict(build(run.model, dtype, run.seed).model.named_parameters())
    compared = 0
    for name, parameter in loop.assembled.model.named_parameters():
        original = base.get(name.replace(".base_layer", ""))
        whole = loop.engine.whole(parameter)
        if parameter.requires_grad:
            assert whole.dtype == torch.float32, name
            assert original is None or not torch.equal(whole, original.float()), name
        else:
            assert whole.dtype == dtype and torch.equal(whole, original), name
            compared += 1
    assert compared == len(loop.contract.frozen) > 30
    assert set(loop.engine.rates()) == {"connector", "language"}


def test_every_part_has_its_rate(parts, tmp_path):
    """Cosine from its own peak; a part without one takes the run's."""
    adapt = [
        {"method": "full", "where": "connector", "learning_rate": 4e-3},
        {"method": "lora", "where": "vision", "learning_rate": 1e-4},
        {"method": "lora", "where": "language"},
    ]
    run = run_of(parts, tmp_path / "out", adapt=adapt, train__learning_rate=2e-3, train__warmup_steps=2)
    train(run)
    rates = [line["learning_rate"] for line in read_journal(tmp_path / "out") if "event" not in line]
    for part, peak in (("connector", 4e-3), ("vision", 1e-4), ("language", 2e-3)):
        # Two steps up, then cosine over the other two: 1 and 1/2.
        assert [rate[part] for rate in rates] == pytest.approx([peak / 2, peak, peak, peak / 2])


def test_a_frozen_weight_that_moves(parts, tmp_path, monkeypatch):
    step = Engine.step

    def leaking(self, *arguments, **named):
        norm = step(self, *arguments, **named)
        weight = next(p for name, p in self.module.named_parameters() if name.endswith("layernorm.weight"))
        weight.data[0] += 1e-6
        return norm

    monkeypatch.setattr(Engine, "step", leaking)
    with pytest.raises(
        UserError, match=r"frozen parameters that moved in 3 steps: vision\.\S+layernorm.weight"
    ):
        train(run_of(parts, tmp_path / "out"))


def test_a_trained_part_that_nothing_reaches(parts, tmp_path, monkeypatch):
    tokens = VisionLanguageModel.image_tokens
    monkeypatch.setattr(
        VisionLanguageModel, "image_tokens", lambda self, pixels: tokens(self, pixels).detach()
    )
    with pytest.raises(UserError, match="declared as trainable, but without a gradient: connector-full/"):
        train(run_of(parts, tmp_path / "out"))


def test_the_contract_itself():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    declared = [("second", model[1].weight)]
    with pytest.raises(UserError, match="0.weight, 0.bias, 1.bias train unasked, none do not"):
        Contract(model, declared)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="none train unasked, second do not"):
        Contract(model, declared)
    model[1].weight.requires_grad_(True)
    contract = Contract(model, declared, moved_after=2)
    contract.start()
    for step in range(2):
        model(torch.ones(1, 2)).sum().backward()
        if step:
            with pytest.raises(UserError, match="did not move in 2 steps: second"):
                contract.after_step()
        else:
            contract.after_step()


# Settings and files ----------------------------------------------------------------------------------


def test_deepspeed_by_name_or_file(tmp_path):
    with pytest.raises(UserError, match="zero3_ofload.*did you mean 'zero3_offload'"):
        zero_settings("zero3_ofload")
    for text, word in (("{", "not valid JSON"), ("[1]", "holds list")):
        (tmp_path / "own.json").write_text(text)
        with pytest.raises(UserError, match=word):
            zero_settings(str(tmp_path / "own.json"))


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize(
    "file",
    ["connector-full/model.safetensors", "language-lora/adapter_model.safetensors"]
    + ["optimizer.safetensors", "random-0.safetensors"],
)
def test_a_pickle_is_not_opened(parts, tmp_path, file):
    run = run_of(parts, tmp_path / "out", train__max_steps=2)
    train(run)
    folder, mark = tmp_path / "out" / "checkpoint-2", tmp_path / "mark"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"finished": False}))
    (folder / file).write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(UserError, match=Path(file).name) as caught:
        train(run)
    sentence(caught)
    if "/" in file:
        with pytest.raises(UserError, match=Path(file).name):
            restore(folder)
    assert not mark.exists()
    pickle.loads((folder / file).read_bytes())
    assert mark.exists()  # the trap works


def test_nothing_here_unpickles():
    rooms = ("train", "models", "adapt", "evaluate", "chat", "language", "connectors")
    for path in (path for room in rooms for path in (ROOT / "vlm_adapt" / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\bpickle\b.*\bloads?\(|torch\.load\((?!.*weights_only=True)", text), path
