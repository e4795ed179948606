"""The Q-Former of BLIP-2 (Li et al. 2023, arXiv 2301.12597), by transformers' Blip2QFormerModel.

Knows queries and the projection after them; the transformer itself is the library's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlm_adapt.choices import nearest
from vlm_adapt.connectors.connector import Connector, positive
from vlm_adapt.connectors.packed import PackedFeatures, padded
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import TokenCount


class QFormerConnector(Connector):
    """`queries` learned queries read the features by cross-attention in every second block.

    Args:
        queries: K (BLIP-2: 32).
        config: settings of transformers' Blip2QFormerConfig (hidden_size, num_hidden_layers,
            cross_attention_frequency and so on) that are not its defaults.
    Parameters: those of Blip2QFormerModel (105.1 M by default with 1408 channels in), K*W queries and
    W*D + D of the projection.
    Names in the state dict: `query_tokens`, `qformer.*` and `language_projection.*`, as in transformers'
    Blip2ForConditionalGeneration.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[tuple[int, int]],
        width_out: int,
        *,
        queries: int = 32,
        config: Mapping[str, Any] | None = None,
        **shared: Any,
    ):
        super().__init__(widths, grids, width_out, **shared)
        positive(queries=queries)
        known = Blip2QFormerConfig().to_dict()
        for setting in config or {}:
            if setting not in known or setting == "encoder_hidden_size":
                raise UserError(
                    f"unknown setting '{setting}' of the Q-Former's config{nearest(setting, known)}"
                )
        try:
            settings = Blip2QFormerConfig(**{**(config or {}), "encoder_hidden_size": self.gather.width})
        except (StrictDataclassError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the Q-Former's config cannot be used: {reason}") from error
        if settings.hidden_size % settings.num_attention_heads:
            raise UserError(
                f"the Q-Former's hidden_size {settings.hidden_size} is not a multiple of "
                f"num_attention_heads {settings.num_attention_heads}"
            )
        self.tokens_per_image = queries
        # Not zeros, as in the library before it loads weights: equal queries would stay equal for ever.
        self.query_tokens = nn.Parameter(
            torch.randn(1, queries, settings.hidden_size) * settings.initializer_range
        )
        self.qformer = Blip2QFormerModel(settings)
        self.language_projection = nn.Linear(settings.hidden_size, width_out)

    @property
    def token_count(self) -> TokenCount:
        """K, whatever the image."""
        return TokenCount(fixed=self.tokens_per_image)

    def project_packed(self, features_TV: Tensor, images: PackedFeatures) -> Tensor:
        """K tokens an image, each image's queries reading its own patches."""
        return self.project(*padded(features_TV, images.lengths)).flatten(0, 1)

    def project(self, features_NPV: Tensor, taken_NP: Tensor | None = None) -> Tensor:
        """K tokens an image; `taken_NP` is False at padding."""
        queries_NKW = self.query_tokens.expand(len(features_NPV), -1, -1)
        mask = None if taken_NP is None else taken_NP.long()
        output = self.qformer(
            query_embeds=queries_NKW, encoder_hidden_states=features_NPV, encoder_attention_mask=mask
        )
        return self.language_projection(output.last_hidden_state)
