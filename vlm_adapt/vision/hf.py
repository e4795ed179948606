"""Towers from transformers: CLIP, SigLIP, SigLIP 2, ViT, DINOv2, DINOv3, and any other AutoModel of images.

Knows transformers' vision models; knows nothing about connectors or training. For the families of the
table below the blocks are run here, so that none runs after the deepest layer wanted; any other model is
run whole (`WholeModelTower`). Layer i is the output of block i, which transformers calls hidden_states[i+1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.tensor_files import Source
from vlm_adapt.vision.hf_load import image_spec_of, load_model
from vlm_adapt.vision.hf_positions import interpolate_positions
from vlm_adapt.vision.hf_sam import SamTower
from vlm_adapt.vision.tower import Tower, check_image_size, mend_batch_norms, taken

Grid = tuple[int, int]
Embedded = tuple[Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """How a family's model is laid out.

    Args:
        blocks, norm: names of the list of blocks and of the norm after the last.
        normed: whether the library's last_hidden_state has passed that norm.
        embed: (model, pixels, grid) to the first block's input and the blocks' keyword arguments.
    """

    blocks: str
    norm: str
    normed: bool
    embed: Callable[[Any, Tensor, Grid], Embedded]


def _embed_plain(model: Any, pixels_NCHW: Tensor, grid: Grid) -> Embedded:
    return model.embeddings(pixels_NCHW), {}


def _embed_clip(model: Any, pixels_NCHW: Tensor, grid: Grid) -> Embedded:
    return model.pre_layrnorm(model.embeddings(pixels_NCHW)), {"attention_mask": None}


def _embed_siglip(model: Any, pixels_NCHW: Tensor, grid: Grid) -> Embedded:
    return model.embeddings(pixels_NCHW), {"attention_mask": None}


def _embed_siglip2(model: Any, pixels_NCHW: Tensor, grid: Grid) -> Embedded:
    # It takes patches already cut, each as (row, column, channel), and the grid they came from.
    batch, channels, height, width = pixels_NCHW.shape
    rows, columns = grid
    cut = pixels_NCHW.reshape(batch, channels, rows, height // rows, columns, width // columns)
    patches_NPV = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    shapes_N2 = torch.tensor([grid] * batch)  # on the CPU: the library reads it as numbers
    return model.embeddings(patches_NPV, shapes_N2), {"attention_mask": None}


def _embed_dinov3(model: Any, pixels_NCHW: Tensor, grid: Grid) -> Embedded:
    return model.embeddings(pixels_NCHW), {"position_embeddings": model.rope_embeddings(pixels_NCHW)}


FAMILIES = {
    "clip_vision_model": Family("encoder.layers", "post_layernorm", False, _embed_clip),
    "siglip_vision_model": Family("encoder.layers", "post_layernorm", True, _embed_siglip),
    "siglip2_vision_model": Family("encoder.layers", "post_layernorm", True, _embed_siglip2),
    "vit": Family("layers", "layernorm", True, _embed_plain),
    "dinov2": Family("encoder.layer", "layernorm", True, _embed_plain),
    "dinov2_with_registers": Family("encoder.layer", "layernorm", True, _embed_plain),
    "dinov3_vit": Family("model.layer", "norm", True, _embed_dinov3),
}


class HFTower(Tower):
    """A model of one of FAMILIES as a tower.

    Args:
        model: the vision model, its positions already fitting `image_spec`.
        family: its layout.
        final_norm: whether the last layer passes the final norm; None for what last_hidden_state has
            (SigLIP, ViT and DINO do, CLIP does not).
    """

    def __init__(self, model: Any, family: Family, image_spec: ImageSpec, final_norm: bool | None = None):
        blocks = model.get_submodule(family.blocks)
        patch = model.config.patch_size
        grid = (image_spec.size[0] // patch, image_spec.size[1] // patch)
        depth = len(blocks)
        super().__init__(
            image_spec,
            [model.config.hidden_size] * depth,
            [grid] * depth,
            [f"model.{family.blocks}.{index}" for index in range(depth)],
            list(range(depth)),
        )
        self.model: Any = model
        self.family = family
        self.final_norm = family.normed if final_norm is None else final_norm
        self.checkpointing = False
        self.has_class_token = _class_token(model)
        # What no feature passes through would never get a gradient.
        for name in ("head", "pooler", *(() if self.final_norm else (family.norm,))):
            if isinstance(getattr(model, name, None), nn.Module):
                setattr(model, name, nn.Identity())
        if isinstance(getattr(model.embeddings, "mask_token", None), nn.Parameter):
            model.embeddings.mask_token = None  # for masked pretraining only

    def _features(self, pixels_NCHW: Tensor, layers: list[int], class_token: bool) -> dict[int, Tensor]:
        hidden_NTD, arguments = self.family.embed(self.model, pixels_NCHW, self.grid)
        patches = self.grid[0] * self.grid[1]
        found: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks[: layers[-1] + 1]):
            if self.checkpointing and torch.is_grad_enabled():
                output = checkpoint(block, hidden_NTD, use_reentrant=False, **arguments)
            else:
                output = block(hidden_NTD, **arguments)
            hidden_NTD = output[0] if isinstance(output, tuple) else output
            if index in layers:
                found[index] = taken(hidden_NTD, patches, class_token)
        if self.final_norm and self.depth - 1 in found:
            found[self.depth - 1] = self.model.get_submodule(self.family.norm)(found[self.depth - 1])
        return found

    def _last_layer_modules(self) -> list[str]:
        return [f"model.{self.family.norm}"] if self.final_norm else []

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in Tower, a block at a time."""
        self.checkpointing = enabled


class WholeModelTower(Tower):
    """Any other image model of transformers, run whole with `output_hidden_states`.

    It saves no compute on shallow layers, and names no blocks unless it finds one list of them.
    """

    def __init__(self, model: Any, image_spec: ImageSpec, final_norm: bool | None = None):
        model.eval()
        mend_batch_norms(model)
        height, width = image_spec.size
        try:
            with torch.no_grad():
                maps = _hidden_states(model, torch.zeros(1, 3, height, width), final_norm)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{type(model).__name__} cannot look at images of {height} x {width} pixels ({error}): "
                "choose another image_size"
            ) from error
        names = [
            f"{name}.{index}"
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == len(maps)
            for index in range(len(module))
        ]
        names = names if len(names) == len(maps) else []
        grids = [_grid_of(features.shape, image_spec, model) for features in maps]
        widths = [features.shape[1] if features.ndim == 4 else features.shape[2] for features in maps]
        super().__init__(image_spec, widths, grids, [f"model.{name}" for name in names], range(len(names)))
        self.model: Any = model
        self.final_norm = final_norm
        tokens = all(
            features.ndim == 3 and features.shape[1] > rows * columns
            for features, (rows, columns) in zip(maps, grids, strict=True)
        )
        self.has_class_token = tokens and _class_token(model)

    def _features(self, pixels_NCHW: Tensor, layers: list[int], class_token: bool) -> dict[int, Tensor]:
        maps = _hidden_states(self.model, pixels_NCHW, self.final_norm)
        found = {}
        for layer in layers:
            features = maps[layer]
            if features.ndim == 4:
                found[layer] = features.flatten(2).transpose(1, 2)
            else:
                rows, columns = self._grids[layer]
                found[layer] = taken(features, rows * columns, class_token)
        return found

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in Tower, where transformers offers it.

        Raises:
            UserError: the model does not offer it.
        """
        if not self.model.supports_gradient_checkpointing:
            raise UserError(f"{type(self.model).__name__} has no activation checkpointing: switch it off")
        if enabled:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()


def _class_token(model: Any) -> bool:
    embeddings = getattr(model, "embeddings", None)
    return any(
        isinstance(getattr(embeddings, name, None), nn.Parameter) for name in ("cls_token", "class_embedding")
    )


def _hidden_states(model: Any, pixels_NCHW: Tensor, final_norm: bool | None) -> list[Tensor]:
    output = model(pixel_values=pixels_NCHW, output_hidden_states=True)
    maps = list(getattr(output, "reshaped_hidden_states", None) or output.hidden_states)[1:]
    last = output.last_hidden_state
    if final_norm is not False and last.shape == maps[-1].shape:
        maps[-1] = last
    return maps


def _grid_of(shape: torch.Size, image_spec: ImageSpec, model: Any) -> tuple[int, int]:
    if len(shape) == 4:
        return int(shape[2]), int(shape[3])
    patch = getattr(model.config, "patch_size", None)
    if isinstance(patch, int):
        rows, columns = image_spec.size[0] // patch, image_spec.size[1] // patch
        if rows * columns <= shape[1]:
            return rows, columns
    side = int(shape[1] ** 0.5)
    if side * side != shape[1]:
        raise UserError(f"{type(model).__name__} gives {shape[1]} tokens, which are no grid: choose another")
    return side, side


OWN: dict[str, Callable[[Any, ImageSpec, bool | None], Tower]] = {"sam_vision_model": SamTower}


def build(
    name: str, source: Source, image_size: int | tuple[int, int] | None, final_norm: bool | None = None
) -> Tower:
    """A tower by hub name or local folder; of a model with several sides only the vision side is loaded."""
    model, notes = load_model(name, source)
    spec = image_spec_of(name, model.config, offline=source.kind != "hub")
    family = FAMILIES.get(model.config.model_type)
    resized = spec.with_size(image_size)
    patch = getattr(model.config, "patch_size", None)
    if isinstance(patch, int):
        check_image_size(resized.size, (patch, patch), name)
    if family is not None:
        interpolate_positions(model, resized.size)
        tower: Tower = HFTower(model, family, resized, final_norm)
    else:
        tower = OWN.get(model.config.model_type, WholeModelTower)(model, resized, final_norm)
    tower.notes += notes
    return tower
