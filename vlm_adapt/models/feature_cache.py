"""Features of a frozen tower, computed once for each image and kept.

Knows pixels and features; knows nothing about towers. For stages that see the same images again and
again while the tower is frozen: the tower is then most of the work, and always the same work.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


class FeatureCache:
    """Keeps the features of the last `size` images, by their pixels.

    Args:
        size: images kept; the oldest leave first.
    """

    def __init__(self, size: int):
        self.size = size
        self.kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    def __call__(self, compute: Callable[[Tensor], list[Tensor]], pixels_NCHW: Tensor) -> list[Tensor]:
        """features_NPD of each layer; `compute` is asked for the images that are not kept."""
        names = [hashlib.blake2b(one.numpy(), digest_size=16).digest() for one in pixels_NCHW.cpu()]
        missing = {name: place for place, name in enumerate(names) if name not in self.kept}
        found = {name: self.kept[name] for name in names if name in self.kept}
        if missing:
            with torch.no_grad():
                features = compute(pixels_NCHW[list(missing.values())])
            for place, name in enumerate(missing):
                found[name] = self.kept[name] = [layer[place].clone() for layer in features]
        while len(self.kept) > self.size:
            self.kept.popitem(last=False)
        return [torch.stack(layer) for layer in zip(*(found[name] for name in names), strict=True)]
