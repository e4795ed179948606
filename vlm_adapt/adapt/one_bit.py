"""Weights of which one bit each is kept, with a mean and a deviation for the whole tensor.

z = (w - mean) / (deviation + 1e-5); each z becomes the centre of its half of a normal distribution, +-0.6745
(the quartile), and the weight is that times the deviation plus the mean. Gradients pass the rounding as if
it were not there (Jie et al. 2023, arXiv 2307.16867, section 3.3). Knows tensors and files of them; knows
nothing about adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm_adapt.adapt.adapters import as_weight
from vlm_adapt.adapt.method import read_tensors

CENTRE = 0.6744897501960817  # Phi^-1(3/4): the median of each half of a standard normal
EPSILON = 1e-5
BITS, STATISTICS = ".bits", ".mean_deviation"
LATENT = "latent.safetensors"


def statistics_of(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (unbiased, as in the paper's code) of all values."""
    return latent.mean(), latent.std()


def binarise(latent: Tensor) -> Tensor:
    """The weight that one bit a value leaves, with gradients straight through the rounding."""
    mean, deviation = statistics_of(latent)
    scores = (latent - mean) / (deviation + EPSILON)
    rounded = torch.where(scores > 0, CENTRE, -CENTRE)
    return (rounded + scores - scores.detach()) * deviation + mean


def pack(latent: Tensor) -> tuple[Tensor, Tensor]:
    """(bits as uint8 [ceil(n / 8)], the first in the lowest place; mean and deviation as float32 [2])."""
    latent = latent.detach().float()
    mean, deviation = statistics_of(latent)
    signs = ((latent - mean) > 0).flatten().to(torch.uint8)
    signs = nn.functional.pad(signs, (0, -len(signs) % 8)).view(-1, 8)
    places = 2 ** torch.arange(8, dtype=torch.uint8)
    return (signs * places).sum(1, dtype=torch.uint8), torch.stack([mean, deviation])


def unpack(bits: Tensor, statistics: Tensor, shape: torch.Size) -> Tensor:
    """A float32 tensor of two values that `binarise` turns into the same weight as the one packed.

    With a share p of ones, m + s sqrt((1 - p) / p) and m - s sqrt(p / (1 - p)) have mean m and deviation s.
    """
    count = shape.numel()
    places = 2 ** torch.arange(8, dtype=torch.uint8)
    signs = (bits[:, None] & places).ne(0).flatten()[:count]
    mean, deviation = (float(value) for value in statistics)
    ones = int(signs.sum())
    if not 0 < ones < count:  # all values are one
        return torch.full(shape, mean)
    spread = deviation * ((count - 1) / count) ** 0.5
    high, low = mean + spread * ((count - ones) / ones) ** 0.5, mean - spread * (ones / (count - ones)) ** 0.5
    return torch.where(signs, high, low).view(shape)


def bytes_packed(parameters: Iterable[Tensor]) -> int:
    """ceil(n / 8) + 8 bytes for each tensor of n values."""
    counts = [int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in parameters]
    return sum((count + 7) // 8 + 8 for count in counts)


def save_packed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write bits, means and deviations."""
    packed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        packed[key + BITS], packed[key + STATISTICS] = pack(tensor)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(packed, path)


def read_packed(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors that stand for what `save_packed` wrote.

    Raises:
        UserError: as `read_tensors`.
    """
    keys = {key + end: tensor for key, tensor in expected.items() for end in (BITS, STATISTICS)}
    packed = read_tensors(path, keys)
    tensors = {}
    for key, tensor in expected.items():
        bits, shape = packed[key + BITS], torch.Size(getattr(tensor, "ds_shape", tensor.shape))
        # Of another size: hand it on as it is, and the reader names key and shapes.
        fits = len(bits) == (shape.numel() + 7) // 8
        tensors[key] = unpack(bits, packed[key + STATISTICS], shape) if fits else bits
    return tensors


class OneBitLinear(nn.Module):
    """x W^T with a one-bit W [O, I] and no bias."""

    def __init__(self, features_in: int, features_out: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features_out, features_in, device=device))

    def forward(self, x_I: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        weight_OI = binarise(self.weight)
        return nn.functional.linear(as_weight(x_I, weight_OI), weight_OI)
