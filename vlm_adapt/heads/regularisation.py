"""LSeg's spatial regularisation: blocks that smooth each label's map of logits by one small kernel.

Li et al. 2022, arXiv 2201.03546, section 3.3 (there "spatial regularization blocks"). Depthwise:
act(conv(x)); bottleneck: act(conv(x) + the maximum of x over labels). One 3 x 3 convolution from one channel
to one serves all labels, so a block knows neither their number nor their order: 10 parameters. A block is
repeated `depth` times with the same weights; nothing follows the last convolution. Knows logits; knows
nothing about labels or embeddings.

    N images, L labels, h x w pixels of the map
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

KINDS = ("depthwise", "bottleneck")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "lrelu": lambda x: F.leaky_relu(x, 0.01),
    "tanh": torch.tanh,
}


class Kernel(nn.Module):
    """The weights that all blocks share. Called, it hands out copies that stay where a partitioned
    parameter (ZeRO-3) is taken back after the call."""

    def __init__(self) -> None:
        super().__init__()
        bound = 1 / math.sqrt(9)  # torch's own start of such a convolution
        self.weight = nn.Parameter(torch.empty(1, 1, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound))

    def forward(self) -> tuple[Tensor, Tensor]:
        """weight [1, 1, 3, 3] and bias [1] in float32."""
        return self.weight.float().clone(), self.bias.float().clone()


@dataclass(frozen=True)
class Blocks:
    """Regularisation with its weights in hand: a function of the logits and of these tensors.

    Attributes:
        weight, bias: of the convolution.
        depth: how many blocks, which is also how many pixels away a pixel has influence.
        bottleneck: whether the maximum over labels is added.
        activation: between two blocks.
    """

    weight: Tensor
    bias: Tensor
    depth: int
    bottleneck: bool
    activation: Callable[[Tensor], Tensor]

    def __call__(self, logits_NLhw: Tensor) -> Tensor:
        """logits_NLhw to logits_NLhw."""
        # One group a label: with labels as a batch of one channel it takes thirty times as long on a CPU.
        labels = logits_NLhw.shape[1]
        weight = self.weight.to(logits_NLhw.dtype).expand(labels, 1, 3, 3)
        bias = self.bias.to(logits_NLhw.dtype).expand(labels)
        for number in range(self.depth):
            mixed_NLhw = F.conv2d(logits_NLhw, weight, bias, padding=1, groups=labels)
            if self.bottleneck:
                mixed_NLhw = mixed_NLhw + logits_NLhw.amax(1, keepdim=True)
            logits_NLhw = mixed_NLhw if number == self.depth - 1 else self.activation(mixed_NLhw)
        return logits_NLhw


class Regularisation(nn.Module):
    """Spatial regularisation blocks.

    Args:
        kind: `depthwise` or `bottleneck`.
        depth: how many blocks, from 1.
        activation: `relu`, `lrelu` (leaky, 0.01) or `tanh`.
    Raises:
        UserError: another kind, depth or activation.
    Names in the state dict: `kernel.weight`, `kernel.bias`.
    """

    def __init__(self, kind: str, depth: int = 1, activation: str = "lrelu"):
        super().__init__()
        if kind not in KINDS:
            raise UserError(
                f"head.regularisation is none, {' or '.join(KINDS)}, not '{kind}'{nearest(kind, KINDS)}"
            )
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise UserError(f"head.regularisation_depth is a whole number from 1, not {depth!r}")
        if activation not in ACTIVATIONS:
            raise UserError(
                f"head.regularisation_activation is one of {', '.join(ACTIVATIONS)}, not '{activation}'"
                f"{nearest(activation, ACTIVATIONS)}"
            )
        self.kind, self.depth, self.activation = kind, depth, activation
        self.kernel = Kernel()

    def blocks(self) -> Blocks:
        """The blocks with their weights in hand, for any number of maps: one call of the kernel."""
        weight, bias = self.kernel()
        return Blocks(weight, bias, self.depth, self.kind == "bottleneck", ACTIVATIONS[self.activation])

    def forward(self, logits_NLhw: Tensor) -> Tensor:
        """logits_NLhw to logits_NLhw."""
        return self.blocks()(logits_NLhw)
