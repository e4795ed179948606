"""What is kept of a tensor until the backward pass: the largest values of each sample, and where they were.

    bytes = ceil(n / 8) + k * c      n values, k of them kept, c bytes each (Back Razor, Jiang et al. 2022)

Knows tensors; knows nothing about layers or training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
        values: of any shape.
        kept: True where a value is kept, of the same shape.
    """

    def __init__(self, values: Tensor, kept: Tensor):
        self.count, self.dtype = values.numel(), values.dtype
        self.values = values[kept]
        self.bits = pack_bits(kept.flatten())
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

    def keep(self, tensor: Tensor, samples: int, starts: Sequence[int] = ()) -> Saved:
        """Keep a floating-point tensor, the largest values of each of its samples.

        Args:
            samples: how many the outermost dimension goes over; what cannot be parted so is one sample.
            starts: where samples of different lengths begin and the last one ends, along the dimension
                before the last, in tensors that have as many places there.
        """
        if not is_dense(tensor):
            tensor = tensor.contiguous()
        storage = tensor.untyped_storage()
        count = tensor.numel()
        samples = samples if samples and outermost(tensor) % samples == 0 else 1
        apart = bool(starts) and tensor.ndim > 1 and tensor.shape[-2] == starts[-1] and tensor.is_contiguous()
        parted = len(starts) if apart else -samples
        key = (storage._cdata, tensor.storage_offset(), count, tensor.dtype, tensor._version, parted)
        found = self._known.get(key)
        if found is None or found.source is None or found.source.expired():
            if apart:
                values = tensor.flatten(0, -3) if tensor.ndim > 2 else tensor[None]
                kept = torch.zeros_like(values, dtype=torch.bool)
                for start, end in zip(starts, starts[1:], strict=False):
                    if end > start:
                        part = values[:, start:end]
                        flags = largest(part.reshape(1, -1), self.sparsity)
                        kept[:, start:end] = flags.view_as(part)
            else:
                values = tensor.as_strided((samples, count // samples), (count // samples, 1))
                kept = largest(values, self.sparsity)
            found = Sparse(values, kept)
            found.source = StorageWeakRef(storage)
            self._known[key] = found
        for watcher in WATCHERS:
            watcher(found)
        return Saved(found, tuple(tensor.shape), tensor.stride())


def kept_of(count: int, sparsity: float) -> int:
    """How many of `count` values are kept; at least one."""
    return max(1, count - math.floor(count * sparsity + 1e-9))  # 0.9 * 10 is a little below 9


def largest(values_SN: Tensor, sparsity: float) -> Tensor:
    """True at the values of each sample that are kept, those of the largest magnitude; of equals at any."""
    kept = kept_of(values_SN.shape[1], sparsity)
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
