"""Pixel shuffle: r x r neighbouring patches become one token of r*r times the channels.

As in Idefics3 (Laurencon et al. 2024, arXiv 2408.12637), SmolVLM and nanoVLM. Knows the regrouping; the
projection is the MLP's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlm_adapt.connectors.connector import positive
from vlm_adapt.connectors.mlp import MLPConnector
from vlm_adapt.connectors.packed import PackedFeatures, grouped
from vlm_adapt.errors import UserError


class PixelShuffleConnector(MLPConnector):
    """K = P / factor^2 tokens; one Linear without bias by default, r^2*V*D parameters.

    Channels of a token are ordered (row in the group, column in the group, channel), as in transformers'
    Idefics3, whose `modality_projection.proj.weight` is `linear_1.weight` here.

    Args:
        factor: r.
        layers, bias, activation, pre_norm: as in MLPConnector.
    Raises:
        UserError: a grid that r does not divide.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[tuple[int, int]],
        width_out: int,
        *,
        factor: int = 2,
        layers: int = 1,
        bias: bool = False,
        **shared: Any,
    ):
        positive(factor=factor)
        self.factor = self.multiple = factor
        self.whole = factor > 1
        super().__init__(widths, grids, width_out, layers=layers, bias=bias, **shared)
        rows, columns = self.gather.grid
        if rows % factor or columns % factor:
            raise UserError(
                f"pixel shuffle by {factor} needs a grid that {factor} divides, and the features are "
                f"{rows} x {columns}: choose another factor, `grid` or image_size"
            )
        self.tokens_per_image = rows * columns // factor**2

    def width_in(self) -> int:
        """Channels of a group of patches."""
        return self.gather.width * self.factor**2

    def project(self, features_NPV: Tensor) -> Tensor:
        """A token a group of patches, groups in row-major order."""
        rows, columns = self.gather.grid
        factor = self.factor
        cut = features_NPV.unflatten(1, (rows // factor, factor, columns // factor, factor))
        groups_NKV = cut.transpose(2, 3).flatten(3, 5).flatten(1, 2)
        return super().project(groups_NKV)

    def project_packed(self, features_TV: Tensor, images: PackedFeatures) -> Tensor:
        """The same within each image's own grid, both sides of which are multiples of the factor."""
        return super().project_packed(grouped(features_TV, images.grids, self.factor), images)
