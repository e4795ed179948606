"""A layer whose weight is computed from its own, whatever its forward does with it.

The layer gets a subclass of its own class in which `weight` is the changed one; the base's own stays
registered under its old name, and what trains is registered beside it. So every name of the library stays,
its own forward runs (padding and standardisation of special convolutions, torch's fused attention), and
ZeRO-3, which gathers the weights of a module when it is called, brings both. Torch's `parametrize` works
alike, but renames the weight. Knows nothing about methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.errors import UserError


class Change:
    """One change of one weight. Subclasses give `changed`.

    Attributes:
        method: the name of the method that it belongs to.
        active: whether it acts.
        names: own leaf -> the name that its parameter has in the module.
    """

    def __init__(self, method: str) -> None:
        self.method, self.active = method, True
        self.names: dict[str, str] = {}

    def parameter(self, module: nn.Module, leaf: str) -> nn.Parameter:
        """One of the parameters that came with this change."""
        found = module._parameters[self.names[leaf]]
        assert found is not None
        return found

    def changed(self, module: nn.Module, weight: Tensor) -> Tensor:
        """The weight to compute with, in the dtype of `weight`; never `weight` itself with other values."""
        raise AttributeError("a change says what it makes of a weight")


class Added(Change):
    """A change that adds `delta`, summed in float32 and rounded once."""

    def delta(self, module: nn.Module) -> Tensor:
        """What is added, in the shape of the weight."""
        raise AttributeError("it says what it adds")

    def changed(self, module: nn.Module, weight: Tensor) -> Tensor:
        """As in Change. Autocast would multiply in half precision, and the merged weight would differ."""
        with torch.autocast(weight.device.type, enabled=False):
            return (weight.float() + self.delta(module)).to(weight.dtype)


def add_change(module: nn.Module, leaf: str, change: Change, parameters: dict[str, nn.Parameter]) -> None:
    """Let `module.<leaf>` be what `change` makes of it.

    Args:
        parameters: what trains, by the leaf that `change` knows it by; in the module the method's name comes
            before it, with a number where that is taken.
    """
    number, tried = 1, change.method
    while any(f"{tried}_{own}" in module._parameters for own in parameters):
        number += 1
        tried = f"{change.method}_{number}"
    for own, parameter in parameters.items():
        change.names[own] = f"{tried}_{own}"
        module.register_parameter(change.names[own], parameter)
    held: dict[str, list[Change]] = module.__dict__.setdefault("weight_changes", {})
    held.setdefault(leaf, []).append(change)
    if len(held[leaf]) == 1:
        module.__class__ = _changed_class(type(module), leaf)


def remove_change(module: nn.Module, leaf: str, change: Change) -> None:
    """Take a change and its parameters off; after the last one the layer is what it was."""
    held: dict[str, list[Change]] = module.__dict__["weight_changes"]
    held[leaf].remove(change)
    for name in change.names.values():
        del module._parameters[name]
    if held[leaf]:
        return
    del held[leaf]
    base: Any = next(one for one in type(module).__mro__ if "changed_leaf" not in vars(one))
    for remaining in held:
        base = _changed_class(base, remaining)
    module.__class__ = base
    if not held:
        del module.__dict__["weight_changes"]


@torch.no_grad()
def merge_change(module: nn.Module, leaf: str, change: Change) -> None:
    """Put what a change makes of the base's own weight in its place, and take the change off.

    Raises:
        UserError: an earlier change acts on the weight, and the two cannot change places.
    """
    check_first(module, leaf, change)
    weight = module._parameters[leaf]
    assert weight is not None
    weight.copy_(change.changed(module, weight.detach()))
    remove_change(module, leaf, change)


def check_first(module: nn.Module, leaf: str, change: Change | None = None) -> None:
    """Raise UserError if a change (None: an update from outside) cannot be folded into the weight yet.

    Sums can be folded in any order, a mask only before what came after it.
    """
    held: list[Change] = module.__dict__.get("weight_changes", {}).get(leaf, [])
    earlier = held[: held.index(change)] if change is not None else held
    sums = change is None or isinstance(change, Added)
    for one in earlier:
        if not (sums and isinstance(one, Added)):
            raise UserError(f"a layer has a change of its weight below this one: merge '{one.method}' first")


@contextmanager
def own_weights(module: nn.Module) -> Iterator[None]:
    """Let others read and write the base's own weights of a layer: to fold an update from outside into them.

    Raises:
        UserError: a mask lies on one, and must be merged before.
    """
    held: dict[str, list[Change]] = module.__dict__.get("weight_changes", {})
    for leaf in held:
        check_first(module, leaf)
    acting = [change for changes in held.values() for change in changes if change.active]
    for change in acting:
        change.active = False
    try:
        yield
    finally:
        for change in acting:
            change.active = True


def _changed_class(kind: Any, leaf: str) -> Any:
    """A subclass of a module's class in which one weight is the changed one."""

    def value(self: Any) -> Any:
        weight = self._parameters[leaf]
        try:
            for change in self.weight_changes.get(leaf, ()):
                weight = change.changed(self, weight) if change.active else weight
        except AttributeError as error:  # nn.Module would hand out the unchanged weight in silence
            raise RuntimeError(f"the change of '{leaf}' failed: {error}") from error
        return weight

    members = {leaf: property(value), "changed_leaf": leaf}
    # Names are the library's: some know a layer by the name of its class (transformers' Conv1D).
    return type(kind.__name__, (kind,), members | {"__module__": kind.__module__, "__doc__": kind.__doc__})
