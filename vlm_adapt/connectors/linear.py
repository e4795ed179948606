"""The linear connector: one matrix, a token a patch (PaliGemma; FROMAGe's and PaLM-E's projection).

Knows one projection; knows nothing about where features come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vlm_adapt.connectors.connector import Connector
from vlm_adapt.connectors.packed import PackedFeatures


class LinearConnector(Connector):
    """tokens = features W + b. Parameters: V*D + D.

    Args:
        bias: whether there is b.
    Names in the state dict: `linear.weight`, `linear.bias`, which are those of PaliGemma's
    `multi_modal_projector` in transformers.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[tuple[int, int]],
        width_out: int,
        *,
        bias: bool = True,
        **shared: Any,
    ):
        super().__init__(widths, grids, width_out, **shared)
        self.linear = nn.Linear(self.gather.width, width_out, bias=bias)

    def project(self, features_NPV: Tensor) -> Tensor:
        """A token a patch."""
        return self.linear(features_NPV)

    def project_packed(self, features_TV: Tensor, images: PackedFeatures) -> Tensor:
        """A token a patch."""
        return self.linear(features_TV)
