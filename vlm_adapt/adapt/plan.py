"""The adaptation plan: freeze everything, attach the methods, and say in a table what trains.

Knows parts and methods; knows nothing about optimizers or files of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlm_adapt.adapt import METHODS
from vlm_adapt.adapt.method import Method, make_method
from vlm_adapt.adapt.place import Place
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError


@dataclass
class Attached:
    """A method in its place.

    Attributes:
        where: the part; `label` names folder and table row, unique in a plan.
        trains: whether it trains in this stage (methods of earlier stages stay, frozen).
        begun: whether it holds values of an earlier step, or of another run.
    """

    label: str
    where: str
    method: Method
    learning_rate: float | None
    trains: bool
    begun: bool = False


@dataclass
class Plan:
    """What was attached to a model, and what of it trains."""

    attached: list[Attached]
    parts: Mapping[str, nn.Module]

    def groups(self, learning_rate: float) -> list[tuple[str, float, list[tuple[str, nn.Parameter]]]]:
        """(part, learning rate, named parameters) of what trains, a group for each method."""
        return [
            (
                item.where,
                item.learning_rate or learning_rate,
                [(f"{item.label}/{key}", p) for key, p in item.method.parameters.items()],
            )
            for item in self.attached
            if item.trains
        ]

    def saved(self) -> dict[str, dict[str, nn.Parameter]]:
        """Everything that differs from the base, by label and file key."""
        return {item.label: item.method.parameters for item in self.attached}

    def table(self) -> list[dict[str, object]]:
        """A row for each part: what is attached, trainable and frozen parameter counts."""
        rows = []
        for name, part in self.parts.items():
            counts = {True: 0, False: 0}
            for parameter in part.parameters():
                counts[parameter.requires_grad] += _count(parameter)
            labels = [item.method.name for item in self.attached if item.where == name and item.trains]
            rows.append(
                {
                    "part": name,
                    "method": ", ".join(labels) or "frozen",
                    "trainable": counts[True],
                    "frozen": counts[False],
                    "bytes": sum(
                        item.method.bytes_stored()
                        for item in self.attached
                        if item.where == name and item.trains
                    ),
                }
            )
        return rows


def _count(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves empty shells behind


def apply_plan(
    parts: Mapping[str, nn.Module],
    stages: Sequence[Sequence[Adapt]],
    unused: Mapping[str, set[str]] | None = None,
    apart: bool = False,
) -> Plan:
    """Freeze every part, attach the methods of all stages, and let the last stage's train.

    What trains is held in float32, its own master copy; what is frozen keeps the compute dtype.

    Args:
        parts: `vision`, `connector`, `language`.
        stages: the lines of each stage so far; equal lines of two stages are one method.
        unused: by part, modules that get no gradient.
        apart: equal lines are methods of their own, and may share parameters: adapters of several runs.

    Raises:
        UserError: a method is unknown or refuses its settings, or nothing would train.
    """
    for part in parts.values():
        part.requires_grad_(False)
    lines = [line for stage in stages for line in stage] if apart else flatten(stages)
    current = stages[-1] if stages else ()
    attached: list[Attached] = []
    made = [(line, make_line(line)) for line in lines]
    for line, method in sorted(made, key=lambda pair: pair[1].order):
        idle = (unused or {}).get(line.where, set())
        method.attach(Place(line.where, parts[line.where], idle, line.blocks))
        number = sum(item.where == line.where and item.method.name == line.method for item in attached)
        label = f"{line.where}-{line.method}" + (f"-{number + 1}" if number else "")
        now = next((item for item in current if _same(item, line)), None)
        rate = now.learning_rate if now else None
        attached.append(Attached(label, line.where, method, rate, now is not None))
    if not apart:
        _check_together(attached)
    for part in parts.values():
        part.requires_grad_(False)
    for item in attached:
        for parameter in item.method.parameters.values():
            parameter.requires_grad_(item.trains)
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32)
    if not any(item.trains and item.method.parameters for item in attached):
        raise UserError("adapt: nothing would train: give the stage at least one method")
    return Plan(attached, parts)


def flatten(stages: Sequence[Sequence[Adapt]]) -> list[Adapt]:
    """The lines of all stages in order; equal lines of two stages are one method."""
    lines: list[Adapt] = []
    for stage in stages:
        lines += [line for line in stage if not any(_same(line, known) for known in lines)]
    return lines


def make_line(line: Adapt) -> Method:
    """The method of a plan's line, not yet attached.

    Raises:
        UserError: it is unknown, refuses its settings, or is not for this side.
    """
    method = make_method(METHODS, line.method, line.options)
    side = "connector" if line.where == "masks" else line.where  # one as the other: small, trained anew
    if side not in method.sides:
        raise UserError(
            f"adapt: method '{line.method}' is for {' and '.join(method.sides)}, not for '{line.where}'"
        )
    return method


def check_plan(stages: Sequence[Sequence[Adapt]]) -> None:
    """Make and forget every method, so that a setting none can have is told before a model is loaded.

    Raises:
        UserError: a method is unknown or refuses its settings.
    """
    for line in (line for stage in stages for line in stage):
        make_line(line)


def _same(first: Adapt, second: Adapt) -> bool:
    keys = ("method", "where", "blocks", "options")
    return all(getattr(first, key) == getattr(second, key) for key in keys)


def _check_together(attached: Sequence[Attached]) -> None:
    owners: dict[int, Attached] = {}
    for item in attached:
        others = [other for other in attached if other.where == item.where and other is not item]
        others = [other for other in others if other.method.trains]
        if item.method.alone and others:
            why = item.method.alone_because
            raise UserError(
                f"adapt: '{item.where}' has '{item.method.name}' and '{others[0].method.name}' together: "
                f"{item.method.name} {why}; choose one"
            )
        for key, parameter in item.method.parameters.items():
            first = owners.setdefault(id(parameter), item)
            if first is not item:
                raise UserError(
                    f"adapt: '{first.label}' and '{item.label}' both train '{key}': leave it to one of them"
                )
