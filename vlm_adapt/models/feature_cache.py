"""Features of a frozen tower, computed once for each image and kept.

Knows pixels and features; knows nothing about towers. For stages that see the same images again and
again while the tower is frozen: the tower is then most of the work, and always the same work.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlm_adapt.connectors.packed import PackedFeatures
from vlm_adapt.data.patches import Patches


class FeatureCache:
    """Keeps the features of the last `size` images, by their pixels.

    Args:
        size: images kept; the oldest leave first.
    """

    def __init__(self, size: int):
        self.size = size
        self.kept: OrderedDict[bytes, Any] = OrderedDict()

    def __call__(self, compute: Callable[[Any], Any], images: Tensor | Patches) -> Any:
        """What `compute` gives for the images; it is asked for those that are not kept."""
        packed = isinstance(images, Patches)
        names = (
            images.names()
            if isinstance(images, Patches)
            else [hashlib.blake2b(one.numpy(), digest_size=16).digest() for one in images.cpu().contiguous()]
        )
        missing = {name: place for place, name in enumerate(names) if name not in self.kept}
        found = {name: self.kept[name] for name in names if name in self.kept}
        if missing:
            places = list(missing.values())
            with torch.no_grad():
                features = compute(images.select(places) if isinstance(images, Patches) else images[places])
            for place, name in enumerate(missing):
                one: Any
                if packed:
                    one = features.select([place])
                else:
                    one = [layer[place].clone() for layer in features]
                found[name] = self.kept[name] = one
        while len(self.kept) > self.size:
            self.kept.popitem(last=False)
        shown = [found[name] for name in names]
        if not packed:
            return [torch.stack(layer) for layer in zip(*shown, strict=True)]
        return PackedFeatures(
            [torch.cat(layer) for layer in zip(*(one.layers for one in shown), strict=True)],
            [grid for one in shown for grid in one.grids],
            [length for one in shown for length in one.lengths],
        )
