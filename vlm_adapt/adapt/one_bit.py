"""What methods with one-bit weights have in common: a layer, and files of bits with the floats beside them.

Trained are floats; a file keeps of each tensor the signs of its z-scores, its mean and its deviation
(adapt/bits.py). Knows tensors and files; knows nothing about where layers are put.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.adapters import as_weight
from vlm_adapt.adapt.bits import binarised, bytes_of, latent, pack, statistics
from vlm_adapt.adapt.method import Gathered, Method, read_tensors
from vlm_adapt.adapt.piggyback import LATENT, count_of, save_floats, unpack_checked

STATISTICS = ".mean_and_deviation"


class OneBitFiles(Method):
    """A method all of whose parameters are stored with one bit a number."""

    def save(self, folder: Path, tensors: Gathered) -> None:
        """Signs packed in uint8; mean and deviation of each tensor in float32."""
        written = {key: pack(tensor >= tensor.mean()) for key, tensor in tensors.items()}
        written |= {key + STATISTICS: statistics(tensor) for key, tensor in tensors.items()}
        super().save(folder, written)

    def save_latent(self, folder: Path, tensors: Gathered) -> None:
        """The floats, to go on training."""
        save_floats(folder, tensors)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The floats where they are, else others that give the same weights.

        Raises:
            UserError: as in Method, or another number of bits.
        """
        if (folder / LATENT).is_file():
            return read_tensors(folder / LATENT, self.parameters)
        path = folder / self.file_name
        expected = dict(self.parameters) | {key + STATISTICS: p for key, p in self.parameters.items()}
        written = read_tensors(path, expected)
        return {
            key: latent(unpack_checked(path, key, written[key], parameter), written[key + STATISTICS])
            for key, parameter in self.parameters.items()
        }

    def bytes_stored(self) -> int:
        """Of each tensor an eighth of a byte a number, and two floats."""
        return sum(bytes_of(count_of(parameter)) + 8 for parameter in self.parameters.values())


class OneBitLinear(nn.Module):
    """x W^T with a one-bit W [O, I] and no bias; the caller fills `weight`."""

    def __init__(self, features_in: int, features_out: int, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features_out, features_in, device=device))

    def forward(self, x_I: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        weight_OI = binarised(self.weight)
        return nn.functional.linear(as_weight(x_I, weight_OI), weight_OI)
