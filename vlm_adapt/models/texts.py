"""The text encoder that a configuration names, its package fetched.

Knows where it comes from; what it does is the room text's.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from vlm_adapt import weights
from vlm_adapt.config import schema
from vlm_adapt.text import build_text
from vlm_adapt.text.encoder import TextEncoder


def text_encoder(config: schema.TextEncoder, dtype: torch.dtype, empty: bool = False) -> TextEncoder:
    """The text encoder alone, in evaluation mode."""
    model, named, local = config.model, "random:" if empty else config.weights, None
    if model.startswith("package:"):
        folder = weights.resolve(model)
        assert folder is not None
        model = str(folder)
    if named.startswith(("package:", "file:")):
        local = weights.resolve(named)
    with torch.device("meta") if empty else nullcontext():
        return build_text(model, named, dtype, local, config.options).eval()
