"""Weights of SAM's neck, prompt encoder and mask decoder, from any file that holds them.

Knows SAM's own names (facebook's and MobileSAM's checkpoints, the package's `sam_decoder.safetensors`) and
transformers' (a folder saved by SamModel); knows nothing about packages, hubs and towers. Opens no pickle
that holds more than tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm_adapt.errors import UserError

DECODER_FILE = "sam_decoder.safetensors"
POSITIONS = "prompt_encoder.shared_embedding.made.positional_embedding"
# From SAM's names to transformers'; the first that fits counts, and what none fits keeps its name.
_RULES = (
    (r"^image_encoder\.neck\.0\.", "neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "neck.layer_norm2."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", POSITIONS),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^(mask_decoder\.transformer\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    # transformers' own
    (r"^vision_encoder\.neck\.", "neck."),
    (r"^shared_image_embedding\.positional_embedding$", POSITIONS),
    (r"^prompt_encoder\.shared_embedding\.positional_embedding$", POSITIONS),
)
_HEADS = r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.(\d+)\."


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of neck, prompt encoder and decoder by transformers' names; the image encoder is left out.

    Args:
        state: by SAM's own names or by transformers'.
    """
    ours = any(name.startswith("prompt_encoder.point_embeddings.") for name in state)
    depths: dict[str, int] = {}  # of the small networks: SAM numbers the first and last layer, too
    for name in state:
        found = re.match(_HEADS, name) if ours else None
        if found:
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]))
    result = {}
    for name, tensor in state.items():
        if ours and (found := re.match(_HEADS, name)):
            number, last = int(found[2]), depths[found[1]]
            layer = {0: "proj_in", last: "proj_out"}.get(number, f"layers.{number - 1}")
            name = f"{found[1]}.{layer}.{name[found.end() :]}"
        else:
            for pattern, replacement in _RULES:
                if re.match(pattern, name):
                    name = re.sub(pattern, replacement, name)
                    break
        if name.startswith(("neck.", "prompt_encoder.", "mask_decoder.")):
            result[name] = tensor
    return result


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by transformers' names, and the settings that a folder tells of itself.

    Args:
        path: a file (safetensors, or plain tensors), a package's folder, or one saved by SamModel.

    Raises:
        UserError: nothing there, nothing readable, or no SAM.
    """
    state: dict[str, Tensor] = {}
    for file in _files(path):
        state |= _tensors(file)
    tensors = renamed(state)
    if not any(name.startswith("mask_decoder.") for name in tensors):
        raise UserError(
            f"'{path}' holds no mask decoder of SAM: give package:mobile-sam-tinyvit, a checkpoint of SAM or "
            "a folder of transformers' SamModel"
        )
    return tensors, _settings(path)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / DECODER_FILE).is_file():
        return [path / DECODER_FILE]
    found = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    found = found or sorted([*path.glob("*.pth"), *path.glob("*.pt")])[:1]
    if not found:
        raise UserError(f"the folder '{path}' holds no weights of SAM: give another, or a file")
    return found


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"'{file}' is no readable weight file ({error}): fetch it again") from error
    except Exception as error:  # what pickle raises for anything but tensors: such a file is never run
        raise UserError(f"'{file}' holds more than plain tensors: convert it to safetensors") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"'{file}' is no dictionary of tensors: save the model's state_dict")
    return state


def _settings(path: Path) -> dict[str, Any]:
    """What the configuration of a SamModel says that differs from SAM's own."""
    from transformers.models.sam.configuration_sam import SamMaskDecoderConfig

    from vlm_adapt.heads.sam import SETTINGS

    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read ({error}): save the model again") from error
    decoder, prompts = config.get("mask_decoder_config") or {}, config.get("prompt_encoder_config") or {}
    if not decoder:
        return {}
    plain = SamMaskDecoderConfig(**{k: v for k, v in decoder.items() if k in (*SETTINGS, "hidden_size")})
    found = {name: getattr(plain, name) for name in SETTINGS}
    found["width"] = plain.hidden_size
    return found | {k: prompts[k] for k in ("mask_input_channels",) if k in prompts}


def load(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str, where: str) -> None:
    """Copy every tensor of `module` from those whose names begin with `prefix`.

    Raises:
        UserError: one is missing, too many, or of another shape, all listed.
    """
    own = module.state_dict()
    given = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    missing, extra = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    shapes = [
        f"{name} is {tuple(given[name].shape)} where {tuple(own[name].shape)} is needed"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    wrong = [
        f"{len(names)} {what} ({', '.join(names[:4])}{' ...' if len(names) > 4 else ''})"
        for what, names in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
        if names
    ]
    if wrong:
        raise UserError(f"the weights in '{where}' do not fit SAM's {prefix or 'decoder '}{'; '.join(wrong)}")
    module.load_state_dict(given, strict=True)
