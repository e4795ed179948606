"""The perceiver resampler of Flamingo: a fixed number of learned latents read the features.

Alayrac et al. 2022, arXiv 2204.14198, figure 5. Knows latents and cross-attention; knows nothing about
where features come from. There are no time embeddings: an image is one frame.

Shapes: K latents, W width inside, H heads of E channels, S = P + K keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_adapt.connectors.connector import Connector, positive
from vlm_adapt.connectors.packed import PackedFeatures, padded
from vlm_adapt.image_spec import TokenCount


class ResamplerBlock(nn.Module):
    """Latents attend to features and latents together, then pass a feed-forward; both residual."""

    def __init__(self, width: int, heads: int, head_width: int, expansion: int):
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm_features = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, inner, bias=False)
        self.to_key_value = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, expansion * width, bias=False),
            nn.GELU(),
            nn.Linear(expansion * width, width, bias=False),
        )

    def forward(self, features_NPW: Tensor, latents_NKW: Tensor, taken_NP: Tensor | None = None) -> Tensor:
        """features_NPW and latents_NKW to new latents_NKW; `taken_NP` is False at padding."""
        normed_NKW = self.norm_latents(latents_NKW)
        media_NSW = torch.cat([self.norm_features(features_NPW), normed_NKW], dim=1)
        query_NHKE = self._split(self.to_query(normed_NKW))
        key_NHSE, value_NHSE = map(self._split, self.to_key_value(media_NSW).chunk(2, dim=-1))
        mask = None
        if taken_NP is not None:
            mask = F.pad(taken_NP, (0, latents_NKW.shape[1]), value=True)[:, None, None]
        mixed_NHKE = F.scaled_dot_product_attention(query_NHKE, key_NHSE, value_NHSE, attn_mask=mask)
        latents_NKW = latents_NKW + self.to_out(mixed_NHKE.transpose(1, 2).flatten(2))
        return latents_NKW + self.feed_forward(latents_NKW)

    def _split(self, x_NTI: Tensor) -> Tensor:
        return x_NTI.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ResamplerConnector(Connector):
    """`latents` tokens an image, whatever the resolution.

    Args:
        latents: K (Flamingo 64).
        depth: how many blocks (Flamingo 6).
        heads, head_width: of the attention (8 of 64).
        expansion: of the feed-forward (4).
        width: W inside; default the features' own V, else a Linear comes before.
    Parameters, with I = heads*head_width: K*W + depth*(6W + 4*W*I + 2*expansion*W^2) + 2W + W*D + D, and
    V*W + W if `width` is not V.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[tuple[int, int]],
        width_out: int,
        *,
        latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_width: int = 64,
        expansion: int = 4,
        width: int | None = None,
        **shared: Any,
    ):
        super().__init__(widths, grids, width_out, **shared)
        width = self.gather.width if width is None else width
        positive(
            latents=latents, depth=depth, heads=heads, head_width=head_width, expansion=expansion, width=width
        )
        self.tokens_per_image = latents
        self.project_in = None if width == self.gather.width else nn.Linear(self.gather.width, width)
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.blocks = nn.ModuleList(ResamplerBlock(width, heads, head_width, expansion) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.project_out = nn.Linear(width, width_out)

    @property
    def token_count(self) -> TokenCount:
        """K, whatever the image."""
        return TokenCount(fixed=self.tokens_per_image)

    def project_packed(self, features_TV: Tensor, images: PackedFeatures) -> Tensor:
        """K tokens an image, each image's latents reading its own patches."""
        return self.project(*padded(features_TV, images.lengths)).flatten(0, 1)

    def project(self, features_NPV: Tensor, taken_NP: Tensor | None = None) -> Tensor:
        """K tokens an image; `taken_NP` is False at padding."""
        features_NPW = features_NPV if self.project_in is None else self.project_in(features_NPV)
        latents_NKW = self.latents.expand(len(features_NPW), -1, -1)
        for block in self.blocks:
            latents_NKW = block(features_NPW, latents_NKW, taken_NP)
        return self.project_out(self.norm(latents_NKW))
