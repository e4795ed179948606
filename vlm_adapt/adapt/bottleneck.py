"""Bottleneck adapters: Houlsby's, Pfeiffer's, the parallel one, and AdaptFormer's.

All add scale * Up(activation(Down x)) to a sublayer's output, 2db + b + d parameters each with width d and
bottleneck b; they differ in where, in what x is, and in their defaults. Up is 0 at the start. Other kinds of
layers inside (one bit, Kronecker products) are a subclass's `layers`. Knows places of a block; knows nothing
about architectures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.adapters import ACTIVATIONS, Adapters, Inserted, as_weight
from vlm_adapt.adapt.anatomy import Anatomy


class Bottleneck(Inserted):
    """scale * Up(activation(Down x)), whatever layers Down and Up are."""

    def __init__(
        self,
        down: nn.Module,
        up: nn.Module,
        activation: str,
        scale: float = 1.0,
        dropout: float = 0.0,
        channels_first: bool = False,
    ):
        super().__init__(channels_first)
        self.down, self.up, self.scale = down, up, scale
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)

    def forward(self, x_D: Tensor) -> Tensor:
        """[..., D] to what is added, [..., D]."""
        added_D: Tensor = self.up(self.dropout(self.activation(self.down(x_D))))
        return added_D * self.scale


class CastingLinear(nn.Linear):
    """torch's Linear, which takes its input in the dtype of its weight."""

    def forward(self, x_I: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return super().forward(as_weight(x_I, self.weight))


class BottleneckAdapters(Adapters):
    """Adapters made of bottlenecks; without an `insert` of its own, one after each place of `needs`."""

    def layers(self, width: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """Down and Up: Down uniform as torch's Linear (kaiming, a = sqrt 5), the rest 0."""
        down = CastingLinear(width, self.bottleneck, device=device)
        up = CastingLinear(self.bottleneck, width, device=device)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        return down, up

    def make(self, found: Anatomy, device: torch.device) -> Bottleneck:
        """One bottleneck for the width of a block."""
        down, up = self.layers(found.width, device)
        return Bottleneck(down, up, self.activation, self.scale, self.dropout, found.channels_first)

    def insert(self, found: Anatomy, device: torch.device) -> dict[str, nn.Module]:
        """After each of `needs`."""
        modules: dict[str, nn.Module] = {}
        for need in self.needs:
            adapter = self.make(found, device)
            if need != "mlp_end":
                adapter.channels_first = False  # only feed-forwards are convolutions
            adapter.follow(getattr(found, need))
            modules[need.removesuffix("_end")] = adapter
        return modules


class Houlsby(BottleneckAdapters):
    """h + Up(activation(Down h)), h the output of attention and of the feed-forward before the residual.

    In a decoder with cross-attention that has none, as in Karimi Mahabadi et al. 2021. In the paper the
    LayerNorms train too: `layer_norms: true`. Without, 2 (2db + b + d) parameters a block.

    Args: see `Adapters`.
    """

    name = "houlsby"
    summary = "bottleneck adapters after attention and feed-forward"
    paper = "Houlsby et al. 2019, arXiv 1902.00751"
    sides = ("vision", "connector", "language")
    example = {"bottleneck": 4}  # noqa: RUF012
    needs = ("attention_end", "mlp_end")
    activation = "gelu"


class Pfeiffer(BottleneckAdapters):
    """h + Up(activation(Down h)), h the output of the feed-forward before the residual is added.

    Args: see `Adapters`.
    """

    name = "pfeiffer"
    summary = "bottleneck adapters after the feed-forward alone"
    paper = "Pfeiffer et al. 2021, arXiv 2005.00247"
    sides = ("vision", "connector", "language")
    example = {"bottleneck": 4}  # noqa: RUF012


class ParallelAdapter(BottleneckAdapters):
    """FFN(x) + 4 Up(relu(Down x)), x the feed-forward's own (normed) input.

    Args: see `Adapters`.
    """

    name = "parallel_adapter"
    summary = "bottleneck adapters in parallel to the feed-forward, scaled by 4"
    paper = "He et al. 2022, arXiv 2110.04366"
    sides = ("vision", "connector", "language")
    example = {"bottleneck": 4}  # noqa: RUF012
    scale = 4.0

    def insert(self, found: Anatomy, device: torch.device) -> dict[str, nn.Module]:
        """Beside the feed-forward."""
        mlp = self.make(found, device)
        assert found.mlp_start is not None and found.mlp_end is not None
        mlp.accompany(found.mlp_start, found.mlp_end)
        return {"mlp": mlp}


class AdaptFormer(BottleneckAdapters):
    """MLP(LN2 x) + 0.1 Up(relu(Down x)), x the residual stream before LN2.

    Where the feed-forward reads the stream without a norm, x is its input.

    Args: see `Adapters`; the paper's code has dropout 0.1.
    """

    name = "adaptformer"
    summary = "bottleneck adapters in parallel to norm and feed-forward, scaled by 0.1"
    paper = "Chen et al. 2022, arXiv 2205.13535"
    sides = ("vision", "connector", "language")
    example = {"bottleneck": 4}  # noqa: RUF012
    scale = 0.1

    def insert(self, found: Anatomy, device: torch.device) -> dict[str, nn.Module]:
        """Beside the norm and the feed-forward."""
        mlp = self.make(found, device)
        start = found.mlp_norm or found.mlp_start
        assert start is not None and found.mlp_end is not None
        mlp.accompany(start, found.mlp_end)
        return {"mlp": mlp}
