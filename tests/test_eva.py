"""EVA's start of LoRA: A from what layers read of the first batches, once, and the same on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from forks import write
from safetensors.torch import load_file
from test_resume import lines
from torch import nn

from vlm_adapt.adapt.lora import Lora
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError
from vlm_adapt.train.run import train

EVA = {"method": "lora", "where": "language", "r": 3, "init_lora_weights": "eva", "learning_rate": 1e-3}


def test_directions_are_the_principal_components() -> None:
    """Of inputs with three strong directions A's rows are these, in order, up to sign; B stays zero."""
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(16, 8))
    method = Lora(r=3, init_lora_weights="eva", target_modules="0")
    method.attach(Place("connector", part))
    seen = method.watch()
    basis_DD = torch.linalg.qr(torch.randn(16, 16)).Q
    scales_D = torch.tensor([9.0, 6.0, 4.0] + [0.1] * 13)
    x_ND = torch.randn(2000, 16) * scales_D @ basis_DD.T + 5.0  # components are those of centred data
    before = part(x_ND[:4])
    for start in range(0, 2000, 100):
        part(x_ND[start : start + 100])
    assert seen.done
    assert seen.finish() == "EVA: the directions of 1 of 1 layers were found"
    a_RD, b_OR = (p.detach() for p in method.parameters.values())
    want_RD = torch.linalg.svd(x_ND - x_ND.mean(0)).Vh[:3]
    # The incremental decomposition forgets a little: cosines, not values.
    assert torch.nn.functional.cosine_similarity(a_RD, want_RD).abs().min() > 0.99
    assert not b_OR.any() and torch.equal(part(x_ND[:4]), before)


def saved(output: Path, step: int) -> dict[str, Any]:
    return load_file(output / f"checkpoint-{step}" / "language-lora" / "adapter_model.safetensors")


def test_a_run_looks_once(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another A than at random, announced; a run that goes on does not look again."""
    usual = {"adapt": [EVA], "train__max_steps": 3, "train__save_total_limit": 9}
    assert train(tiny.run_of(parts, tmp_path / "eva", **usual)) == 0
    told = capsys.readouterr().err
    assert "language-lora: EVA: the directions of" in told and "of 14 layers were found" in told
    plain = {key: value for key, value in EVA.items() if key != "init_lora_weights"}
    assert train(tiny.run_of(parts, tmp_path / "plain", **(usual | {"adapt": [plain]}))) == 0
    with_eva, without = saved(tmp_path / "eva", 1), saved(tmp_path / "plain", 1)
    keys = [key for key in with_eva if "lora_A" in key]
    # Rows of length 1, but for one step of Adam at 1e-3 (32 numbers: at most 0.006).
    assert all((with_eva[key].norm(dim=1) - 1).abs().max() < 0.02 for key in keys)
    assert all((with_eva[key] - without[key]).abs().max() > 0.05 for key in keys)
    whole = saved(tmp_path / "eva", 3)
    (tmp_path / "eva" / "latest").write_text("checkpoint-1")  # as if it had been stopped there
    assert train(tiny.run_of(parts, tmp_path / "eva", **usual)) == 0
    assert "EVA" not in capsys.readouterr().err
    again = saved(tmp_path / "eva", 3)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_every_rank_begins_alike(parts: Path, server: Any, tmp_path: Path) -> None:
    """One process and two, with ZeRO-2: the same losses."""
    runs = {}
    for ranks, zero in ((1, "zero0"), (2, "zero2")):
        changes = {"adapt": [EVA], "data__lanes": 1, "train__per_device_train_batch_size": 4 // ranks}
        tree = tiny.run_tree(parts, str(tmp_path / zero), **changes, train__deepspeed=zero)
        server.run(["train", write(tree)], ranks=ranks)
        runs[zero] = [line["loss"] for line in lines(tree)]
    assert runs["zero2"] == pytest.approx(runs["zero0"], rel=1e-5)  # sums in another order


def test_ranks_stay_where_they_are() -> None:
    with pytest.raises(UserError, match="'eva_config': ranks stay where they are here"):
        Lora(init_lora_weights="eva", eva_config={"rho": 2.0})
