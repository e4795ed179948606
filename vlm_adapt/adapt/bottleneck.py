"""Bottleneck adapters: Houlsby's, Pfeiffer's, the parallel one, and AdaptFormer's.

All add scale * Up(activation(Down x)) to a sublayer's output, 2db + b + d parameters each with width d and
bottleneck b; they differ in where, and in what x is. Up is 0 at the start. Knows places of a block; knows
nothing about architectures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.adapters import ACTIVATIONS, Adapters, Inserted, as_weight
from vlm_adapt.adapt.anatomy import Anatomy


class Bottleneck(Inserted):
    """scale * Up(activation(Down x)): Down uniform as torch's Linear (kaiming, a = sqrt 5), the rest 0."""

    def __init__(
        self,
        width: int,
        bottleneck: int,
        activation: str,
        scale: float,
        dropout: float,
        channels_first: bool,
        device: torch.device,
    ):
        super().__init__(channels_first)
        self.down = nn.Linear(width, bottleneck, device=device)
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, width, device=device)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_D: Tensor) -> Tensor:
        """[..., D] to what is added, [..., D]."""
        inner_B = self.dropout(self.activation(self.down(as_weight(x_D, self.down.weight))))
        return self.up(as_weight(inner_B, self.up.weight)) * self.scale


class BottleneckAdapters(Adapters):
    """Adapters made of bottlenecks."""

    def make(self, found: Anatomy, device: torch.device) -> Bottleneck:
        """One bottleneck for the width of a block."""
        return Bottleneck(
            found.width,
            self.bottleneck,
            self.activation,
            self.scale,
            self.dropout,
            found.channels_first,
            device,
        )


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

    def __init__(
        self,
        bottleneck: int = 64,
        activation: str = "gelu",
        scale: float = 1.0,
        dropout: float = 0.0,
        layer_norms: bool = False,
    ):
        super().__init__(bottleneck, activation, scale, dropout, layer_norms)

    def insert(self, found: Anatomy, device: torch.device) -> dict[str, nn.Module]:
        """After both sublayers."""
        attention, mlp = self.make(found, device), self.make(found, device)
        assert found.attention_end is not None and found.mlp_end is not None
        attention.channels_first = False  # only feed-forwards are convolutions
        attention.follow(found.attention_end)
        mlp.follow(found.mlp_end)
        return {"attention": attention, "mlp": mlp}


class Pfeiffer(BottleneckAdapters):
    """h + Up(activation(Down h)), h the output of the feed-forward before the residual is added.

    Args: see `Adapters`.
    """

    name = "pfeiffer"
    summary = "bottleneck adapters after the feed-forward alone"
    paper = "Pfeiffer et al. 2021, arXiv 2005.00247"
    sides = ("vision", "connector", "language")
    example = {"bottleneck": 4}  # noqa: RUF012

    def __init__(
        self,
        bottleneck: int = 64,
        activation: str = "relu",
        scale: float = 1.0,
        dropout: float = 0.0,
        layer_norms: bool = False,
    ):
        super().__init__(bottleneck, activation, scale, dropout, layer_norms)

    def insert(self, found: Anatomy, device: torch.device) -> dict[str, nn.Module]:
        """After the feed-forward."""
        mlp = self.make(found, device)
        assert found.mlp_end is not None
        mlp.follow(found.mlp_end)
        return {"mlp": mlp}


class ParallelAdapter(BottleneckAdapters):
    """FFN(x) + 4 Up(relu(Down x)), x the feed-forward's own (normed) input.

    Args: see `Adapters`.
    """

    name = "parallel_adapter"
    summary = "bottleneck adapters in parallel to the feed-forward, scaled by 4"
    paper = "He et al. 2022, arXiv 2110.04366"
    sides = ("vision", "connector", "language")
    example = {"bottleneck": 4}  # noqa: RUF012
    needs = ("mlp_end",)

    def __init__(
        self,
        bottleneck: int = 64,
        activation: str = "relu",
        scale: float = 4.0,
        dropout: float = 0.0,
        layer_norms: bool = False,
    ):
        super().__init__(bottleneck, activation, scale, dropout, layer_norms)

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
    needs = ("mlp_end",)

    def __init__(
        self,
        bottleneck: int = 64,
        activation: str = "relu",
        scale: float = 0.1,
        dropout: float = 0.0,
        layer_norms: bool = False,
    ):
        super().__init__(bottleneck, activation, scale, dropout, layer_norms)

    def insert(self, found: Anatomy, device: torch.device) -> dict[str, nn.Module]:
        """Beside the norm and the feed-forward."""
        mlp = self.make(found, device)
        start = found.mlp_norm or found.mlp_start
        assert start is not None and found.mlp_end is not None
        mlp.accompany(start, found.mlp_end)
        return {"mlp": mlp}
