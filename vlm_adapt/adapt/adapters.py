"""Small modules that join a block: how they are put there, named, called and switched off.

Knows places of a block (adapt/anatomy.py) and hooks; knows nothing about what a module computes.

A module is added to its block by name and called from hooks of the block's own layers. What a hook takes
early it hands over later within the same block and forgets: a block that is run again for checkpointing runs
both hooks again, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.anatomy import Anatomy, anatomies
from vlm_adapt.adapt.kept import Kept, is_norm_weight, parameters_of
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
WORDS = {"attention_end": "attention", "mlp_end": "feed-forward"}


class Inserted(nn.Module):
    """A module whose output is added to that of a layer. A subclass's `forward` maps [..., D] to [..., D].

    Hooks are bound methods, so a copy of a block calls its own copy of the module.

    Args:
        channels_first: whether the layer works on [N, D, H, W].

    Attributes:
        active: whether anything is added.
    """

    def __init__(self, channels_first: bool = False):
        super().__init__()
        self.channels_first, self.active = channels_first, True
        self._taken: Tensor | None = None

    def follow(self, end: nn.Module) -> None:
        """Read the output of `end` and add to it."""
        end.register_forward_hook(self._after)

    def accompany(self, start: nn.Module, end: nn.Module) -> None:
        """Read the first input of `start` and add to the output of `end`, which comes after it."""
        start.register_forward_pre_hook(self._take, with_kwargs=True)
        end.register_forward_hook(self._beside)

    def _after(self, layer: nn.Module, args: Any, output: Any) -> Any:
        return self._added(output, _first(output)) if self.active else output

    def _take(self, layer: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._taken = (args[0] if args else next(iter(kwargs.values()))) if self.active else None

    def _beside(self, layer: nn.Module, args: Any, output: Any) -> Any:
        taken, self._taken = self._taken, None
        return output if taken is None else self._added(output, taken)

    def _added(self, output: Any, read: Tensor) -> Any:
        if self.channels_first:
            update = self(read.movedim(1, -1)).movedim(-1, 1)
        else:
            update = self(read)
        first = _first(output)
        summed = first + update.to(first.dtype)
        return (summed, *output[1:]) if isinstance(output, tuple) else summed


class Adapters(Method):
    """What adapters of all papers have in common. A subclass says in `insert` which modules go where.

    Args (what is left out is the paper's, a constant of the class):
        bottleneck: width b inside.
        activation: gelu, gelu_tanh, identity, relu, silu or tanh.
        scale: the modules' output is multiplied by it.
        dropout: of what comes out of the activation, in training.
        layer_norms: train the part's LayerNorms and RMSNorms too (with `blocks`, those of the blocks).

    Class attributes:
        needs: places without which a block is passed over.
    """

    needs: tuple[str, ...] = ("mlp_end",)
    bottleneck: int = 64
    activation: str = "relu"
    scale: float = 1.0

    def __init__(
        self,
        bottleneck: int | None = None,
        activation: str | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        layer_norms: bool = False,
    ):
        super().__init__()
        bottleneck = self.bottleneck if bottleneck is None else bottleneck
        activation = self.activation if activation is None else activation
        scale = self.scale if scale is None else scale
        if not isinstance(bottleneck, int) or isinstance(bottleneck, bool) or bottleneck < 1:
            raise UserError(f"adapt: {self.name}'s bottleneck is a whole number from 1, not {bottleneck!r}")
        if activation not in ACTIVATIONS:
            raise UserError(
                f"adapt: {self.name} knows no activation '{activation}'"
                f"{nearest(activation, ACTIVATIONS) or ': choose ' + ', '.join(ACTIVATIONS)}"
            )
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale:
            raise UserError(f"adapt: {self.name}'s scale is a number that is not 0, not {scale!r}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise UserError(f"adapt: {self.name}'s dropout is from 0 to below 1, not {dropout!r}")
        if not isinstance(layer_norms, bool):
            raise UserError(f"adapt: {self.name}'s layer_norms is true or false, not {layer_norms!r}")
        self.bottleneck, self.activation = bottleneck, activation
        self.scale, self.dropout, self.layer_norms = float(scale), float(dropout), layer_norms
        self.holders: list[nn.ModuleDict] = []
        self.kept = Kept({})

    def insert(self, found: Anatomy, device: torch.device) -> dict[str, nn.Module]:
        """Make the modules of one block and hook them to its layers; they are named below the block."""
        raise AttributeError("a kind of adapter says what it inserts")

    def attach(self, place: Place) -> None:
        """Insert the modules in every block that has the places.

        Raises:
            UserError: no block has them, or not one that the plan's line names.
        """
        self.part = place.part
        norms = dict(parameters_of(place, is_norm_weight)) if self.layer_norms else {}
        names = {id(module): name for name, module in place.inner.named_modules()}
        for block, found in self._places(place):
            holder = nn.ModuleDict(self.insert(found, place.device)).train(block.training)
            block.add_module(free_name(block, self.name), holder)
            self.holders.append(holder)
            prefix = ".".join(filter(None, (names.get(id(block), ""), self.name)))
            for leaf, parameter in holder.named_parameters():
                self.parameters[f"{prefix}.{leaf}"] = parameter
        self.parameters |= norms
        self.kept = Kept(norms)

    def set_active(self, active: bool) -> None:
        """Call the modules or not; the trained norms follow."""
        super().set_active(active)
        for holder in self.holders:
            for module in holder.values():
                if isinstance(module, Inserted):
                    module.active = active
        self.kept.show(active)

    def _places(self, place: Place) -> list[tuple[nn.Module, Anatomy]]:
        inside, places = place.inside(), []
        wanted = " and ".join(WORDS[need] for need in self.needs)
        for number, name, block in place.blocks():
            here = [
                (module, found)
                for module, found in (
                    (place.part.get_submodule(inner), found) for inner, found in anatomies(block, name)
                )
                if id(module) in inside and all(getattr(found, need) is not None for need in self.needs)
            ]
            if not here and place.chosen is not None:
                raise UserError(
                    f"adapt: '{self.name}' finds no {wanted} in block {number} of '{place.where}' "
                    f"({type(block).__name__}): choose other blocks, or take lora"
                )
            places += here
        if not places:
            raise UserError(
                f"adapt: '{self.name}' finds no block with {wanted} in '{place.where}' "
                f"({type(place.inner).__name__}): take lora"
            )
        return places


def free_name(block: nn.Module, name: str) -> str:
    """`name`, or `name_2` and so on where the block has that already."""
    number, free = 1, name
    while hasattr(block, free):
        number += 1
        free = f"{name}_{number}"
    return free


def as_weight(x: Tensor, weight: Tensor) -> Tensor:
    """`x` in the dtype of a weight that it meets; under autocast as it is, which brings both to one."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
