"""The dense head of LSeg: transformers' DPT neck over four depths of a tower, and a 1 x 1 convolution.

Ranftl et al. 2021, arXiv 2103.13413; Li et al. 2022, arXiv 2201.03546. Knows widths and grids of four depths;
knows nothing about towers, texts or losses.

    N images, P patches, D channels of a depth, C channels inside, E of an embedding; h, w of the map
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DPTConfig
from transformers.models.dpt.modeling_dpt import DPTNeck, DPTReassembleLayer

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError
from vlm_adapt.heads.batch_norm import SharedBatchNorm
from vlm_adapt.heads.dense_head import DenseHead
from vlm_adapt.heads.projection import PixelProjection

DEPTHS = 4
READOUTS = ("project", "add", "ignore")
NORMS = ("batch", "none")


class DptHead(DenseHead):
    """Four depths, each brought to its scale, fused from the deepest up; the map is half the image or so.

    Depths of equal widths and grids (a plain ViT) pass the neck's own reassembling, by 4, 2, 1 and 1/2; of a
    hierarchical tower they come as they are, and only one that breaks the row of halves (a last stage
    without its stride) is resized by a layer of its own.

    Args:
        widths, grids: of each depth.
        embedding_size: E.
        class_token: whether the tower has one.
        channels: C (LSeg 256).
        neck: channels of each depth after reassembling, for equal depths only; by default D/4, D/2, D, D
            from D = 1024 and D/8, D/4, D/2, D below, as published for ViT-L and ViT-B.
        readout: what becomes of the class token: `project` (beside every patch, by a linear layer), `add` or
            `ignore`; by default `project` where there is one.
        norm: `batch` (LSeg) or `none` in the residual units. Statistics are those of all ranks' images
            (`SharedBatchNorm`).
    Raises:
        UserError: not four depths, or an option that cannot work.
    Names in the state dict: `neck.*` as in transformers, `resize.<depth>.*`, `out.*`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[tuple[int, int]],
        embedding_size: int,
        class_token: bool = False,
        *,
        channels: int = 256,
        neck: Sequence[int] | None = None,
        readout: str | None = None,
        norm: str = "batch",
    ):
        super().__init__()
        _check(widths, grids, channels, norm)
        self.widths, self.grids = list(widths), [(int(rows), int(columns)) for rows, columns in grids]
        plain = len(set(self.widths)) == 1 and len(set(self.grids)) == 1
        self.readout = _readout(readout, class_token and plain, class_token)
        self.wants_class_token = self.readout != "ignore"
        sizes = _neck_sizes(neck, self.widths, plain)
        self.factors = [4, 2, 1, 0.5] if plain else scales(self.grids)
        config = DPTConfig(
            hidden_size=self.widths[0],
            readout_type=self.readout,
            reassemble_factors=self.factors,
            neck_hidden_sizes=sizes,
            fusion_hidden_size=channels,
            use_batch_norm_in_fusion_residual=norm == "batch",
            use_bias_in_fusion_residual=norm != "batch",
        )
        self.neck = DPTNeck(config)
        self.resize = nn.ModuleDict()
        if not plain:
            # As the neck is for Swin: what is hierarchical already is not reassembled.
            self.neck.reassemble_stage = None
            for depth, (width, factor) in enumerate(zip(self.widths, self.factors, strict=True)):
                if factor != 1:
                    layer = DPTReassembleLayer(DPTConfig(hidden_size=width), width, factor)
                    self.resize[str(depth)] = layer
        for module in self.neck.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, SharedBatchNorm(channels))
        self.out = PixelProjection(channels, embedding_size)
        self.grid = tuple(16 * _resized(side, self.factors[-1]) for side in self.grids[-1])  # type: ignore[assignment]

    @property
    def plain(self) -> bool:
        """Whether its depths have equal widths and grids."""
        return self.neck.reassemble_stage is not None

    def forward(self, features: Sequence[Tensor], compact: bool = False) -> Any:
        """As in DenseHead."""
        self._check_features(features)
        if not torch.is_autocast_enabled(features[0].device.type):
            # A frozen tower may be in bf16 where this trains in float32; autocast would see to it.
            features = [layer.to(self.out.weight.dtype) for layer in features]
        if self.plain:
            if not self.wants_class_token:  # the neck takes the first token off
                features = [F.pad(layer_NPD, (0, 0, 1, 0)) for layer_NPD in features]
            fused = self.neck(list(features), *self.grids[0])
        else:
            maps = [
                layer_NPD.transpose(1, 2).unflatten(2, grid).contiguous()
                for layer_NPD, grid in zip(features, self.grids, strict=True)
            ]
            for depth, layer in self.resize.items():
                maps[int(depth)] = layer(maps[int(depth)])
            fused = self.neck(maps)
        return self.out(fused[-1], compact)

    def basis(self) -> Tensor:
        """As in DenseHead."""
        basis_EB: Tensor = self.out(None)
        return basis_EB

    def _check_features(self, features: Sequence[Tensor]) -> None:
        more = 1 if self.wants_class_token else 0
        shapes = [
            (rows * columns + more, width)
            for (rows, columns), width in zip(self.grids, self.widths, strict=True)
        ]
        found = [tuple(layer.shape[1:]) for layer in features]
        if found != shapes:
            raise UserError(f"the dense head was built for features of shapes {shapes} and got {found}")

    def unused_modules(self) -> list[str]:
        """The residual unit of the deepest depth, which has nothing coming up to it (LSeg keeps it too)."""
        return ["neck.fusion_stage.layers.0.residual_layer1"]

    def _apply(self, fn: Any, recurse: bool = True) -> DptHead:
        """As usual (`.to`), but batch norms stay in float32, as in a Tower."""
        super()._apply(fn, recurse)
        for module in self.modules():
            if isinstance(module, SharedBatchNorm):
                module.float()
        return self


def scales(grids: Sequence[tuple[int, int]]) -> list[float]:
    """By what power of two each depth is resized so that each is about half the one before.

    The deepest is put where the fewest have to change: depths that halve by themselves stay as they are,
    and of two equal last ones the last is halved.
    """
    sizes = [math.log2(max(1.0, math.sqrt(rows * columns))) for rows, columns in grids]
    wanted = sorted(size - (DEPTHS - 1 - depth) for depth, size in enumerate(sizes))[DEPTHS // 2]
    powers = [round(wanted + DEPTHS - 1 - depth - size) for depth, size in enumerate(sizes)]
    return [2**power for power in powers]  # whole from 1 on, as the layers want it


def _resized(side: int, factor: float) -> int:
    return int(side * factor) if factor >= 1 else math.ceil(side * factor)


def _check(widths: Sequence[int], grids: Sequence[tuple[int, int]], channels: int, norm: str) -> None:
    if len(widths) != DEPTHS or len(grids) != DEPTHS:
        raise UserError(
            f"the dense head reads four depths of a tower, and got {len(widths)}: name four in vision.layers"
        )
    if any(min(grid) < 1 for grid in grids):
        raise UserError(
            "the dense head needs one grid for all images, and this tower's images have their own"
        )
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise UserError(f"head.channels is a whole number from 1, not {channels!r}")
    if norm not in NORMS:
        raise UserError(f"head.norm is one of {', '.join(NORMS)}, not '{norm}'{nearest(str(norm), NORMS)}")


def _readout(readout: str | None, reads: bool, class_token: bool) -> str:
    if readout is None:
        return "project" if reads else "ignore"
    if readout not in READOUTS:
        raise UserError(
            f"head.readout is one of {', '.join(READOUTS)}, not '{readout}'{nearest(str(readout), READOUTS)}"
        )
    if readout != "ignore" and not reads:
        why = "depths of different grids" if class_token else "no class token"
        raise UserError(
            f"head.readout '{readout}' reads the class token, and this tower has {why}: leave it out"
        )
    return readout


def _neck_sizes(neck: Sequence[int] | None, widths: list[int], plain: bool) -> list[int]:
    if not plain:
        if neck is not None:
            raise UserError("head.neck is for depths of equal widths (a plain ViT): leave it out")
        return widths
    width = widths[0]
    if neck is None:
        shares = (4, 2, 1, 1) if width >= 1024 else (8, 4, 2, 1)
        return [max(1, width // share) for share in shares]
    sizes = list(neck) if isinstance(neck, list | tuple) else []
    if len(sizes) != DEPTHS or not all(isinstance(one, int) and one > 0 for one in sizes):
        raise UserError(f"head.neck is a list of four whole numbers from 1, not {neck!r}")
    return sizes
