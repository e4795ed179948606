"""Towers from open_clip: the visual side of its CLIP models.

Knows open_clip; knows nothing about text encoders, connectors or training. Its own ViTs are run by
`forward_intermediates`; trunks that it takes from timm become TimmTowers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from open_clip.pretrained import get_pretrained_cfg
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.tensor_files import Source, read_state
from vlm_adapt.vision.loading import load_strictly, note_left_out, unreachable
from vlm_adapt.vision.timm import TimmTower
from vlm_adapt.vision.tower import Tower, check_image_size, taken

RESIZE = {"shortest": "crop", "squash": "squash", "longest": "pad"}


class OpenClipTower(Tower):
    """The ViT of an open_clip model as a tower.

    Args:
        visual: the visual tower, already at the size of `image_spec`; pooling and projection are taken off.
        final_norm: whether the last layer passes `ln_post`; None for what open_clip's own tokens have.
    """

    def __init__(self, visual: Any, image_spec: ImageSpec, final_norm: bool | None = None):
        blocks = visual.transformer.resblocks
        depth, width = len(blocks), visual.conv1.out_channels
        fits = visual.attn_pool is None
        if final_norm and not fits:
            raise UserError("this open_clip model pools before its final norm: leave final_norm out")
        super().__init__(
            image_spec,
            [width] * depth,
            [tuple(visual.grid_size)] * depth,
            [f"visual.transformer.resblocks.{index}" for index in range(depth)],
            range(depth),
        )
        self.final_norm = fits and not visual.final_ln_after_pool if final_norm is None else final_norm
        visual.proj, visual.attn_pool = None, None
        if not self.final_norm:
            visual.ln_post = nn.Identity()
        self.visual: Any = visual
        self.has_class_token = True

    def _features(self, pixels_NCHW: Tensor, layers: list[int], class_token: bool) -> dict[int, Tensor]:
        output = self.visual.forward_intermediates(
            pixels_NCHW,
            indices=layers,
            stop_early=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=class_token,
        )
        tokens = output["image_intermediates"]
        if class_token:
            before = output["image_intermediates_prefix"]
            tokens = [torch.cat(parts, dim=1) for parts in zip(before, tokens, strict=True)]
        patches = self.grid[0] * self.grid[1]
        found = {
            layer: taken(tokens_NTD, patches, class_token)
            for layer, tokens_NTD in zip(layers, tokens, strict=True)
        }
        if self.final_norm and self.depth - 1 in found:
            found[self.depth - 1] = self.visual.ln_post(found[self.depth - 1])
        return found

    def _last_layer_modules(self) -> list[str]:
        return ["visual.ln_post"] if self.final_norm else []

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in Tower, a block at a time."""
        self.visual.set_grad_checkpointing(enabled)


def build(
    name: str, source: Source, image_size: int | tuple[int, int] | None, final_norm: bool | None = None
) -> Tower:
    """A tower by open_clip's model name, `hf-hub:ORG/NAME` or `local-dir:FOLDER`."""
    local = name.startswith(("hf-hub:", "local-dir:"))
    if not local and name not in open_clip.list_models():
        raise UserError(f"open_clip has no model '{name}'{nearest(name, open_clip.list_models()) or '.'}")
    pretrained = source.value if source.kind == "hub" and not local else None
    if source.kind == "hub" and not local:
        _check_tag(name, source.value)
    if source.kind == "hub" and name.startswith("local-dir:"):
        _check_folder(Path(name.partition(":")[2]))
    own_size = _own_size(name)
    if image_size is not None and own_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        check_image_size(size, own_size[1], name)
    # A trunk of timm's is loaded at its own size and resized after; open_clip's ViT the other way round.
    resize_later = image_size is not None and source.kind == "file" and _has_timm_trunk(name)
    try:
        model: Any = open_clip.create_model(
            name,
            pretrained=pretrained,
            load_weights=source.kind == "hub",
            require_pretrained=source.kind == "hub",
            pretrained_text=False,
            force_image_size=None if resize_later else image_size,
            device=torch.get_default_device(),
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise unreachable(f"open_clip:{name}", error) from error
    settings = dict(open_clip.get_model_preprocess_cfg(model))
    if source.kind != "hub" and not local:
        settings.update(_usual_preprocessing(name))
    visual: Any = model.visual
    notes: list[str] = []
    if source.kind == "file":
        notes = _load_visual(model, source.path)
    if resize_later:
        visual.set_input_size(image_size)
        settings["size"] = image_size
    size = settings["size"]
    spec = ImageSpec(
        (size, size) if isinstance(size, int) else tuple(size),
        settings["mean"],
        settings["std"],
        RESIZE[settings["resize_mode"]],
        "bilinear" if settings["interpolation"] == "bilinear" else "bicubic",
    )
    if isinstance(visual, TimmModel):
        tower: Tower = TimmTower(visual.trunk, spec, final_norm is not False)
    elif isinstance(visual, VisionTransformer):
        tower = OpenClipTower(visual, spec, final_norm)
    else:
        raise UserError(f"open_clip's '{name}' has a {type(visual).__name__} for eyes: choose one with a ViT")
    tower.notes += notes
    return tower


def _load_visual(model: Any, path: Path) -> list[str]:
    """Load the visual side from a file of the whole model, or of the visual side alone."""
    state = read_state(path)
    visual = {name: value for name, value in state.items() if name.startswith("visual.")}
    others = sorted(set(state) - set(visual)) if visual else []
    visual = visual or {f"visual.{name}": value for name, value in state.items()}
    resize_pos_embed(visual, model)
    own = {name.removeprefix("visual."): value for name, value in visual.items()}
    load_strictly(model.visual, own, str(path))
    return note_left_out(str(path), others)


def _has_timm_trunk(name: str) -> bool:
    return "timm_model_name" in (open_clip.get_model_config(name) or {}).get("vision_cfg", {})


def _own_size(name: str) -> tuple[int, tuple[int, int]] | None:
    """(image size, patch size) of a built-in or local model with open_clip's own ViT, else None."""
    if name.startswith("hf-hub:"):
        return None
    vision = (open_clip.get_model_config(name) or {}).get("vision_cfg", {})
    patch = vision.get("patch_size", 16)
    if "timm_model_name" in vision or isinstance(vision.get("layers"), list):
        return None
    return vision.get("image_size", 224), (patch, patch) if isinstance(patch, int) else tuple(patch)


def _usual_preprocessing(name: str) -> dict[str, Any]:
    """How images are prepared for the weights that open_clip knows of a built-in model.

    The library says so for a tag only; of a SigLIP from a file it would assume CLIP's statistics.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = get_pretrained_cfg(name, tags[0]) if tags else {}
    return {key: known[key] for key in ("mean", "std", "interpolation", "resize_mode") if known.get(key)}


def _check_tag(name: str, tag: str) -> None:
    known = open_clip.list_pretrained_tags_by_model(name)
    if tag not in known:
        asked = f"has no weights '{tag}'" if tag else "needs the name of its weights"
        raise UserError(
            f"open_clip's '{name}' {asked}{nearest(tag, known) or ':'} "
            f"say weights: hub:TAG with one of {', '.join(known) or 'none'}"
        )


def _check_folder(folder: Path) -> None:
    if not any([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pt")]):
        raise UserError(f"'{folder}' holds no weights: say weights: random: to start from none")
