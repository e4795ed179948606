"""Numbers of one bit: eight to a byte in a file, and weights that take two values only.

A weight w with mean m and deviation s becomes m + s * c * sign(w - m), c = 0.6745 being the median of the
absolute value of a standard normal: the centres of the two halves of the z-scores (Jie et al. 2023,
Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy, section 3).
Knows tensors; knows nothing about methods.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

CENTRE = 0.6744897501960817  # the standard normal's quantile at 3/4
EPSILON = 1e-5  # as in the authors' code: of the z-score, and so of the gradient alone


def pack(flags: Tensor) -> Tensor:
    """Booleans of any shape to uint8 [ceil(n / 8)], the first in the highest bit."""
    return torch.from_numpy(np.packbits(flags.detach().flatten().cpu().numpy().astype(bool)))


def unpack(packed: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The booleans again, in their shape."""
    flags = np.unpackbits(packed.cpu().numpy(), count=math.prod(shape))
    return torch.from_numpy(flags.astype(bool)).view(tuple(shape))


def bytes_of(count: int) -> int:
    """Bytes that `count` bits take."""
    return -(-count // 8)


def binarised(w: Tensor) -> Tensor:
    """w with one of two values in each place; the gradient goes through the rounding as if it were not there.

    It goes through mean and deviation too, as in the authors' code.
    """
    mean, deviation = w.mean(), w.std()
    score = (w - mean) / (deviation + EPSILON)
    rounded = torch.where(score >= 0, CENTRE, -CENTRE)
    return (rounded.detach() + score - score.detach()) * deviation + mean


def statistics(w: Tensor) -> Tensor:
    """Mean and deviation of a weight, [2], float32: what a file keeps beside its signs."""
    return torch.stack([w.mean(), w.std()]).float()


def latent(flags: Tensor, given: Tensor) -> Tensor:
    """A weight of these signs, mean and deviation, so that `binarised` gives what was saved.

    Two values will do: with p places above the mean and q below, mean + a and mean - b with p a = q b. When
    all signs are equal the deviation was 0.
    """
    mean, deviation = (float(value) for value in given)
    count, above = flags.numel(), int(flags.sum())
    below = count - above
    if not above or not below:
        return torch.full(flags.shape, mean)
    width = deviation * math.sqrt((count - 1) / count)
    up, down = width * math.sqrt(below / above), width * math.sqrt(above / below)
    return torch.where(flags, mean + up, mean - down).float()
