"""What a run would train, from shapes alone: no weights are read.

Knows how to build a model without values and how to count what a plan attached; knows nothing of tables on
a screen.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from vlm_adapt.adapt.plan import Attached
from vlm_adapt.config.schema import Run
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.build import build


@dataclass
class Tensors:
    """Tensors of one kind: their names with `*` for numbers, shape, how many, and numbers in all."""

    name: str
    shape: tuple[int, ...]
    times: int
    count: int


@dataclass
class Line:
    """What one method of a stage trains."""

    label: str
    where: str
    method: str
    tensors: list[Tensors]
    count: int
    bytes_stored: int


@dataclass
class StageOutline:
    """A stage: its methods, and the frozen and trained numbers of each part."""

    name: str
    lines: list[Line]
    parts: dict[str, tuple[int, int]]
    """part -> (numbers that train, all numbers)"""

    @property
    def total(self) -> int:
        """Numbers of the whole model, methods included."""
        return sum(every for _, every in self.parts.values())


def outline(run: Run) -> list[StageOutline]:
    """Every stage of a run, counted.

    Raises:
        UserError: a part cannot be found, or a method does not fit.
    """
    stages = run.stage_runs()
    found = []
    for number, (name, stage) in enumerate(stages):
        assembled: AssembledModel = build(stage.model, torch.float32, run.seed, empty=True)
        plan = assembled.adapt([one.adapt for _, one in stages[: number + 1]])
        lines = [_line(item) for item in plan.attached if item.trains]
        parts = {}
        for part, module in plan.parts.items():
            every = list(module.parameters())
            parts[part] = (_count(p for p in every if p.requires_grad), _count(every))
        found.append(StageOutline(name, lines, parts))
    return found


def _line(item: Attached) -> Line:
    kinds: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for key, parameter in item.method.parameters.items():
        kinds[re.sub(r"(?<![A-Za-z])\d+", "*", key), tuple(parameter.shape)] += 1
    tensors = [
        Tensors(name, shape, times, times * torch.Size(shape).numel())
        for (name, shape), times in kinds.items()
    ]
    count = sum(one.count for one in tensors)
    return Line(item.label, item.where, item.method.name, tensors, count, item.method.bytes_stored())


def _count(parameters: object) -> int:
    unique: dict[int, nn.Parameter] = {id(p): p for p in parameters}  # type: ignore[attr-defined]
    return sum(p.numel() for p in unique.values())
