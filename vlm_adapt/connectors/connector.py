"""The seam between vision and language: features of a tower to tokens of a language model's width.

Knows the shared beginning (layers gathered) and end (scale of the tokens); knows nothing about towers
or language models.

Shapes: N images, P patches, V channels of the gathered features, K tokens an image, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm_adapt.connectors.gather import GatherLayers
from vlm_adapt.errors import UserError


class Connector(nn.Module):
    """Gather layers, then `project`, then scale if asked. Subclasses give `project`.

    Args:
        widths, grids: of each layer of the tower.
        width_out: D.
        embedding_rms: root mean square of the entries of the language model's embeddings.
        grid, normalise: see GatherLayers.
        output_scale: end with a LayerNorm whose weight starts at this many times `embedding_rms`, so that
            image tokens come in at the scale of text tokens (True or 1).
    Attributes:
        tokens_per_image: K.
    Names in the state dict: `output_norm.*` if scaled; the rest is the subclass's.
    """

    tokens_per_image: int

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[tuple[int, int]],
        width_out: int,
        *,
        embedding_rms: float | None = None,
        grid: int | Sequence[int] | None = None,
        normalise: bool | str | None = None,
        output_scale: bool | float = False,
    ):
        super().__init__()
        self.gather = GatherLayers(widths, grids, grid, normalise)
        self.width_out = width_out
        self.tokens_per_image = self.gather.grid[0] * self.gather.grid[1]
        self.output_norm: nn.Module | None = None
        if output_scale:
            if embedding_rms is None or embedding_rms <= 0:
                raise UserError(
                    "output_scale needs the embeddings' root mean square: it was not given or not positive"
                )
            # Outputs of a fresh projection may vary by 0.01 only; the default 1e-5 would be felt.
            self.output_norm = nn.LayerNorm(width_out, eps=1e-8)
            nn.init.constant_(self.output_norm.weight, embedding_rms * float(output_scale))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features_NPV, one for each layer, to tokens_NKD.

        Raises:
            UserError: other layers, widths or grids than it was built for.
        """
        features_NPV = self.gather(features)
        if not torch.is_autocast_enabled(features_NPV.device.type):
            # A frozen tower may be in bf16 where this trains in float32; autocast would see to it.
            features_NPV = features_NPV.to(next(self.parameters()).dtype)
        tokens_NKD = self.project(features_NPV)
        return tokens_NKD if self.output_norm is None else self.output_norm(tokens_NKD)

    def project(self, features_NPV: Tensor) -> Tensor:
        """Gathered features_NPV to tokens_NKD."""
        raise TypeError(f"{type(self).__name__} does not say how to project features")


def positive(**values: int) -> None:
    """Raise UserError unless every value is a whole number from 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"a connector's {name} is a whole number from 1, not {value!r}")
