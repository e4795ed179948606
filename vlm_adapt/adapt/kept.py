"""Weights of the base that a method trains: chosen at its place, and switched between old and new values.

Knows parameters; knows nothing about which ones a method wants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.place import Place


def parameters_of(
    place: Place, wanted: Callable[[nn.Module, str], bool]
) -> Iterator[tuple[str, nn.Parameter]]:
    """(dotted name below the part, parameter) of those wanted: used, and in the blocks that are meant.

    Without `blocks` in the plan's line the whole part is meant, what lies outside of its blocks too.

    Args:
        wanted: (module that owns it, its own name there) -> whether it is.
    """
    inside = None if place.chosen is None else place.inside()
    seen: set[int] = set()
    for module_name, module in place.part.named_modules():
        if inside is not None and id(module) not in inside:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            if id(parameter) not in seen and place.is_used(name) and wanted(module, leaf):
                seen.add(id(parameter))
                yield name, parameter


def is_norm_weight(module: nn.Module, leaf: str) -> bool:
    """Whether a parameter scales or shifts what a LayerNorm or an RMSNorm gives, by the class's name."""
    kind = type(module).__name__.lower()
    return "layernorm" in kind or "rmsnorm" in kind


class Kept:
    """The base's own values of parameters that train in place.

    They stay on the CPU but for the moment of a switch: there is no training meanwhile.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = dict(parameters)
        self.others: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if not parameter.is_meta:
                self.others[name] = parameter.detach().to("cpu", copy=True)
        self.trained = True

    @torch.no_grad()
    def show(self, trained: bool) -> None:
        """Put the trained values, or the base's own, in place; the other ones are kept."""
        if trained == self.trained:
            return
        self.trained = trained
        for name, other in self.others.items():
            parameter = self.parameters[name]
            shown = parameter.detach().to("cpu", copy=True)
            parameter.copy_(other)
            self.others[name] = shown
