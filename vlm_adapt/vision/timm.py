"""Towers from timm, by its `forward_intermediates`: plain ViTs, and hierarchical encoders.

Knows timm; knows nothing about connectors or training. Layers are blocks in a plain ViT and stages in
a hierarchical encoder (TinyViT, Swin, ConvNeXt, EfficientNet).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.tensor_files import Source, read_state
from vlm_adapt.vision.loading import load_strictly, note_left_out, unreachable
from vlm_adapt.vision.strides import set_last_stride
from vlm_adapt.vision.tower import Tower, check_image_size, mend_batch_norms, taken
from vlm_adapt.vision.windows import fit_windows as fit_windows_of

# Modules that no intermediate feature passes through.
HEADS = (
    "head",
    "head_dist",
    "head_drop",
    "fc",
    "fc_norm",
    "classifier",
    "attn_pool",
    "norm_head",
    "pre_logits",
)
RESIZE = {"center": "crop", "squash": "squash", "border": "pad"}


class TimmTower(Tower):
    """A timm model as a tower.

    Args:
        trunk: the model, already at the size of `image_spec`; its classifier is taken off.
        final_norm: whether the last layer passes the trunk's final norm, as in `forward_features`.
    """

    def __init__(self, trunk: Any, image_spec: ImageSpec, final_norm: bool = True):
        info = [dict(entry) for entry in getattr(trunk.feature_info, "info", trunk.feature_info)]
        plain = len({entry["reduction"] for entry in info}) == 1
        take_off_head(trunk, len(info), keep_norm=final_norm)
        trunk.eval()
        mend_batch_norms(trunk)
        with torch.no_grad():
            pixels_NCHW = torch.zeros(1, 3, *image_spec.size, dtype=next(trunk.parameters()).dtype)
            # One block tells all about a plain ViT; stages differ.
            indices = [0] if plain else list(range(len(info)))
            maps = trunk.forward_intermediates(
                pixels_NCHW, indices=indices, stop_early=True, intermediates_only=True
            )
        shapes = [tuple(features_NDhw.shape) for features_NDhw in maps] * (len(info) if plain else 1)
        names, layers, stages = _find_blocks(trunk, [entry["module"] for entry in info])
        super().__init__(
            image_spec,
            [shape[1] for shape in shapes],
            [shape[2:] for shape in shapes],
            [f"trunk.{name}" for name in names],
            layers,
        )
        self.stages = [(f"trunk.{stage}", layer) for stage, layer in stages]
        self.trunk: Any = trunk
        self.plain, self.final_norm = plain, final_norm
        self.tokens = plain and _gives_tokens(trunk, pixels_NCHW)
        self.has_class_token = self.tokens and _gives_class_token(trunk)
        self.train(self.training)

    def train(self, mode: bool = True) -> TimmTower:
        """As in Tower. The attentions of TinyViT and LeViT stay in training mode themselves.

        In evaluation mode they keep a copy of their biases, which is stale once a weight is trained or
        loaded, and of which a second backward, or a recomputed one, finds no graph. They have no dropout.
        """
        super().train(mode)
        for module in self.trunk.modules():
            if hasattr(module, "attention_bias_cache"):
                module.attention_bias_cache = {}
                module.training = True
        return self

    def _features(self, pixels_NCHW: Tensor, layers: list[int], class_token: bool) -> dict[int, Tensor]:
        maps = self.trunk.forward_intermediates(
            pixels_NCHW,
            indices=layers,
            # A plain ViT's norm is given to the last layer only, below; a hierarchy's fits no other.
            norm=self.final_norm and not self.plain and self._norms_stages(),
            stop_early=True,
            intermediates_only=True,
            **({"output_fmt": "NLC"} if self.tokens else {}),
            **({"return_prefix_tokens": True} if class_token else {}),
        )
        if class_token:
            maps = [torch.cat([before, tokens_NTD], dim=1) for tokens_NTD, before in maps]
        if self.tokens:
            # timm counts class and registers off, not what a block was given besides.
            patches = self.grid[0] * self.grid[1]
            found = {
                layer: taken(tokens_NTD, patches, class_token)
                for layer, tokens_NTD in zip(layers, maps, strict=True)
            }
        else:
            found = {
                layer: features_NDhw.flatten(2).transpose(1, 2)
                for layer, features_NDhw in zip(layers, maps, strict=True)
            }
        if self.plain and self.final_norm and self.depth - 1 in found:
            found[self.depth - 1] = self.trunk.norm(found[self.depth - 1])
        return found

    def _norms_stages(self) -> bool:
        return any(hasattr(self.trunk, name) for name in ("norm", "norm_pre"))

    def unused_modules(self, layers: Sequence[int] | None = None) -> list[str]:
        """As in Tower; of stages behind the deepest layer also what is in no block (their downsampling)."""
        deepest = max(self.resolve(layers))
        return super().unused_modules(layers) + [name for name, layer in self.stages if layer > deepest]

    def _last_layer_modules(self) -> list[str]:
        return [
            f"trunk.{name}"
            for name in ("norm", "norm_pre")
            if (self.final_norm or not self.plain)
            # In a plain ViT `norm_pre` comes before the first block.
            and not (self.plain and name == "norm_pre")
            and any(True for _ in getattr(self.trunk, name, nn.Identity()).parameters())
        ]

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in Tower; timm checkpoints a block at a time, or a stage where it has no finer way."""
        self.trunk.set_grad_checkpointing(enabled)


def _gives_tokens(trunk: Any, pixels_NCHW: Tensor) -> bool:
    """Whether a trunk's features can be had as tokens (ViTs), or as maps only (convolutions)."""
    try:
        with torch.no_grad():
            (tokens_NTD,) = trunk.forward_intermediates(
                pixels_NCHW, indices=[0], stop_early=True, intermediates_only=True, output_fmt="NLC"
            )
    except AssertionError:
        return False
    return tokens_NTD.ndim == 3


def _gives_class_token(trunk: Any) -> bool:
    offered = inspect.signature(trunk.forward_intermediates).parameters
    return isinstance(getattr(trunk, "cls_token", None), nn.Parameter) and "return_prefix_tokens" in offered


def take_off_head(trunk: Any, depth: int, keep_norm: bool = True) -> None:
    """Remove classifier and pooling, whose weights would neither be used nor get a gradient."""
    try:
        trunk.prune_intermediate_layers(list(range(depth)), prune_norm=not keep_norm, prune_head=True)
    except AttributeError as error:  # a head that is off already cannot be reset (TinyViT)
        if "reset" not in str(error):
            raise
    for name in HEADS:
        if isinstance(getattr(trunk, name, None), nn.Module):
            setattr(trunk, name, nn.Identity())


def _find_blocks(trunk: Any, features: list[str]) -> tuple[list[str], list[int], list[tuple[str, int]]]:
    """Names of the blocks of a trunk in order, the layer that each feeds, and stages with their layers."""
    names: list[str] = []
    layers: list[int] = []
    staged: list[tuple[str, int]] = []
    children = dict(trunk.named_children())
    done = -1
    for layer, feature in enumerate(features):
        container, _, index = feature.partition(".")
        if container not in children:
            container = "stages"  # MViT's feature names are not those of its modules
        if container not in children:
            continue
        if not index:
            stages = [container] if isinstance(children[container], nn.Sequential) else []
        else:
            last = int(index.split(".")[0])
            stages, done = [f"{container}.{number}" for number in range(done + 1, last + 1)], last
        staged += [(stage, layer) for stage in stages]
        for stage in stages:
            module = trunk.get_submodule(stage)
            inner = getattr(module, "blocks", None)
            if isinstance(inner, nn.Sequential | nn.ModuleList):
                found = [f"{stage}.blocks.{name}" for name, _ in inner.named_children()]
            elif isinstance(module, nn.Sequential):
                found = [f"{stage}.{name}" for name, _ in module.named_children()]
            else:
                found = [stage]
            names += found
            layers += [layer] * len(found)
    return names, layers, staged


def build(
    name: str,
    source: Source,
    image_size: int | tuple[int, int] | None,
    final_norm: bool = True,
    fit_windows: bool = False,
    last_stride: int = 2,
) -> TimmTower:
    """A timm tower by model name (`vit_base_patch16_224.augreg_in1k`) or `local-dir:FOLDER`.

    `fit_windows`: shrink TinyViT's attention windows to small images (see vision/windows.py).
    `last_stride`: 1 gives TinyViT's last map at the size of the one before (see vision/strides.py).
    """
    folder = name.startswith("local-dir:")
    if not folder and "/" not in name and not timm.is_model(name):
        raise UserError(f"timm has no model '{name}'{nearest(name.split('.')[0], timm.list_models()) or '.'}")
    if source.kind == "hub" and source.value:
        name = f"{name}.{source.value}"
    if folder and source.kind == "hub" and not any(Path(name.partition(":")[2]).glob("*model*.*")):
        raise UserError(f"'{name.partition(':')[2]}' holds no weights: say weights: random: to do without")
    options: dict[str, Any] = {"pretrained": source.kind == "hub"}
    if not options["pretrained"] and not folder:
        options["num_classes"] = 0
    try:
        trunk: Any = timm.create_model(name, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise unreachable(f"timm:{name}", error) from error
    if not hasattr(trunk, "forward_intermediates"):
        raise UserError(f"timm's '{name}' gives no intermediate features: choose another model")
    set_last_stride(trunk, last_stride, name)
    config = dict(trunk.pretrained_cfg)
    notes: list[str] = []
    if source.kind == "file":
        info = getattr(trunk.feature_info, "info", trunk.feature_info)
        before = {name for name, child in trunk.named_children() if any(True for _ in child.parameters())}
        take_off_head(trunk, len(info))
        # EfficientNet's head begins with a convolution and a norm of its own, which go with it.
        gone = [name for name in before if not any(True for _ in getattr(trunk, name).parameters())]
        heads = [f"{head}." for head in (*HEADS, *gone)]
        left_out = load_strictly(trunk, read_state(source.path), str(source.path), heads)
        notes += note_left_out(str(source.path), left_out)
    data = resolve_data_config(pretrained_cfg=config)
    spec = ImageSpec(
        tuple(data["input_size"][-2:]),
        data["mean"],
        data["std"],
        RESIZE.get(data["crop_mode"], "crop"),
        data["interpolation"] if data["interpolation"] in ("bilinear", "lanczos") else "bicubic",
    )
    try:
        tower = TimmTower(trunk, resize_trunk(trunk, spec, image_size, name), final_norm)
    except (AssertionError, RuntimeError) as error:
        if image_size is None:
            raise
        raise UserError(
            f"timm's '{name}' takes images of {spec.size[0]} pixels only: leave image_size out"
        ) from error
    tower.notes += notes
    if fit_windows:
        changed = fit_windows_of(trunk, tower.grids(range(tower.depth)))
        tower.notes.append(f"attention windows were fitted to the image in {changed} blocks")
    return tower


def resize_trunk(
    trunk: Any, spec: ImageSpec, image_size: int | tuple[int, int] | None, name: str
) -> ImageSpec:
    """Make `trunk` take images of `image_size` (positions interpolated); return the spec that fits."""
    resized = spec.with_size(image_size)
    if resized.size == spec.size:
        return spec
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    if patch is not None:
        check_image_size(resized.size, tuple(patch), name)
    if hasattr(trunk, "set_input_size"):
        try:
            trunk.set_input_size(resized.size)
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(f"timm's '{name}' cannot take images of {image_size} pixels: {error}") from error
    return resized
