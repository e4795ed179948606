"""How much a forward pass keeps for the backward pass: every tensor that autograd saves, each memory once.

Knows autograd's saved tensors; knows nothing about methods or models. What activation checkpointing keeps
(the inputs of blocks) is not seen: torch saves it in another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.sparse_saved import WATCHERS, Sparse


class SavedMemory:
    """What was saved within `saved_bytes`.

    Attributes:
        dense: bytes of tensors that were saved as they are.
        sparse: bytes of those that Back Razor keeps.
        tensors: the dense ones, held so that none's memory is taken for another's.
    """

    def __init__(self, besides: nn.Module | None):
        own = [*besides.parameters(), *besides.buffers()] if besides is not None else []
        self._storages = {tensor.untyped_storage()._cdata for tensor in own}
        self._sparse: dict[int, Sparse] = {}
        self.dense = 0
        self.tensors: list[Tensor] = []

    @property
    def sparse(self) -> int:
        """Bytes that Back Razor keeps."""
        return sum(kept.nbytes for kept in self._sparse.values())

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.dense + self.sparse

    def see(self, tensor: Tensor) -> Tensor:
        """Count a tensor's memory unless it was counted, or is a weight."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages.add(storage._cdata)
            self.dense += storage.nbytes()
            self.tensors.append(tensor)
        return tensor

    def see_sparse(self, kept: Sparse) -> None:
        """Count a sparse tensor once."""
        self._sparse[id(kept)] = kept


@contextmanager
def saved_bytes(besides: nn.Module | None = None) -> Iterator[SavedMemory]:
    """Count what is saved for the backward pass within.

    Args:
        besides: a model whose parameters and buffers are not counted.

    Example:
        with saved_bytes(model) as saved:
            loss = model(batch)
        print(saved.bytes)
    """
    saved = SavedMemory(besides)
    WATCHERS.append(saved.see_sparse)
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.see, lambda tensor: tensor):
            yield saved
    finally:
        WATCHERS.remove(saved.see_sparse)
