"""What the tests of LoRA on chosen projections share: a part that is one attention, and the formula."""

from __future__ import annotations

from typing import Any

import timm
import tiny
import torch
from torch import Tensor, nn

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.qkv_lora import QkvLora

CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # float32: sums of 32 terms of size 1, in two orders


class Part(nn.Module):
    """A part that is one attention, in one block."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attn = attention


def on(part: nn.Module, where: str = "vision", seed: int = 0, **settings: Any) -> QkvLora:
    """Attached, trainable and moved from its start."""
    part.requires_grad_(False)
    method = QkvLora(**({"r": 4, "lora_alpha": 6} | settings))
    method.attach(Place(where, part))
    torch.manual_seed(seed)
    for parameter in method.parameters.values():
        parameter.requires_grad_(True)
        parameter.data.normal_(0, 0.3)
    return method


def update(method: QkvLora, key: str, x: Tensor) -> Tensor:
    """(lora_alpha / r) B A x of a projection."""
    a, b = (method.parameters[f"{key}.lora_{side}"] for side in "AB")
    return 1.5 * x @ a.T @ b.T


def vit() -> Any:
    kind = timm.models.vision_transformer.VisionTransformer
    return tiny.seeded(lambda _: kind(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4), None)
