"""Every method of the vision side on a segmenter, generated from the table of methods: train, save, load.

A segmenter reads four depths and, of a plain ViT, the class token: methods that add tokens or wrap blocks
must leave both where they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_masks
import torch
from grid import ABOUT, METHODS, marks, trains

from vlm_adapt.config.load import validate
from vlm_adapt.data.problems import Account
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import build
from vlm_adapt.models.restore import load_method

SIDES = {"vision": "vision", "language": "language"}
GRID = [
    pytest.param(name, side, marks=marks(name), id=f"{name}-{side}")
    for name in METHODS
    for side in SIDES
    if side in ABOUT[name]["sides"]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny parts and shards."""
    made = tmp_path_factory.mktemp("segmenter")
    tiny_masks.run_tree(made)
    return made


def built(folder: Path, method: str, side: str) -> tuple[Any, Any]:
    """An adapted segmenter and a batch for it, or a skip where the method refuses in one sentence."""
    line = {"method": method, "where": side, **ABOUT[method]["example"]}
    lines = [line] if trains(method) else [line, {"method": "full", "where": side}]
    head = {"channels": 16, "norm": "none"}
    run = validate(tiny_masks.run_tree(folder, adapt=lines, model__head=head), "x")
    assembled = build(run.model, torch.float32, 0)
    torch.manual_seed(0)
    try:
        assembled.adapt([run.adapt])
    except UserError as error:
        assert "\n" not in str(error)
        pytest.skip(f"refused in one sentence: {error}")
    reader, account = assembled.reader(run.data.train, 0, run.data), Account()
    rows = [row for number in (0, 1, 22) for row in reader.training(number, 0, number, account)]
    return assembled, assembled.collate(rows, **assembled.collate_options)


@pytest.mark.parametrize(("method", "side"), GRID)
def test_method(folder: Path, tmp_path: Path, method: str, side: str) -> None:
    assembled, batch = built(folder, method, side)
    model = assembled.model
    declared = {k: p for item in assembled.plan.attached for k, p in item.method.parameters.items()}
    optimizer = torch.optim.Adam(declared.values(), lr=1e-2)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = []
    for _ in range(3):
        model.train()
        total, pixels = model(batch)
        assert len(pixels) == batch.learned
        optimizer.zero_grad()
        (total / batch.learned).backward()
        assert all(p.grad is not None for p in declared.values()), "a declared parameter has no gradient"
        optimizer.step()
        losses.append(float(total) / batch.learned)
    assert losses[-1] != losses[0]
    for name, parameter in model.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name]), name
    # What is saved gives the same logits to a fresh model.
    model.eval()
    model.labels.forget()
    again, _ = built(folder, method, side)
    again.model.eval()
    for item, other in zip(assembled.plan.attached, again.plan.attached, strict=True):
        tensors = {key: p.detach().clone() for key, p in item.method.parameters.items()}
        item.method.save(tmp_path / item.label, tensors)
        item.method.save_latent(tmp_path / item.label, tensors)
        load_method(other, tmp_path / item.label)
    again.model.labels.forget()
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[1], again.model(batch)[1], rtol=1e-5, atol=1e-6)
