"""LoRA on convolutions, as its authors' own library defines it (peft's is another one).

Of a k x k convolution from `in` to `out` channels in g groups, the weight's update is (B A), of shape
[out/g*k, in*k], read as the weight's own shape [out, in/g, k, k], times lora_alpha / r; A is [r*k, in*k] and
starts random, B is [out/g*k, r*k] and starts zero: r k^2 (in + out/g) parameters. Knows convolutions;
knows nothing about encoders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.linear_layers import CONVOLUTION, Layer, find_layers
from vlm_adapt.adapt.low_rank import check_rank
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.weight_change import Added, add_change, merge_change
from vlm_adapt.errors import UserError


class ConvolutionUpdate(Added):
    """(B A) read as the weight's shape, times a scale."""

    def __init__(self, shape: tuple[int, ...], scale: float):
        super().__init__("conv_lora")
        self.shape, self.scale = shape, scale

    def delta(self, module: nn.Module) -> Tensor:
        """[out, in/g, k, k], float32."""
        a, b = self.parameter(module, "A"), self.parameter(module, "B")
        return (b.float() @ a.float()).view(self.shape) * self.scale


class ConvLora(Method):
    """LoRA on convolutions.

    A grouped convolution's weight is small already: on a depthwise one the update has more parameters
    than the weight, as in the library that defines it. Name the others by `target_modules`.

    Args:
        r: rank for each of the k rows of a filter.
        lora_alpha: the update is scaled by lora_alpha / r; 2 r by default.
        target_modules: `all-conv` (stem and patch embedding included, unless `blocks` are named), a name,
            or a list of names.

    Raises:
        UserError: bad numbers, no such layer, or filters that are not square.
    """

    name = "conv_lora"
    summary = "low-rank updates of convolutions, as loralib defines them"
    paper = "Hu et al. 2021, arXiv 2106.09685, and its library loralib"
    sides = ("vision",)
    order = 1
    mergeable = True
    example = {"r": 2}

    def __init__(
        self, r: int = 8, lora_alpha: float | None = None, target_modules: str | Sequence[str] = "all-conv"
    ):
        super().__init__()
        self.r, self.scale = check_rank(self.name, r, lora_alpha)
        self.targets = target_modules
        self.changes: list[tuple[Layer, ConvolutionUpdate]] = []

    def attach(self, place: Place) -> None:
        """Put A and B beside each chosen convolution's weight."""
        self.part = place.part
        layers = find_layers(place, self.name, self.targets, CONVOLUTION)
        for layer in layers:
            _check_square(layer)
        for layer in layers:
            convolution = layer.module
            assert isinstance(convolution, nn.Conv2d)
            k, within, out = convolution.kernel_size[0], convolution.in_channels, convolution.out_channels
            a = nn.Parameter(torch.empty(self.r * k, within * k, device=place.device))
            b = nn.Parameter(torch.zeros(out // convolution.groups * k, self.r * k, device=place.device))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            change = ConvolutionUpdate((out, within // convolution.groups, k, k), self.scale)
            add_change(convolution, layer.leaf, change, {"A": a, "B": b})
            self.changes.append((layer, change))
            self.parameters |= {f"{layer.name}.lora_A": a, f"{layer.name}.lora_B": b}

    def set_active(self, active: bool) -> None:
        """As in Method."""
        super().set_active(active)
        for _, change in self.changes:
            change.active = active

    def merge(self) -> None:
        """Add the updates to the weights; the layers are plain convolutions again."""
        for layer, change in self.changes:
            merge_change(layer.module, layer.leaf, change)
        self.changes, self.parameters = [], {}


def _check_square(layer: Layer) -> None:
    size = layer.module.kernel_size
    if len(set(size)) > 1:  # type: ignore[arg-type]
        raise UserError(
            f"adapt: conv_lora needs square filters, and '{layer.name}' has {size[0]} x {size[1]}: "  # type: ignore[index]
            "name the others in target_modules"
        )
