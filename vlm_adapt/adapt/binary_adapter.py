"""Bi-AdaptFormer: adapters whose weights are stored with one bit each.

Knows places of a block and one-bit layers; knows nothing about architectures.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from vlm_adapt.adapt.bottleneck import AdaptFormer
from vlm_adapt.adapt.one_bit import OneBitFiles, OneBitLinear


class BinaryAdapter(AdaptFormer, OneBitFiles):
    """MLP(LN2 x) + scale Up(relu(Down x)) as AdaptFormer, x the stream before LN2, with one-bit weights.

    Without biases. One bit cannot say 0, so the start is near the identity and not at it.
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
    bottleneck = 32
    scale = 1.0

    def __init__(
        self,
        bottleneck: int | None = None,
        activation: str | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__(bottleneck, activation, scale, dropout)  # norms have no one-bit form

    def layers(self, width: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """Down as torch's Linear, Up normal with deviation 0.001, cut off at 0.002, as the paper's code."""
        down = OneBitLinear(width, self.bottleneck, device)
        up = OneBitLinear(self.bottleneck, width, device)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.trunc_normal_(up.weight, std=0.001, a=-0.002, b=0.002)
        return down, up
