"""LLaVA JSON: conversations over no, one or several images. Liu et al. 2023, arXiv:2304.08485;
github.com/haotian-liu/LLaVA, docs/Finetune_Custom_Data.md. Also `messages` with `images`, and OpenAI's
content parts."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_adapt.data.convert.common import Conversion, Recipe
from vlm_adapt.data.convert.conversations import recipes


def convert(conversion: Conversion, *, conversations: str, images: str = "") -> Iterator[Recipe]:
    """Samples `{messages: [{role, content}], id}` with their images, in the order of the file.

    Args:
        conversations: a JSON list or JSON lines, or several joined by `::`.
        images: the folder to which image names are relative, or several joined by `::`; may be left
            out for text-only data.
    """
    return recipes(conversion, conversations, images)
