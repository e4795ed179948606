"""From a head's channels to pixels' embeddings, or to something smaller that gives the same cosines.

An embedding is e = W f + b of C channels f, and only its cosines with labels are ever wanted:

    cos(e, t) = (t W f + t b) / |e|        |e|^2 = g G g,  g = [f; 1],  G = [W b]^T [W b]

So g / |e|, of C + 1 numbers, stands for a pixel and [W b]^T t for a label: at 64 channels and 384 numbers an
embedding a sixth of the memory and of the products. Exact but for rounding. Knows nothing about heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 1e-12  # of |e|^2, so that a pixel without an embedding has no direction and no infinite gradient


class PixelProjection(nn.Conv2d):
    """A 1 x 1 convolution, whose weights are used in its own forward alone (ZeRO-3 gathers them there).

    N images, C channels in, E of an embedding, h x w places
    """

    def __init__(self, channels: int, embedding_size: int):
        super().__init__(channels, embedding_size, 1)

    @property
    def saves(self) -> bool:
        """Whether `compact` is smaller."""
        return self.in_channels + 1 < self.out_channels

    def forward(self, maps_NChw: Tensor | None, compact: bool = False) -> Any:
        """Embeddings_NEhw, not normalised; or, if `compact`, (pixels_NBhw, basis_EB), float32.

        A pixel's cosine with labels_LE of length 1 is pixels_NBhw . (labels_LE basis_EB). Without maps only
        the basis is given.
        """
        if maps_NChw is None:
            return self._basis()
        if not compact:
            return super().forward(maps_NChw)
        basis_EB = self._basis()
        if not self.saves:
            return F.normalize(super().forward(maps_NChw).float(), dim=1), basis_EB
        with torch.autocast(maps_NChw.device.type, enabled=False):
            pixels_NBhw = F.pad(maps_NChw.float(), (0, 0, 0, 0, 0, 1), value=1.0)
            gram_BB = basis_EB.T @ basis_EB
            turned_NBP = gram_BB @ pixels_NBhw.flatten(2)  # torch's convolution of odd channels is slow
            squares_N1hw = (turned_NBP.view_as(pixels_NBhw) * pixels_NBhw).sum(1, keepdim=True)
            return pixels_NBhw * squares_N1hw.clamp(min=SMALLEST).rsqrt(), basis_EB

    def _basis(self) -> Tensor:
        """[W b], a tensor of its own; or 1 where `compact` gives whole embeddings."""
        assert self.bias is not None
        if not self.saves:
            return torch.eye(self.out_channels, device=self.weight.device)
        return torch.cat([self.weight.flatten(1), self.bias[:, None]], 1).float()
