"""EVA: LoRA's A begins at the main directions of what its layer reads (Paischer et al. 2024, 2410.07170).

Knows LoRA's layers and peft's incremental decomposition; knows nothing about where batches come from. Every
layer keeps its rank: moving ranks between layers by explained variance (rho above 1) is left to peft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

TAU = 0.99  # cosine of a direction before and after a batch from which it counts as found, as in peft


class Directions:
    """Watches what LoRA layers read while the model runs, padding included where a batch has any.

    Args:
        layers: peft's LoRA layers.
        adapter: whose A they are.
    """

    def __init__(self, layers: Sequence[Any], adapter: str):
        from peft.tuners.lora.eva import SVDHook

        self.layers, self.adapter = list(layers), adapter
        self.watchers = [
            SVDHook(layer.r[adapter], TAU, name=str(number), gather_distributed_inputs=False)
            for number, layer in enumerate(self.layers)
        ]
        self.handles = [
            layer.register_forward_pre_hook(lambda _, inputs, w=watcher: self._see(w, inputs[0]))
            for layer, watcher in zip(self.layers, self.watchers, strict=True)
        ]

    @staticmethod
    def _see(watcher: Any, inputs: torch.Tensor) -> None:
        flat_ND = inputs.detach().flatten(0, -2).float()
        if len(flat_ND) >= watcher.n_components and not watcher.converged.all():
            watcher(None, (flat_ND,), None)

    @property
    def done(self) -> bool:
        """Whether every direction has been found."""
        return all(bool(watcher.converged.all()) for watcher in self.watchers)

    @torch.no_grad()
    def finish(self) -> str:
        """Put the directions into every A, and say how it went."""
        for handle in self.handles:
            handle.remove()
        found = 0
        for layer, watcher in zip(self.layers, self.watchers, strict=True):
            if hasattr(watcher.svd, "components_"):
                weight = layer.lora_A[self.adapter].weight
                weight.copy_(watcher.svd.components_[: len(weight)].to(weight))
                found += bool(watcher.converged.all())
        return f"EVA: the directions of {found} of {len(self.layers)} layers were found"
