"""The seam between vision and language: features of a tower to tokens of a language model's width.

Knows the shared beginning (layers gathered) and end (scale of the tokens); knows nothing about towers
or language models.

Shapes: N images, P patches, V channels of the gathered features, K tokens an image, D embedding width;
T patches and U tokens of all images, where each has its own number of them (packed).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm_adapt.connectors.gather import GatherLayers
from vlm_adapt.connectors.packed import PackedFeatures
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import TokenCount


class Connector(nn.Module):
    """Gather layers, then `project`, then scale if asked. Subclasses give `project`.

    Args:
        widths, grids: of each layer of the tower; (0, 0) where every image has a grid of its own.
        width_out: D.
        embedding_rms: root mean square of the entries of the language model's embeddings.
        grid, normalise: see GatherLayers.
        output_scale: end with a LayerNorm whose weight starts at this many times `embedding_rms`, so that
            image tokens come in at the scale of text tokens (True or 1).
    Attributes:
        tokens_per_image: K; 0 where it is a matter of the image.
        multiple: both sides of an image's grid must be multiples of this.
        whole: whether it needs every patch of an image.
    Names in the state dict: `output_norm.*` if scaled; the rest is the subclass's.
    """

    tokens_per_image: int
    multiple = 1
    whole = False

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

    @property
    def token_count(self) -> TokenCount:
        """How many tokens an image of any grid gives."""
        return TokenCount(group=self.multiple)

    def tokens(self, rows: int, columns: int, kept: int | None = None) -> int:
        """How many tokens an image of this grid gives, of which `kept` patches are left (None: all)."""
        return self.token_count(rows, columns, kept)

    def forward(self, features: Sequence[Tensor] | PackedFeatures) -> Tensor:
        """features_NPV, one for each layer, to tokens_NKD; packed features to tokens_UD, image after image.

        Raises:
            UserError: other layers, widths or grids than it was built for.
        """
        images = features if isinstance(features, PackedFeatures) else None
        layers = features.layers if isinstance(features, PackedFeatures) else features
        gathered = self.gather(layers if images is None else [layer_TV[None] for layer_TV in layers])
        if not torch.is_autocast_enabled(gathered.device.type):
            # A frozen tower may be in bf16 where this trains in float32; autocast would see to it.
            gathered = gathered.to(next(self.parameters()).dtype)
        tokens = self.project(gathered) if images is None else self.project_packed(gathered[0], images)
        return tokens if self.output_norm is None else self.output_norm(tokens)

    def project(self, features_NPV: Tensor) -> Tensor:
        """Gathered features_NPV to tokens_NKD."""
        raise TypeError(f"{type(self).__name__} does not say how to project features")

    def project_packed(self, features_TV: Tensor, images: PackedFeatures) -> Tensor:
        """Gathered features_TV of images of different sizes to tokens_UD."""
        raise TypeError(f"{type(self).__name__} does not say how to project images of different sizes")

    def check_varied(self, drops: bool, pooled: bool) -> None:
        """Whether it can follow a tower whose images have different sizes.

        Args:
            drops: whether patches are left out in training.
            pooled: whether the tower gives one feature an image.
        Raises:
            UserError: it cannot.
        """
        name = type(self).__name__.removesuffix("Connector")
        if self.whole and drops:
            raise UserError(
                f"the {name} connector needs every patch of an image: set vision.options.native.drop to 0, "
                "or choose linear, mlp, resampler or qformer"
            )
        if self.multiple > 1 and pooled:
            raise UserError(f"the {name} connector joins patches, and a tower with pool gives one feature")


def positive(**values: int) -> None:
    """Raise UserError unless every value is a whole number from 1."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"a connector's {name} is a whole number from 1, not {value!r}")
