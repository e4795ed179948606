"""transformers' plain ViTs with images of native aspect ratio and resolution, packed.

Knows where each family keeps its patch projection, its class token and its positions, and how it resizes
these; the blocks are the library's own, whose attention is told of a layout in place of a mask. Of one
image alone the features are what the library gives for it: SigLIP 2 by its own patches and shapes, the
others by `interpolate_pos_encoding`, DINOv3 by its rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import Native
from vlm_adapt.vision.hf import HFTower
from vlm_adapt.vision.navit_tower import NativeTower
from vlm_adapt.vision.packing import Layout, Packed, register
from vlm_adapt.vision.tower import Tower


@dataclass(frozen=True)
class Parts:
    """Where a family's embeddings keep things.

    Args:
        project: name of the patch projection below `embeddings`.
        prefix: names of the tokens before the patches, the class token first.
        positions: name of the table below `embeddings`; None for rotary positions.
        mode, antialias: how the table is resized to an image's grid.
        norm: name of a norm before the first block.
    """

    project: str
    prefix: tuple[str, ...] = ()
    positions: str | None = "position_embeddings"
    mode: str = "bicubic"
    antialias: bool = False
    norm: str | None = None


FAMILIES = {
    "siglip2_vision_model": Parts("patch_embedding", (), "position_embedding", "bilinear", True),
    "siglip_vision_model": Parts("patch_embedding", (), "position_embedding"),
    "clip_vision_model": Parts(
        "patch_embedding", ("class_embedding",), "position_embedding", norm="pre_layrnorm"
    ),
    "vit": Parts("patch_embeddings.projection", ("cls_token",)),
    "dinov2": Parts("patch_embeddings.projection", ("cls_token",)),
    "dinov2_with_registers": Parts(
        "patch_embeddings.projection", ("cls_token", "register_tokens"), antialias=True
    ),
    "dinov3_vit": Parts("patch_embeddings", ("cls_token", "register_tokens"), None),
}


class NativeHFTower(NativeTower):
    """A model of one of FAMILIES over packed images.

    Args:
        tower: the same for images of one size; its model is taken over, its pretrained positions kept.
        settings: what a configuration says under `native`.
    Raises:
        UserError: settings that cannot work.
    """

    def __init__(self, tower: HFTower, settings: Any):
        model, parts = tower.model, FAMILIES[tower.model.config.model_type]
        patch = int(model.config.patch_size)
        spec = replace(tower.image_spec, native=Native.parse(settings, patch=patch))
        prefix = sum(getattr(model.embeddings, name).numel() for name in parts.prefix)
        width = int(model.config.hidden_size)
        super().__init__(spec, width, tower.block_names, prefix // width)
        self.model: Any = model
        self.parts, self.family, self.final_norm, self.patch = parts, tower.family, tower.final_norm, patch
        self.notes += tower.notes
        model.config._attn_implementation = register()
        for name in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):
            if getattr(model.config, name, None) is not None:
                setattr(model.config, name, None)  # DINOv3's pretraining moves positions about at random
                self.notes.append(f"{name} was switched off")

    def _embed(self, images: Packed, layout: Layout) -> tuple[Tensor, dict[str, Any]]:
        embeddings, parts = self.model.embeddings, self.parts
        project = embeddings.get_submodule(parts.project)
        if isinstance(project, nn.Linear):
            patches_TD = project(images.pixels_TV)
        else:
            # Called as the library calls it, so that whatever wraps the module is not passed by.
            pixels_TCpp = images.pixels_TV.unflatten(1, (self.patch, self.patch, -1)).permute(0, 3, 1, 2)
            patches_TD = project(pixels_TCpp.contiguous()).flatten(1)
        prefix_FD = None
        if parts.prefix:
            tokens = [getattr(embeddings, name).view(-1, patches_TD.shape[1]) for name in parts.prefix]
            prefix_FD = torch.cat(tokens).to(patches_TD.dtype)
        arguments: dict[str, Any] = {}
        if parts.positions is None:
            arguments["position_embeddings"] = self._rotary(images, layout)
        else:
            first_FD, positions_TD = self._positions(images)
            patches_TD = patches_TD + positions_TD.to(patches_TD.dtype)
            if prefix_FD is not None:  # the class token has a position, registers have none
                classes_FD = prefix_FD[: len(first_FD)] + first_FD.to(patches_TD.dtype)
                prefix_FD = torch.cat([classes_FD, prefix_FD[len(first_FD) :]])
        hidden_1TD = layout.arrange(patches_TD, prefix_FD)[None]
        if parts.norm is not None:
            hidden_1TD = self.model.get_submodule(parts.norm)(hidden_1TD)
        return hidden_1TD, arguments

    def _positions(self, images: Packed) -> tuple[Tensor, Tensor]:
        """The table's entries before its square map, and each patch's from the map at its image's grid."""
        assert self.parts.positions is not None
        held: Any = getattr(self.model.embeddings, self.parts.positions)
        if isinstance(held, nn.Embedding):  # called, not read: ZeRO-3 may hold its weight elsewhere just now
            held = held(torch.arange(held.num_embeddings, device=images.places_T.device))
        held_ND = held.view(-1, held.shape[-1]).float()
        side = int(len(held_ND) ** 0.5)
        first = len(held_ND) - side * side
        map_1Dhw = held_ND[first:].T.unflatten(1, (side, side))[None]
        maps, starts, total = [], {}, 0
        for grid in dict.fromkeys(images.grids):
            resized_1Dhw = map_1Dhw
            if grid != (side, side):
                resized_1Dhw = functional.interpolate(
                    map_1Dhw, grid, mode=self.parts.mode, align_corners=False, antialias=self.parts.antialias
                )
            maps.append(resized_1Dhw[0].flatten(1).T)
            starts[grid], total = total, total + grid[0] * grid[1]
        start_T = images.per_patch([starts[grid] for grid in images.grids])
        return held_ND[:first], torch.cat(maps)[start_T + images.places_T]

    def _rotary(self, images: Packed, layout: Layout) -> tuple[Tensor, Tensor]:
        """(cos, sin) of each token as it lies; prefix tokens are not turned."""
        found, starts, total = [], {}, 0
        for grid in dict.fromkeys(images.grids):
            size = (grid[0] * self.patch, grid[1] * self.patch)
            found.append(self.model.rope_embeddings(images.pixels_TV.new_zeros(1).expand(1, 1, *size)))
            starts[grid], total = total, total + grid[0] * grid[1]
        take_T = images.per_patch([starts[grid] for grid in images.grids]) + images.places_T
        cos_TE, sin_TE = (torch.cat(parts)[take_T] for parts in zip(*found, strict=True))
        still_FE = cos_TE.new_ones(self.prefix, cos_TE.shape[1])
        return layout.arrange(cos_TE, still_FE), layout.arrange(sin_TE, torch.zeros_like(still_FE))

    def _finish(self, features_TD: Tensor, images: Packed) -> Tensor:
        return self.model.get_submodule(self.family.norm)(features_TD) if self.final_norm else features_TD

    def _last_layer_modules(self) -> list[str]:
        return [f"model.{self.family.norm}"] if self.final_norm else []


def make_native(
    tower: Tower, settings: Any, name: str, image_size: int | tuple[int, int] | None
) -> NativeTower:
    """A tower for images of one size as one for images of native sizes.

    Raises:
        UserError: a tower that cannot, an image_size, or settings that cannot work.
    """
    if isinstance(tower, NativeTower):
        return tower
    if not isinstance(tower, HFTower) or tower.model.config.model_type not in FAMILIES:
        raise UserError(
            f"'{name}' takes images of one size only: options.native works with navit: and with the CLIP, "
            "SigLIP, SigLIP 2, ViT, DINOv2 and DINOv3 of hf: (leave native out, or choose one of these)"
        )
    if image_size is not None:
        raise UserError(
            f"native images of '{name}' have no one image_size: leave it out, or set "
            "options.native.resolution and max_patches"
        )
    return NativeHFTower(tower, settings)
