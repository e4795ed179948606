"""LLaVA and ShareGPT JSON: conversations over no, one or several images. Liu et al. 2023,
arXiv:2304.08485. Also `messages` with `images`, and OpenAI's content parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vlm_adapt.data.convert.common import (
    Conversion,
    ImageFolders,
    existing,
    image_members,
    read_image,
    read_json,
    safe_key,
)
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.sentence import IMAGE_PLACEHOLDER

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


def _entries(path: str) -> list[Any]:
    """The entries of a JSON list or of a JSONL file."""
    if path.endswith(".jsonl"):
        try:
            text = existing(path, "conversation file").read_text(encoding="utf-8")
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"conversation file {path} is not readable JSON lines: {error}") from error
    content = read_json(path, "conversation file")
    if not isinstance(content, list):
        raise UserError(f"{path} is not a LLaVA file: it should hold a list of conversations")
    return content


def _content(parts: Any, images: list[str]) -> str:
    """A message's text; images among OpenAI's content parts become placeholders and are noted."""
    if isinstance(parts, str):
        return parts
    if not isinstance(parts, list):
        raise BadSample("a message has no text")
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "image_url" and isinstance(part.get("image_url"), Mapping):
            images.append(str(part["image_url"].get("url", "")).removeprefix("file://"))
            text += IMAGE_PLACEHOLDER
        else:
            raise BadSample("a message has a part that is neither text nor image_url", str(kind))
    return text


def _conversation(entry: Any) -> tuple[list[dict[str, str]], list[str]]:
    """Messages of our schema, and the names of the images in order."""
    if not isinstance(entry, Mapping):
        raise BadSample("entry is not an object")
    turns = entry.get("conversations", entry.get("messages"))
    if not isinstance(turns, list) or not turns:
        raise BadSample("entry has no conversations")
    named = entry.get("image", entry.get("images"))
    images = [] if named is None else [named] if isinstance(named, str) else list(named)
    if not all(isinstance(image, str) for image in images):
        raise BadSample("image is not a file name")
    inline: list[str] = []
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise BadSample("a turn is not an object")
        speaker = turn.get("from", turn.get("role"))
        if speaker not in ROLES:
            raise BadSample("a turn is spoken by none of human, gpt, system", str(speaker))
        text = _content(turn.get("value", turn.get("content")), inline)
        if ROLES[speaker] == "assistant" and not text.strip():
            raise BadSample("empty answer")
        messages.append({"role": ROLES[speaker], "content": text})
    if all(message["role"] != "assistant" for message in messages):
        raise BadSample("conversation without an answer")
    images = images or inline
    used = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
    if used != len(images):
        raise BadSample(
            f"placeholders and images differ: it has {used} {IMAGE_PLACEHOLDER} and {len(images)} image(s)"
        )
    return messages, images


def convert(conversion: Conversion, *, conversations: str, images: str = "") -> Iterator[dict[str, Any]]:
    """Samples `{messages: [{role, content}], id}` with their images, in the order of the file.

    Args:
        conversations: a JSON list or JSON lines.
        images: the folder to which image names are relative, or several joined by `::`; may be left
            out for text-only data.
    """
    folders = ImageFolders(images) if images else None
    entries = _entries(conversations)
    conversion.total = len(entries)
    for number, entry in enumerate(entries):
        named = entry.get("id") if isinstance(entry, Mapping) else None
        name = safe_key(str(named if named is not None else number))
        key = f"{number:08d}-{name}"[:100]
        try:
            messages, names = _conversation(entry)
            if names and folders is None:
                raise UserError(
                    f"{conversations} names images ({names[0]}): say in which folder they are, images=..."
                )
            files = [read_image(folders.named(file)) for file in names] if folders else []
        except BadSample as error:
            conversion.lose(key, error)
            continue
        record = {"messages": messages, "id": str(named if named is not None else number)}
        yield {"__key__": key, **image_members(files), "json": record}
