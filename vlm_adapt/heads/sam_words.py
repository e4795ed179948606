"""Words as a prompt of SAM's decoder: an embedded text becomes one prompt token.

Knows vectors of texts; knows no text encoder. The projection is trained (SAM's own text prompts were never
released); until it has been, its masks mean nothing, and `trained` says so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WordPrompt(nn.Module):
    """Text vectors to prompt tokens by two layers, as LISA's (Lai et al. 2023, arXiv 2308.00692).

    Args:
        text_width: of the text encoder's vectors.
        width: of the decoder.
    """

    def __init__(self, text_width: int, width: int = 256):
        super().__init__()
        self.text_width = text_width
        self.layers = nn.Sequential(
            nn.Linear(text_width, text_width), nn.ReLU(), nn.Linear(text_width, width)
        )
        # A buffer: it is saved with what a run has measured, and comes back with a checkpoint.
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def trained(self) -> bool:
        """Whether it has ever been trained."""
        return bool(self.steps.item() > 0)

    @property
    def learns(self) -> bool:
        """Whether it is being trained just now."""
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters())

    def forward(self, vectors: Tensor, counts: bool = True) -> Tensor:
        """vectors `[..., text_width]` to tokens `[..., 1, width]`: one token a prompt.

        Args:
            counts: whether this is training; words that stand in for none are not.
        """
        if self.learns and counts:
            self.steps += 1
        found: Tensor = self.layers(vectors)
        return found.unsqueeze(-2)
