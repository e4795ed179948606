"""What the tests of all methods share: the grid of methods and sides, tiny models with one, some steps.

Read off the table of methods, so that a new one joins by its line there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rows
import torch

from vlm_adapt.adapt import METHODS
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.models.about import constants_of

torch.set_num_threads(1)
ABOUT = {name: constants_of(METHODS[name]) for name in METHODS}
FEW = {"ia3", "oft", "vera"}  # of peft's many tuners, which share one file of ours; the others are slow tests


def marks(name: str) -> list[pytest.MarkDecorator]:
    """Slow, for one of many that go the same way."""
    many = METHODS[name].startswith("vlm_adapt.adapt.tuners") and name not in FEW
    return [pytest.mark.slow] if many else []


GRID = [
    pytest.param(name, side, marks=marks(name), id=f"{name}-{side}")
    for name in METHODS
    for side in ABOUT[name]["sides"]
]
LENGTH = 5


def built(parts: Path, method: str, side: str, seed: int = 0, **more: Any) -> Any:
    """A model with one method on one side; a connector with blocks where a plain one has none for it."""
    try:
        return assembled(parts, method, side, seed, "mlp", **more)
    except UserError as error:
        assert "\n" not in str(error)
        refused = error
    try:
        if side == "connector":
            return assembled(parts, method, side, seed, "resampler", **more)
    except UserError as error:
        refused = error
    pytest.skip(f"refused in one sentence: {refused}")


def assembled(parts: Path, method: str, side: str, seed: int, connector: str, **more: Any) -> Any:
    """As `built`, or the sentence that refuses."""
    ours = rows.assemble(parts / "vit", parts / "llama", connector, template="bare")
    line = {"method": method, "where": side, **ABOUT[method]["example"], **more}
    torch.manual_seed(seed)
    plain = [line]
    if not trains(method):
        plain.append({"method": "full", "where": side})
    ours.adapt([[Adapt.model_validate(one) for one in plain]])
    return ours


def plain(parts: Path, ours: Any) -> Any:
    """The same model without any method."""
    return rows.assemble(parts / "vit", parts / "llama", ours.config.connector.name, template="bare")


def trains(method: str) -> bool:
    """Whether it trains something itself (Back Razor does not)."""
    return bool(ABOUT[method].get("trains", True))


def batch_of(ours: Any) -> Any:
    talks = [["<image>what color is the shape?", "red"], ["no", "yes"], ["is<image>it red?", "no a photo"]]
    return rows.batch(ours, [rows.conversation(ours, *talk, seed=i) for i, talk in enumerate(talks)])


def item_of(ours: Any, method: str) -> Any:
    return next(item for item in ours.plan.attached if item.method.name == method)


def learn(ours: Any, steps: int, optimizer: Any = None) -> Any:
    """Some steps as the loop takes them; returns the optimizer."""
    methods = [item.method for item in ours.plan.attached if item.trains]
    parameters = [p for method in methods for p in method.parameters.values()]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=2e-2)
    ours.model.train()
    for step in range(steps):
        torch.manual_seed(step)  # some draw while they train
        batch = batch_of(ours)
        total, losses = ours.model(batch)
        (total / len(losses)).backward()
        for method in methods:
            method.before_step(step, 100, lambda p: p.grad)
        optimizer.step()
        optimizer.zero_grad()
        for method in methods:
            method.after_step(step, 100)
    ours.model.eval()
    return optimizer


def forced(ours: Any, sentence: Any, seed: int, answer: list[int]) -> list[int]:
    """What the model would choose at each position of `answer`, were it fed the rest."""
    row = rows.row(ours, sentence, seed, learn=False)
    start = len(row)
    for token in answer[:-1]:
        for name, value in (
            ("ids", token),
            ("blocks", int(row.blocks[-1]) + 1),
            ("branches", 0),
            ("positions", int(row.positions[-1]) + 1),
        ):
            setattr(row, name, np.append(getattr(row, name), value))
    return ours.model.logits(rows.batch(ours, [row]))[0, start - 1 :].argmax(-1).tolist()


def beside(method: str, side: str) -> list[Adapt]:
    if trains(method):
        return []
    return [Adapt.model_validate({"method": "full", "where": side})]
