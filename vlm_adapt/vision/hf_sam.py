"""SAM's own image encoder as a tower: a plain ViT with windows, as transformers has it (`SamVisionModel`).

Knows that one model; knows nothing about prompts or masks. Its neck is no part of the tower: it belongs to
what decodes masks (heads/sam_neck.py). Features are the blocks' outputs (Kirillov et al. 2023, arXiv
2304.02643).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.vision.tower import Tower


class _Positions(nn.Module):
    """Holds the encoder's positions and is called, so that ZeRO-3 gathers them: the encoder never is."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden_NhwD: Tensor) -> Tensor:
        return hidden_NhwD + self.weight


class SamTower(Tower):
    """transformers' SamVisionModel as a tower.

    Args:
        model: its positions are interpolated to the size of `image_spec`; those inside the attention of
            global blocks interpolate themselves.
        final_norm: not used: SAM has no norm behind its last block.
    """

    def __init__(self, model: Any, image_spec: ImageSpec, final_norm: bool | None = None):
        config, encoder = model.config, model.vision_encoder
        grid = (image_spec.size[0] // config.patch_size, image_spec.size[1] // config.patch_size)
        depth = len(encoder.layers)
        super().__init__(
            image_spec,
            [config.hidden_size] * depth,
            [grid] * depth,
            [f"model.vision_encoder.layers.{index}" for index in range(depth)],
            list(range(depth)),
        )
        self.model: Any = model
        self.checkpointing = False
        encoder.neck = nn.Identity()
        encoder.patch_embed.image_size = image_spec.size
        if encoder.pos_embed is not None and tuple(encoder.pos_embed.shape[1:3]) != grid:
            positions = functional.interpolate(
                encoder.pos_embed.detach().permute(0, 3, 1, 2), grid, mode="bicubic", antialias=True
            )
            encoder.pos_embed = nn.Parameter(positions.permute(0, 2, 3, 1).contiguous())
        self.positions = None if encoder.pos_embed is None else _Positions(encoder.pos_embed)

    def _features(self, pixels_NCHW: Tensor, layers: list[int], class_token: bool) -> dict[int, Tensor]:
        encoder = self.model.vision_encoder
        hidden_NhwD = encoder.patch_embed(pixels_NCHW)
        if self.positions is not None:
            hidden_NhwD = self.positions(hidden_NhwD)
        found: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks[: layers[-1] + 1]):
            if self.checkpointing and torch.is_grad_enabled():
                hidden_NhwD = checkpoint(block, hidden_NhwD, use_reentrant=False)
            else:
                hidden_NhwD = block(hidden_NhwD)
            if index in layers:
                found[index] = hidden_NhwD.flatten(1, 2)
        return found

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in Tower, a block at a time."""
        self.checkpointing = enabled
