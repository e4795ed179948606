"""vlm_adapt adapts large vision-language models. Importing it imports no torch."""

__version__ = "0.1.0"
