"""Tiny random promptable models, and transformers' SamModel with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

from vlm_adapt.config.models import Promptable as Config
from vlm_adapt.heads.sam import SamDecoder

SMALL = {"width": 32, "mlp_dim": 48, "num_attention_heads": 4}


def config(folder: Path, side: int = 64, **more: Any) -> Config:
    """A random ViT of 8 x 8 places and a random decoder, as a configuration."""
    if not (folder / "vit").exists():
        tiny.vit(folder / "vit", size=side, patch=8)
    vision = {"model": str(folder / "vit")}
    return Config.model_validate(
        {"kind": "promptable", "vision": vision, "decoder": {"weights": "random:", **SMALL}} | more
    )


def sam_model(decoder: SamDecoder, **vision: Any) -> Any:
    """transformers' SamModel of the decoder's sizes, holding its weights; its image encoder is random."""
    from transformers import SamConfig, SamModel

    settings = decoder.mask_decoder.config
    made = SamModel(
        SamConfig(
            vision_config={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": decoder.image_size,
                "patch_size": decoder.image_size // decoder.grid,
                "output_channels": decoder.width,
                "num_pos_feats": decoder.width // 2,
                "global_attn_indexes": [0],
            }
            | vision,
            prompt_encoder_config={
                "hidden_size": decoder.width,
                "image_size": decoder.image_size,
                "patch_size": decoder.image_size // decoder.grid,
            },
            mask_decoder_config={
                "hidden_size": decoder.width,
                "mlp_dim": settings.mlp_dim,
                "num_attention_heads": settings.num_attention_heads,
                "iou_head_hidden_dim": settings.iou_head_hidden_dim,
            },
        )
    ).eval()
    state = {name.replace(".made.", "."): value for name, value in decoder.state_dict().items()}
    matrix = state["prompt_encoder.shared_embedding.positional_embedding"]
    missing, extra = made.load_state_dict(
        state | {"shared_image_embedding.positional_embedding": matrix}, strict=False
    )
    assert not extra and all(name.startswith("vision_encoder.") for name in missing)
    return made


def in_sams_names(decoder: SamDecoder, neck: Any = None) -> dict[str, torch.Tensor]:
    """The weights under the names of SAM's own checkpoints, written out beside the table that reads them."""
    found = {}
    for name, tensor in decoder.state_dict().items():
        name = name.replace("prompt_encoder.shared_embedding.made.positional_embedding", "POSITIONS")
        name = name.replace("POSITIONS", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix")
        name = name.replace("encoder.point_embed.", "encoder.point_embeddings.")
        for number, part in enumerate(
            ("conv1", "layer_norm1", "GELU", "conv2", "layer_norm2", "GELU", "conv3")
        ):
            name = name.replace(f"mask_embed.{part}.", f"mask_downscaling.{number}.")
        for number, part in enumerate(("upscale_conv1", "upscale_layer_norm", "GELU", "upscale_conv2")):
            name = name.replace(f"mask_decoder.{part}.", f"mask_decoder.output_upscaling.{number}.")
        name = name.replace("layer_norm_final_attn", "norm_final_attn")
        if "transformer" in name:
            name = name.replace("layer_norm", "norm")
        if "hypernetworks" in name or "iou_prediction" in name:
            name = name.replace("layers.0.", "layers.1.").replace("proj_in.", "layers.0.")
            name = name.replace("proj_out.", "layers.2.")
        found[name] = tensor.contiguous()
    for number, part in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2")):
        for name, tensor in (neck.layers.state_dict() if neck is not None else {}).items():
            if name.startswith(part + "."):
                found[f"image_encoder.neck.{number}.{name.partition('.')[2]}"] = tensor.contiguous()
    return found
