"""Several adapters of one base in one process: added by name, used one at a time or stacked.

Knows a base, folders of adapters and how weights are shared; knows nothing about what methods compute.

Every choice of adapters is a model of its own made of new modules around the base's own weights: nothing of
the base is copied, none of the adapters can disturb another, and the base stays what it was. Only what an
adapter trained takes memory, and switching costs nothing. A part that was trained in full (most connectors)
has its own values in its adapter's model: with it the connector is switched too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_adapt import dist
from vlm_adapt.adapt.plan import Attached, flatten, make_line
from vlm_adapt.choices import nearest
from vlm_adapt.config.schema import Adapt, Model
from vlm_adapt.errors import UserError
from vlm_adapt.models.build import Assembled
from vlm_adapt.models.fingerprint import check_base, fingerprint
from vlm_adapt.models.restore import (
    build_base,
    check_files,
    find_checkpoint,
    load_method,
    load_statistics,
    plan_of,
    read_checkpoint,
)

OWN = "checkpoint"  # the name of what the checkpoint that was opened has trained


class Adapters:
    """Adapters of one base, by name.

    Args:
        assembled: a model that nothing has been attached to; from here on it is whatever `use` chose last.

    Attributes:
        active: the names in use, in the order they were stacked; none is the base.
        notes: what a user should know of the last choice (both bring a connector, say).

    Raises:
        UserError: a plan has been applied to the model.
    """

    def __init__(self, assembled: Assembled):
        if assembled.plan is not None:
            raise UserError("adapters are added to a base: give a model without a plan, or Adapters.open")
        self.assembled, self._base = assembled, replace(assembled)
        self.active: tuple[str, ...] = ()
        self.notes: list[str] = []
        self._folders: dict[str, Path] = {}
        self._alone: dict[str, Assembled] = {}
        self._stack: tuple[tuple[str, ...], Assembled, list[str]] | None = None  # the last one made

    @classmethod
    def open(cls, checkpoint: str | Path, dtype: torch.dtype | None = None) -> Adapters:
        """A checkpoint's base with the checkpoint itself as the adapter `checkpoint`, in use.

        Raises:
            UserError: it cannot be restored.
        """
        folder = find_checkpoint(checkpoint)
        run, state = read_checkpoint(folder)
        check_files(folder, state["labels"])
        assembled = build_base(run, folder, dtype)
        assembled.model.to(dist.device()).requires_grad_(False)
        made = cls(assembled)
        made.add(OWN, folder)
        made.use([OWN])
        return made

    @property
    def names(self) -> list[str]:
        """All names, in the order they were added."""
        return list(self._folders)

    def add(self, name: str, folder: str | Path) -> None:
        """Read an adapter (or checkpoint) and keep it under a name; what is in use stays in use.

        Raises:
            UserError: the name is taken or no name, or the folder is no adapter of this base.
        """
        if name in self._folders or not name or any(sign in name for sign in " +="):
            taken = "is taken" if name in self._folders else "has a space, + or = in it, or is empty"
            raise UserError(f"the adapter's name '{name}' {taken}: choose another")
        place = find_checkpoint(folder)
        run, state = read_checkpoint(place)
        check_files(place, state["labels"])
        check_base(state.get("base"), self._base.base, f"'{folder}'", state["labels"])
        check_words(run.language_model, self._base.config, str(folder))
        self._folders[name] = place
        try:
            self._alone[name] = self._made((name,))[0]
        except BaseException:
            del self._folders[name]
            raise

    def use(self, names: Sequence[str]) -> None:
        """Let these adapters act, all of them together, and no others; none gives the base.

        Where several have trained one part in full, the last one named brings it, and `notes` says so.

        Raises:
            UserError: an unknown name, one twice, or methods that cannot share a layer.
        """
        for name in names:
            if name not in self._folders:
                near = nearest(name, self._folders)
                known = ", ".join(self._folders) or "none yet"
                raise UserError(f"there is no adapter '{name}'{near}{';' if near else ':'} there are {known}")
        chosen = tuple(names)
        if len(set(chosen)) < len(chosen):
            raise UserError(f"an adapter can be used once: {' + '.join(chosen)} names one twice")
        notes: list[str] = []
        if not chosen:
            made = self._base
        elif len(chosen) == 1:
            made = self._alone[chosen[0]]
        else:
            if self._stack is None or self._stack[0] != chosen:
                self._stack = (chosen, *self._made(chosen))
            made, notes = self._stack[1:]
        for field in fields(Assembled):
            setattr(self.assembled, field.name, getattr(made, field.name))
        self.active, self.notes = chosen, notes

    def _made(self, names: tuple[str, ...]) -> tuple[Assembled, list[str]]:
        """The base with these adapters attached and loaded, and notes."""
        states = {name: read_checkpoint(self._folders[name]) for name in names}
        lines = [(name, line) for name, known in states.items() for line in flatten(plan_of(*known))]
        base = self._base
        made = replace(base, model=shared(base.model, base.tokenizer), encoder=copy.copy(base.encoder))
        plan = made.adapt([[line for _, line in lines]], apart=len(names) > 1)
        owners: dict[int, str] = {}
        shared_parts: dict[str, str] = {}
        for (name, label), item in zip(labels_of(lines), plan.attached, strict=True):
            for parameter in item.method.parameters.values():
                first = owners.setdefault(id(parameter), name)
                if first != name:
                    shared_parts[item.where] = (
                        f"{first} and {name} both trained the {item.where}'s own weights"
                    )
                parameter.data = parameter.data.clone()  # in float32 it would be the base's own storage
            if label in states[name][1]["labels"]:
                self._load(item, self._folders[name] / label, len(names) > 1)
        for name in names:
            load_statistics(made, self._folders[name])
        if fingerprint(base.model, base.config) != base.base:
            raise RuntimeError(f"attaching {names} changed the base's own weights in place")
        made.model.requires_grad_(False).eval()
        return made, [f"{text}: those of {names[-1]} are used" for text in shared_parts.values()]

    def _load(self, item: Attached, folder: Path, stacked: bool) -> None:
        try:
            load_method(item, folder)
        except UserError as error:
            if not stacked:
                raise
            raise UserError(
                f"'{folder.parent}' cannot be stacked on the others: its '{folder.name}' finds the layers "
                "changed by them; use it alone, or merge the others first"
            ) from error


def shared(model: nn.Module, *whole: Any) -> Any:
    """A model of new modules around the very weights and buffers of another (and `whole` things)."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in model.parameters()
    }
    memo |= {id(one): one for one in (*model.buffers(), *whole)}
    return copy.deepcopy(model, memo)


def labels_of(lines: Sequence[tuple[str, Adapt]]) -> list[tuple[str, str]]:
    """(adapter, label in its own folder) of each line, in the order in which a plan attaches them."""
    counts: dict[str, int] = {}
    labels = []
    for name, line in sorted(lines, key=lambda pair: make_line(pair[1]).order):
        label = f"{line.where}-{line.method}"
        counts[f"{name}/{label}"] = number = counts.get(f"{name}/{label}", 0) + 1
        labels.append((name, label + (f"-{number}" if number > 1 else "")))
    return labels


def check_words(theirs: Model, ours: Model, folder: str) -> None:
    """Settings of a model that change what it reads, and are no part of its weights.

    Raises:
        UserError: one differs.
    """
    for key in ("language.template", "language.prefix_lm", "vision.options"):
        part, _, name = key.partition(".")
        before, now = getattr(getattr(theirs, part), name), getattr(getattr(ours, part), name)
        if before != now:
            raise UserError(
                f"'{folder}' was trained with model.{key} {before!r} and this model has {now!r}: they read "
                "differently; open it on its own"
            )
