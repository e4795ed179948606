"""Bi-AdaptFormer: adapters whose weights are stored with one bit each.

Knows places of a block and one-bit layers; knows nothing about architectures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.adapters import ACTIVATIONS, Adapters, Inserted
from vlm_adapt.adapt.anatomy import Anatomy
from vlm_adapt.adapt.one_bit import OneBitFiles, OneBitLinear


class OneBitBottleneck(Inserted):
    """scale * Up(relu(Down x)), both of one bit and without bias.

    Down starts as torch's Linear, Up normal with deviation 0.001, cut off at 0.002, as in the paper's code:
    one bit cannot say 0, so the start is near the identity and not at it.
    """

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
        self.down = OneBitLinear(width, bottleneck, device)
        self.activation, self.dropout = ACTIVATIONS[activation](), nn.Dropout(dropout)
        self.up = OneBitLinear(bottleneck, width, device)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.trunc_normal_(self.up.weight, std=0.001, a=-0.002, b=0.002)

    def forward(self, x_D: Tensor) -> Tensor:
        """[..., D] to what is added, [..., D]."""
        return self.up(self.dropout(self.activation(self.down(x_D)))) * self.scale


class BinaryAdapter(Adapters, OneBitFiles):
    """MLP(LN2 x) + scale Up(relu(Down x)) as AdaptFormer, x the stream before LN2, with one-bit weights.

    2 (d b / 8 + 8) bytes a block: 73,920 for a ViT-B with b = 32. The floats behind the bits are written
    only beside a checkpoint, to go on training.

    Args: see `Adapters`; the paper chooses the scale among 0.01, 0.1, 1 and 10, and has dropout 0.1.
    """

    name = "binary_adapter"
    summary = "AdaptFormer with weights of one bit each (Bi-AdaptFormer)"
    paper = "Jie et al. 2023, arXiv 2307.16867"
    sides = ("vision", "connector", "language")
    identity = False
    example = {"bottleneck": 4}  # noqa: RUF012
    needs = ("mlp_end",)

    def __init__(
        self, bottleneck: int = 32, activation: str = "relu", scale: float = 1.0, dropout: float = 0.0
    ):
        super().__init__(bottleneck, activation, scale, dropout)

    def insert(self, found: Anatomy, device: torch.device) -> dict[str, nn.Module]:
        """Beside the norm and the feed-forward."""
        mlp = OneBitBottleneck(
            found.width,
            self.bottleneck,
            self.activation,
            self.scale,
            self.dropout,
            found.channels_first,
            device,
        )
        start = found.mlp_norm or found.mlp_start
        assert start is not None and found.mlp_end is not None
        mlp.accompany(start, found.mlp_end)
        return {"mlp": mlp}
