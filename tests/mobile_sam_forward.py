"""MobileSAM's image encoder, restated from its publication as plain functions over its own weights.

For tests: timm's TinyViT with our stride and neck is held against it. Names are timm's, as the package has
them; the order of operations is MobileSAM's (Zhang et al. 2023, arXiv 2306.14289).
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

DEPTHS, HEADS, WINDOWS = (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)


class MobileSam:
    """The encoder of a state dict, with its neck."""

    def __init__(self, state: dict[str, Tensor], neck: dict[str, Tensor]):
        self.state, self.neck_state = state, neck

    def conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight = self.state[f"{name}.conv.weight"]
        x = functional.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        norm = [self.state[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *norm, training=False, eps=1e-5)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def layer_norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return functional.layer_norm(x, weight.shape, weight, self.state[f"{name}.bias"], 1e-5)

    def inverted(self, x: Tensor, name: str) -> Tensor:
        wide = functional.gelu(self.conv(x, f"{name}.conv1"))
        wide = functional.gelu(self.conv(wide, f"{name}.conv2", groups=wide.shape[1]))
        return functional.gelu(x + self.conv(wide, f"{name}.conv3"))

    def merging(self, x: Tensor, name: str) -> Tensor:
        x = functional.gelu(self.conv(x, f"{name}.conv1"))
        stride = 1 if x.shape[1] == 320 else 2  # MobileSAM's one change
        x = functional.gelu(self.conv(x, f"{name}.conv2", stride, x.shape[1]))
        return self.conv(x, f"{name}.conv3")

    def attention(self, windows: Tensor, name: str, heads: int, side: int) -> Tensor:
        number, tokens, width = windows.shape
        places = list(product(range(side), range(side)))
        offsets: dict[tuple[int, int], int] = {}
        index = []
        for one in places:
            for two in places:
                offset = abs(one[0] - two[0]), abs(one[1] - two[1])
                index.append(offsets.setdefault(offset, len(offsets)))
        x = self.layer_norm(windows, f"{name}.norm")
        query, key, value = (
            part.permute(0, 2, 1, 3)
            for part in self.linear(x, f"{name}.qkv").view(number, tokens, heads, -1).split(width // heads, 3)
        )
        bias = self.state[f"{name}.attention_biases"][:, index].view(heads, tokens, tokens)
        weights = (query @ key.transpose(-2, -1) * (width // heads) ** -0.5 + bias).softmax(-1)
        return self.linear((weights @ value).transpose(1, 2).reshape(number, tokens, width), f"{name}.proj")

    def block(self, x: Tensor, name: str, heads: int, side: int) -> Tensor:
        batch, width, height, wide = x.shape
        tokens = x.permute(0, 2, 3, 1)
        padded = functional.pad(tokens, (0, 0, 0, -wide % side, 0, -height % side))
        rows, columns = padded.shape[1] // side, padded.shape[2] // side
        windows = padded.view(batch, rows, side, columns, side, width).transpose(2, 3)
        seen = self.attention(windows.reshape(-1, side * side, width), f"{name}.attn", heads, side)
        seen = seen.view(batch, rows, columns, side, side, width).transpose(2, 3)
        seen = seen.reshape(batch, rows * side, columns * side, width)[:, :height, :wide]
        x = self.conv((tokens + seen).permute(0, 3, 1, 2), f"{name}.local_conv", groups=width)
        tokens = x.permute(0, 2, 3, 1)
        inner = self.linear(self.layer_norm(tokens, f"{name}.mlp.norm"), f"{name}.mlp.fc1")
        return (tokens + self.linear(functional.gelu(inner), f"{name}.mlp.fc2")).permute(0, 3, 1, 2)

    def stages(self, pixels: Tensor) -> list[Tensor]:
        """Maps behind each stage."""
        x = self.conv(functional.gelu(self.conv(pixels, "patch_embed.conv1", 2)), "patch_embed.conv2", 2)
        maps = []
        for stage, (depth, heads, side) in enumerate(zip(DEPTHS, HEADS, WINDOWS, strict=True)):
            if stage:
                x = self.merging(x, f"stages.{stage}.downsample")
            for number in range(depth):
                name = f"stages.{stage}.blocks.{number}"
                x = self.block(x, name, heads, side) if stage else self.inverted(x, name)
            maps.append(x)
        return maps

    def channel_norm(self, x: Tensor, number: int) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).square().mean(1, keepdim=True) + 1e-6)
        weight, bias = (self.neck_state[f"image_encoder.neck.{number}.{part}"] for part in ("weight", "bias"))
        return x * weight[:, None, None] + bias[:, None, None]

    def embedding(self, pixels: Tensor) -> Tensor:
        """What masks are decoded from."""
        x = functional.conv2d(self.stages(pixels)[-1], self.neck_state["image_encoder.neck.0.weight"])
        x = self.channel_norm(x, 1)
        x = functional.conv2d(x, self.neck_state["image_encoder.neck.2.weight"], padding=1)
        return self.channel_norm(x, 3)
