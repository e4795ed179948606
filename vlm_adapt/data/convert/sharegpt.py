"""ShareGPT, LLaMA-Factory and OpenAI JSON: `conversations` or `messages` with `images` and `system`,
content parts, and Alpaca's `instruction`, `input`, `output`. github.com/hiyouga/LLaMA-Factory,
data/README.md; platform.openai.com, vision fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

from vlm_adapt.data.convert.common import Conversion, Recipe
from vlm_adapt.data.convert.conversations import recipes


def convert(
    conversion: Conversion, *, conversations: str, images: str = "", insert: bool = False
) -> Iterator[Recipe]:
    """Samples `{messages: [{role, content}], id}` with their images, in the order of the file.

    Turns of tools are not ours to learn: a conversation with one is refused and named.

    Args:
        conversations: a JSON list or JSON lines, or several joined by `::`.
        images: the folder to which image names are relative, or several joined by `::`; may be left
            out for text-only data, absolute names and images in base64.
        insert: put `<image>` before the first question where an entry has images and no `<image>`;
            without it such an entry is refused.
    """
    return recipes(conversion, conversations, images, insert)
