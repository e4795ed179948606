"""A low-rank update beside a linear layer: on its output by a hook, or in its weight where no hook would run.

Knows how an update meets a layer and is folded into it; knows nothing about where A and B come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_adapt.adapt.linear_layers import Layer
from vlm_adapt.adapt.weight_change import Added, add_change, check_first, merge_change
from vlm_adapt.errors import UserError


class Update(nn.Module):
    """What is added to a linear layer's output: scale * B A x, of some pieces of it.

    Args:
        shape: (out, in) of the layer.
        r: rank of each piece's update.
        scale: of the product.
        dropout: of the input.
        pieces: the names that the pieces which are updated have, by their number; the parameters are
            `<name>_A` [r, in] and `<name>_B` [groups * size, r]. Of a layer that is one piece, {0: "lora"}.
        groups, sizes: the output's features are `groups` times pieces of these sizes, in order; by default
            one piece.

    Attributes:
        active: whether it acts.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        r: int,
        scale: float,
        dropout: float = 0.0,
        pieces: Mapping[int, str] | None = None,
        groups: int = 1,
        sizes: Sequence[int] | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.scale, self.active = scale, True
        self.pieces = dict(pieces or {0: "lora"})
        self.groups, self.sizes = groups, list(sizes or [shape[0]])
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for number, name in self.pieces.items():
            a = nn.Parameter(torch.empty(r, shape[1], device=device))
            b = nn.Parameter(torch.zeros(groups * self.sizes[number], r, device=device))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            self.register_parameter(f"{name}_A", a)
            self.register_parameter(f"{name}_B", b)

    def factor(self, tensor: Tensor) -> Tensor:
        """What is multiplied with, of a parameter: itself."""
        return tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's input [..., in] and output [..., out] to the new output; other pieces stay."""
        x = self.dropout(x)
        added = {}
        for number, name in self.pieces.items():
            a, b = (self.factor(getattr(self, f"{name}_{letter}")) for letter in "AB")
            if not torch.is_autocast_enabled(x.device.type):
                a, b = a.to(x.dtype), b.to(x.dtype)
            added[number] = (F.linear(F.linear(x, a), b) * self.scale).to(y.dtype)
        if len(self.sizes) == 1:
            return y + added[0]
        pieces = list(y.unflatten(-1, (self.groups, -1)).split(self.sizes, -1))
        for number, one in added.items():
            pieces[number] = pieces[number] + one.unflatten(-1, (self.groups, -1))
        return torch.cat(pieces, -1).flatten(-2)

    def delta(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What these parameters add to a weight [out, in], float32."""
        products = {}
        for number, name in self.pieces.items():
            a, b = (self.factor(parameters[f"{name}_{letter}"].float()) for letter in "AB")
            products[number] = b @ a * self.scale
        if len(self.sizes) == 1:
            return products[0]
        some = next(iter(products.values()))
        rows = [
            products[number].view(self.groups, size, -1)
            if number in products
            else some.new_zeros(self.groups, size, some.shape[1])
            for number, size in enumerate(self.sizes)
        ]
        return torch.cat(rows, 1).flatten(0, 1)


class InWeight(Added):
    """An update whose parameters are the layer's own: ZeRO-3 gathers them when the layer is called."""

    def __init__(self, method: str, update: Update):
        super().__init__(method)
        self.update = update  # for its formula: it is never called

    def delta(self, module: nn.Module) -> Tensor:
        """As in Added."""
        return self.update.delta({name: self.parameter(module, name) for name in self.names})


class Joined:
    """An update at its layer.

    Args:
        method: names the module or the parameters that the layer gets; a number follows where it is taken.
    """

    def __init__(self, layer: Layer, update: Update, method: str):
        self.layer, self.update = layer, update
        self.change: InWeight | None = None
        self.hook: Any = None
        if not layer.called:
            self.change = InWeight(method, update)
            add_change(layer.module, layer.leaf, self.change, dict(update.named_parameters()))
            return
        number, self.leaf = 1, method
        while hasattr(layer.module, self.leaf):
            number += 1
            self.leaf = f"{method}_{number}"
        layer.module.add_module(self.leaf, update)
        self.hook = layer.module.register_forward_hook(_hook(self.leaf))

    def set_active(self, active: bool) -> None:
        """Let it act or not."""
        self.update.active = active
        if self.change is not None:
            self.change.active = active

    @torch.no_grad()
    def merge(self) -> None:
        """Add it to the base's own weight, and take it off.

        Raises:
            UserError: a mask lies on the weight, and must be merged before.
        """
        layer = self.layer
        if self.change is not None:
            merge_change(layer.module, layer.leaf, self.change)
            return
        check_first(layer.module, layer.leaf)
        delta = self.update.delta(dict(self.update.named_parameters()))
        layer.weight.copy_(layer.weight.float() + (delta.t() if layer.transposed else delta))
        self.hook.remove()
        delattr(layer.module, self.leaf)


def _hook(leaf: str) -> Any:
    """A hook that finds its update by name: a copy of the layer then calls its own."""

    def added(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        update = getattr(module, leaf)
        return update(inputs[0], output) if update.active else None

    return added


def check_rank(method: str, r: object, lora_alpha: object, alpha_ranks: float = 2.0) -> tuple[int, float]:
    """(r, lora_alpha / r), where lora_alpha is `alpha_ranks` times r by default.

    Raises:
        UserError: no whole number from 1, or no number.
    """
    if not isinstance(r, int) or isinstance(r, bool) or r < 1:
        raise UserError(f"adapt: {method}'s r is a whole number from 1, not {r!r}")
    alpha = alpha_ranks * r if lora_alpha is None else lora_alpha
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise UserError(f"adapt: {method}'s lora_alpha is a number above 0, not {alpha!r}")
    return r, alpha / r


def check_dropout(method: str, dropout: object) -> float:
    """A share from 0 to below 1.

    Raises:
        UserError: anything else.
    """
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise UserError(f"adapt: {method}'s lora_dropout is a number from 0 to below 1, not {dropout!r}")
    return float(dropout)


def check_droppable(method: str, dropout: float, layers: Sequence[Layer]) -> None:
    """Raise UserError where input should be dropped and a layer's weight is all that can be changed."""
    whole = [layer for layer in layers if not layer.called]
    if dropout and whole:
        raise UserError(
            f"adapt: '{whole[0].name}' is multiplied by its whole weight at once, so {method} cannot drop "
            "some of its input: leave lora_dropout out"
        )
