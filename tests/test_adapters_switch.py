"""Several adapters of one base in one process: switched, stacked, and none disturbs another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_adapters import batch, copied, logits, lora, several_runs, trained

from vlm_adapt.adapt.full import Full
from vlm_adapt.adapt.place import Place
from vlm_adapt.chat.session import Session
from vlm_adapt.chat.terminal import Terminal
from vlm_adapt.cli import main
from vlm_adapt.errors import UserError
from vlm_adapt.models.adapters import Adapters
from vlm_adapt.models.restore import restore

FILE = "language-lora/adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See small_adapters.several_runs."""
    return several_runs(parts, tmp_path_factory.mktemp("runs"))


def test_switched_by_name(runs: Path) -> None:
    """Each is what it is alone, to the bit, whatever was used before; none is the base."""
    want = {name: logits(runs / name) for name in ("a", "b")}
    several = Adapters.open(runs / "a")
    ours = several.assembled
    several.add("b", runs / "b")
    assert several.names == ["checkpoint", "b"] and several.active == ("checkpoint",)
    assert torch.equal(logits(ours), want["a"])
    several.use([])
    base = logits(ours)
    several.use(["b"])
    assert torch.equal(logits(ours), want["b"])
    several.use(["checkpoint", "b"])
    stacked = logits(ours)
    assert all((stacked - other).abs().max() > 1e-3 for other in (*want.values(), base))
    several.use(["checkpoint"])
    assert torch.equal(logits(ours), want["a"])
    several.use([])
    assert torch.equal(logits(ours), base) and several.active == ()


def test_the_base_is_held_once(runs: Path) -> None:
    several = Adapters.open(runs / "a")
    several.add("b", runs / "b")
    found = {}
    for name in several.names:
        several.use([name])
        language = several.assembled.model.language.model
        found[name] = language.get_submodule("model.layers.0.mlp.up_proj").base_layer.weight.data_ptr()
        connector = next(several.assembled.model.connector.parameters()).data_ptr()
        found[f"{name}'s connector"] = connector
    assert found["checkpoint"] == found["b"]
    assert found["checkpoint's connector"] != found["b's connector"]


def test_stacked_updates_add_up(parts: Path, runs: Path, tmp_path: Path) -> None:
    """Two LoRAs of the same layers: W + dW1 + dW2, written out."""
    # Other settings, so that ranks differ too; no connector of its own, as `plain`.
    other = trained(
        parts, tmp_path / "run", adapt=[lora(r=2, lora_alpha=6, target_modules=["q_proj", "up_proj"])]
    )
    several = Adapters.open(runs / "plain")
    several.add("other", other)
    several.use([])
    ours = several.assembled
    wanted: dict[str, Any] = {}
    for folder, scale in ((runs / "plain", 1.0), (other, 3.0)):
        tensors = load_file(folder / FILE)
        for key, down in tensors.items():
            if "lora_A" in key:
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                delta = scale * tensors[key.replace("lora_A", "lora_B")] @ down
                wanted[name] = wanted.get(name, 0) + delta
    model = ours.model.language.model
    before = {name: model.get_submodule(name).weight.clone() for name in wanted}
    for name, delta in wanted.items():
        model.get_submodule(name).weight.data += delta
    want = logits(ours)
    for name, weight in before.items():
        model.get_submodule(name).weight.data.copy_(weight)
    for order in (["checkpoint", "other"], ["other", "checkpoint"]):
        several.use(order)
        # Sums in another order, on logits of about 5.
        torch.testing.assert_close(logits(ours), want, atol=2e-5, rtol=1e-5)
    assert not several.notes


def test_whose_connector_acts_is_told(runs: Path) -> None:
    several = Adapters.open(runs / "a")
    several.add("b", runs / "b")
    several.use(["b", "checkpoint"])
    (note,) = several.notes
    assert note == "b and checkpoint both trained the connector's own weights: those of checkpoint are used"
    mine = several.assembled.model.connector.state_dict()
    several.use(["checkpoint"])
    assert all(torch.equal(mine[k], v) for k, v in several.assembled.model.connector.state_dict().items())
    assert not several.notes


def test_names_that_cannot_be(runs: Path, tmp_path: Path) -> None:
    several = Adapters.open(runs / "a")
    for name, said in (("checkpoint", "is taken"), ("a+b", "has a space"), ("", "is empty")):
        with pytest.raises(UserError, match=said):
            several.add(name, runs / "b")
    with pytest.raises(UserError, match="there is no adapter 'chekpoint', did you mean 'checkpoint'"):
        several.use(["chekpoint"])
    with pytest.raises(UserError, match="names one twice"):
        several.use(["checkpoint", "checkpoint"])
    with pytest.raises(UserError, match="holds no checkpoint"):
        several.add("x", tmp_path)
    other = copied(runs / "b", tmp_path / "other")
    text = (other / "run.yaml").read_text()
    (other / "run.yaml").write_text(text.replace("template: auto", "template: plain"))
    with pytest.raises(UserError, match=r"model.language.template 'plain' and this model has 'auto'"):
        several.add("x", other)
    assert several.names == ["checkpoint"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_trained_in_full_is_switched(dtype: torch.dtype) -> None:
    part = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3)).to(dtype)
    base = {name: value.clone() for name, value in part.state_dict().items()}
    method = Full()
    method.attach(Place("connector", part))
    for parameter in method.parameters.values():
        parameter.data = parameter.data.float() + 0.125
    moved = {name: value.clone() for name, value in part.state_dict().items()}
    for active, want in ((False, base), (False, base), (True, moved), (False, base), (True, moved)):
        method.set_active(active)
        assert all(torch.equal(value, want[name].float()) for name, value in part.state_dict().items())


def test_chat_switches(runs: Path, capsys: Any) -> None:
    session = Session.open(runs / "a", adapters={"b": runs / "b"})
    terminal = Terminal(session)
    assert session.adapters is not None and session.adapters.active == ("b",)
    terminal.line("/adapter checkpoint + b")
    said = capsys.readouterr().err
    assert "in use: checkpoint + b" in said and "those of b are used" in said
    terminal.line("/adapter none")
    assert session.adapters.active == () and "in use: none" in capsys.readouterr().err
    session.settings.max_new_tokens = 3
    terminal.line("hello")
    with pytest.raises(UserError, match="there is no adapter 'x'"):
        terminal.line("/adapter x")
    with pytest.raises(UserError, match="start with vlm-adapt chat CHECKPOINT --adapter"):
        Terminal(Session.open(runs / "a")).line("/adapter")
    assert main(["chat", str(runs / "a"), "--adapter", "b"]) == 2
    assert "is not NAME=FOLDER" in capsys.readouterr().err


def test_what_was_compared(runs: Path) -> None:
    """The batch is real: it has words to learn, and images are seen."""
    ours = restore(runs / "a")[0]
    shown = batch(ours)
    assert len(shown.images) == 2 and len(shown.targets_N) > 6
