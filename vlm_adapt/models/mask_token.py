"""What makes a mask of a token: its hidden state prompts SAM's mask decoder (LISA: Lai et al. 2023, arXiv
2308.00692, the embedding as mask).

    hidden state that has read the token -> projection -> one prompt token of the mask decoder
    features of the image (the masks' own tower, or the model's) -> neck -> the decoder's image embedding

Knows hidden states, features and masks; knows nothing about text, batches or files.

    M masks, J images, P patches, D width of the language, E of the features, C of the decoder
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlm_adapt.heads.sam import SamDecoder, float32_kept
from vlm_adapt.heads.sam_neck import SamNeck
from vlm_adapt.language.token_row import TokenRow

# What gets no gradient: points, boxes and mask prompts are not given; of the decoder's four masks the first
# is taken, as for a prompt that leaves no doubt; what it believes of its mask is not asked.
UNUSED = (
    "decoder.prompt_encoder",
    *(f"decoder.mask_decoder.output_hypernetworks_mlps.{number}" for number in (1, 2, 3)),
    "decoder.mask_decoder.iou_prediction_head",
)
# The decoder wants prompts far from where they start (0.1 a number at first, about 1 when they fit), at a
# rate that does not spoil it: the projection's weights are small and its output is multiplied.
REACH = 10.0


class MaskToken(nn.Module):
    """The token's rows, the projection of its state, and the decoder.

    Args:
        row: the token's embedding and head; they are called by the language.
        width: D.
        neck, decoder: SAM's.

    Attributes:
        size: (height, width) of the masks that come out: four times the grid of the features.
    """

    def __init__(self, row: TokenRow, width: int, neck: SamNeck, decoder: SamDecoder):
        super().__init__()
        self.row, self.neck, self.decoder = row, neck, decoder
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, decoder.width))
        with torch.no_grad():
            for parameter in self.projection[2].parameters():
                parameter.div_(REACH)
        self.size = (decoder.mask_size, decoder.mask_size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskToken:
        """As usual, but always float32: it is small, and places on the image need the bits."""
        super()._apply(float32_kept(fn), recurse)
        return self

    def forward(self, features_JPE: Tensor, states_MD: Tensor, images_M: Tensor) -> Tensor:
        """Logits of the masks, `[M, h, w]` float32.

        Args:
            features_JPE: of the images.
            states_MD: the hidden states that have read the tokens.
            images_M: which image each mask is on.
        """
        prompts_MC = self.projection(states_MD.float()) * REACH
        # An image's embedding is computed once, whatever the masks on it.
        embedding_JChw = self.neck(features_JPE.float())
        logits_M11hw, _ = self.decoder(
            embedding_JChw[images_M], words_NPTD=prompts_MC[:, None, None], multimask=False
        )
        logits_Mhw: Tensor = logits_M11hw[:, 0, 0].float()
        return logits_Mhw

    def nothing(self, features_JPE: Tensor, state_D: Tensor) -> Tensor:
        """A zero through which a rank without masks goes forward and backward like the others: ZeRO waits."""
        first = torch.zeros(1, dtype=torch.int64, device=state_D.device)
        return self(features_JPE, state_D[None], first).sum() * 0.0
