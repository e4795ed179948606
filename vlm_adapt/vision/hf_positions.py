"""Learned position embeddings of transformers' towers, brought to another size of image once.

Knows how the library keeps and interpolates them, and what of it takes squares alone; knows
no blocks.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def interpolate_positions(model: Any, size: tuple[int, int]) -> None:
    """Replace the position embeddings by the library's own interpolation to `size`, once and in float32.

    transformers would do it in every forward, some of it in the weights' own (half) precision, and by
    reading a child's weight, which ZeRO-3 may hold elsewhere just then.
    """
    embeddings = model.embeddings
    patch = model.config.patch_size
    patches: int = (size[0] // patch) * (size[1] // patch)
    holder = getattr(embeddings, "position_embedding", None)  # CLIP, SigLIP: an nn.Embedding
    values_PD: Any = getattr(embeddings, "position_embeddings", None)  # ViT, DINOv2: a parameter
    if not hasattr(embeddings, "interpolate_pos_encoding"):
        return  # rotary (DINOv3), or interpolated from the grid by itself (SigLIP 2)
    held = holder.num_embeddings if isinstance(holder, nn.Embedding) else values_PD.shape[1]
    side = int(held**0.5)
    prefix = held - side**2
    if (size[0] // patch, size[1] // patch) == (
        side,
        side,
    ):  # 2 x 8 has the patches of 4 x 4, and other places
        return
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        embeddings.float()
        shape = (1, patches + prefix, model.config.hidden_size)
        values_1TD = embeddings.interpolate_pos_encoding(torch.zeros(shape), *size).clone()
        if isinstance(holder, nn.Embedding):
            embeddings.position_embedding = nn.Embedding.from_pretrained(values_1TD[0], freeze=False)
            embeddings.position_ids = torch.arange(patches + prefix)[None]
            embeddings.num_positions, embeddings.num_patches = patches + prefix, patches
            embeddings.image_size = size[0]
            if size[0] != size[1] and isinstance(getattr(embeddings, "class_embedding", None), nn.Parameter):
                embeddings.forward = MethodType(_clip_embeddings, embeddings)
        else:
            embeddings.position_embeddings = nn.Parameter(values_1TD)
            if size[0] != size[1]:  # DINOv2 asks in every forward, and would take the new places for a square
                embeddings.interpolate_pos_encoding = MethodType(_positions_as_they_are, embeddings)
            embeddings.image_size = size
            embeddings.patch_embeddings.image_size = size
            embeddings.patch_embeddings.num_patches = patches
        embeddings.to(dtype)


def _clip_embeddings(embeddings: Any, pixels_NCHW: Tensor) -> Tensor:
    """CLIP's embeddings of an oblong image, which the library's own forward refuses without interpolation."""
    patches_NPD = embeddings.patch_embedding(pixels_NCHW).flatten(2).transpose(1, 2)
    token_N1D = embeddings.class_embedding.expand(len(pixels_NCHW), 1, -1)
    return torch.cat([token_N1D, patches_NPD], dim=1) + embeddings.position_embedding(embeddings.position_ids)


def _positions_as_they_are(embeddings: Any, *_: Any) -> Tensor:
    return embeddings.position_embeddings
