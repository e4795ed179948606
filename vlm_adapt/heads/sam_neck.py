"""The neck of SAM's image encoder: from a tower's last map to the embedding that masks are decoded from.

Knows transformers' SamVisionNeck (1x1 convolution, LayerNorm over channels, 3x3 convolution, LayerNorm; no
biases in the convolutions); knows no tower, no prompts and no files.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.sam.configuration_sam import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionNeck

from vlm_adapt.errors import UserError


class SamNeck(nn.Module):
    """Tokens of a square grid to an image embedding (Kirillov et al. 2023, arXiv 2304.02643, app. A).

    Args:
        width: channels of the tower's layer.
        grid: (rows, columns) of that layer.
        channels: of the embedding.

    Raises:
        UserError: a grid that is not square.
    """

    def __init__(self, width: int, grid: tuple[int, int], channels: int = 256):
        super().__init__()
        if grid[0] != grid[1]:
            raise UserError(
                f"SAM's neck needs square images: the tower's map has {grid[0]} x {grid[1]} places; "
                "give image_size as one number"
            )
        self.grid, self.channels = grid, channels
        self.layers: Any = SamVisionNeck(SamVisionConfig(hidden_size=width, output_channels=channels))

    def forward(self, features_NPD: Tensor) -> Tensor:
        """features_NPD, row after row, to an embedding `[N, channels, rows, columns]`."""
        features_NhwD = features_NPD.unflatten(1, self.grid)
        found: Tensor = self.layers(features_NhwD)
        return found
