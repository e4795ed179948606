"""What is kept of a tensor until the backward pass: the largest values of each sample, and where they were.

    bytes = ceil(n / 8) + k * c      n values, k of them kept, c bytes each (Back Razor, Jiang et al. 2022)

Knows tensors; knows nothing about layers or training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# Told of every tensor that is kept sparsely, so that saved bytes can be counted (`saved_memory`).
WATCHERS: list[Callable[[Sparse], None]] = []
_EIGHT = 0x0102040810204080  # times eight bytes of 0 or 1: the highest byte of the product holds their bits


class Sparse:
    """The values of a flat tensor that are kept, and one bit for each of its places.

    Args:
        values_SN: samples of N values each.
        sparsity: share of each sample's values that is dropped, the smallest absolute ones; of equals any.
    """

    def __init__(self, values_SN: Tensor, sparsity: float):
        samples, count = values_SN.shape
        self.count, self.dtype = samples * count, values_SN.dtype
        kept_SN = largest(values_SN, kept_of(count, sparsity))
        self.values = values_SN[kept_SN]
        self.bits = pack_bits(kept_SN.flatten())
        self.source: StorageWeakRef | None = None  # the memory it was made from, while that lives

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self.values.nbytes + self.bits.nbytes

    def dense(self) -> Tensor:
        """The flat tensor, 0 where nothing was kept."""
        full = torch.zeros(self.count, dtype=self.dtype, device=self.values.device)
        return full.masked_scatter_(unpack_bits(self.bits, self.count), self.values)


class Saved:
    """A saved tensor: its values, and the shape and strides it had."""

    def __init__(self, sparse: Sparse, size: tuple[int, ...], stride: tuple[int, ...]):
        self.sparse, self.size, self.stride = sparse, size, stride

    def tensor(self) -> Tensor:
        """What the backward pass computes with."""
        return self.sparse.dense().as_strided(self.size, self.stride)


class Keeper:
    """Keeps tensors sparsely; the same memory saved by several layers (x of q, k and v) is kept once.

    Args:
        sparsity: share of values dropped.
    """

    def __init__(self, sparsity: float):
        self.sparsity = sparsity
        self._known: WeakValueDictionary[tuple[Any, ...], Sparse] = WeakValueDictionary()

    def keep(self, tensor: Tensor, samples: int) -> Saved:
        """Keep a floating-point tensor whose outermost dimension goes over samples.

        Args:
            samples: how many; a tensor that cannot be parted so is one sample.
        """
        if not is_dense(tensor):
            tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        count = tensor.numel()
        samples = samples if samples and outermost(tensor) % samples == 0 else 1
        key = (storage._cdata, tensor.storage_offset(), count, tensor.dtype, tensor._version, samples)
        found = self._known.get(key)
        if found is None or found.source is None or found.source.expired():
            flat_SN = tensor.as_strided((samples, count // samples), (count // samples, 1))
            found = Sparse(flat_SN, self.sparsity)
            found.source = StorageWeakRef(storage)
            self._known[key] = found
        for watcher in WATCHERS:
            watcher(found)
        return Saved(found, tuple(tensor.shape), tensor.stride())


def kept_of(count: int, sparsity: float) -> int:
    """How many of `count` values are kept; at least one."""
    return max(1, count - math.floor(count * sparsity + 1e-9))  # 0.9 * 10 is a little below 9


def largest(values_SN: Tensor, kept: int) -> Tensor:
    """True at exactly `kept` values of each sample, those of the largest magnitude."""
    places_SK = values_SN.abs().topk(kept, dim=1, sorted=False).indices
    return torch.zeros_like(values_SN, dtype=torch.bool).scatter_(1, places_SK, True)


def pack_bits(flags_N: Tensor) -> Tensor:
    """Booleans [N] as bytes [ceil(N / 8)], the first flag in the lowest bit."""
    missing = -len(flags_N) % 8
    if missing:
        flags_N = torch.nn.functional.pad(flags_N, (0, missing))
    eights = flags_N.view(torch.uint8).view(torch.int64)
    return (eights * _EIGHT >> 56).to(torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The `count` booleans again."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> places & 1).bool().flatten()[:count]


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's values lie one after another in memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in _dimensions(tensor)):
        if stride != expected:
            return False
        expected *= size
    return True


def outermost(tensor: Tensor) -> int:
    """Size of the dimension with the largest stride, of a dense tensor."""
    return max(((stride, size) for size, stride in _dimensions(tensor)), default=(0, 1))[1]


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [(size, stride) for size, stride in pairs if size != 1]
