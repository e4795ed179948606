"""The MLP connector of LLaVA-1.5 ("mlp2x_gelu"): a token a patch (Liu et al. 2023, arXiv 2310.03744).

Knows a stack of projections; knows nothing about where features come from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from vlm_adapt.connectors.connector import Connector, positive
from vlm_adapt.connectors.packed import PackedFeatures
from vlm_adapt.errors import UserError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


class MLPConnector(Connector):
    """Linear, then (activation, Linear) `layers - 1` times; every hidden width is D.

    Parameters: V*D + D + (layers - 1)(D*D + D), plus 2V with `pre_norm`.

    Args:
        layers: how many Linears (LLaVA's mlp{n}x_gelu has n).
        activation: gelu, gelu_tanh, relu or silu.
        pre_norm: begin with a LayerNorm over the channels.
        bias: whether the Linears have one.
    Names in the state dict: `linear_1.*` to `linear_n.*`, and `pre_norm.*`. With two layers these are
    the names of `multi_modal_projector` in transformers' Llava, whose weights load as they are.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[tuple[int, int]],
        width_out: int,
        *,
        layers: int = 2,
        activation: str = "gelu",
        pre_norm: bool = False,
        bias: bool = True,
        **shared: Any,
    ):
        super().__init__(widths, grids, width_out, **shared)
        positive(layers=layers)
        if activation not in ACTIVATIONS:
            raise UserError(f"unknown activation '{activation}': choose {', '.join(ACTIVATIONS)}")
        width_in = self.width_in()
        self.pre_norm = nn.LayerNorm(width_in) if pre_norm else None
        self.layers = layers
        for number in range(1, layers + 1):
            linear = nn.Linear(width_in if number == 1 else width_out, width_out, bias=bias)
            self.add_module(f"linear_{number}", linear)
        self.activation = ACTIVATIONS[activation]()

    def width_in(self) -> int:
        """Channels of what the first Linear sees."""
        return self.gather.width

    def project(self, features_NPV: Tensor) -> Tensor:
        """A token a patch."""
        hidden_NKD = features_NPV if self.pre_norm is None else self.pre_norm(features_NPV)
        for number in range(1, self.layers + 1):
            if number > 1:
                hidden_NKD = self.activation(hidden_NKD)
            hidden_NKD = self.get_submodule(f"linear_{number}")(hidden_NKD)
        return hidden_NKD

    def project_packed(self, features_TV: Tensor, images: PackedFeatures) -> Tensor:
        """A token a patch: each patch is projected by itself."""
        return MLPConnector.project(self, features_TV)
