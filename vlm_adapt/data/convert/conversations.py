"""Conversations as JSON files have them, to messages of our schema and images in their order.

Knows the words of LLaVA, ShareGPT, LLaMA-Factory, OpenAI and The Cauldron; knows nothing about image
files.

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}]}
    {"images": [...], "messages": [{"role": "user", "content": "<image>What?"}, ...], "system": "..."}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ...}}, ...]}, ...]}
    {"instruction": "...", "input": "...", "output": "...", "history": [[question, answer], ...]}
    {"images": [...], "texts": [{"user": "What?", "assistant": "A cat."}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_adapt.data.convert.cells import cells_sample
from vlm_adapt.data.convert.common import (
    Conversion,
    ImageFolders,
    Recipe,
    existing,
    read_json,
    safe_key,
    several,
)
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.sentence import IMAGE_PLACEHOLDER

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}
_NAMES = ("url", "path", "image", "bytes")  # under which a part or a struct has its image


def json_lines(path: Path, what: str) -> Iterator[tuple[int, Any]]:
    """`(line number, value)` of each line that is not blank; the value is BadSample if it is no JSON.

    Raises UserError if the file cannot be read or if not even its first line is JSON.
    """
    number, seen = 0, False
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    if not seen:
                        raise UserError(f"{what} {path} is not readable JSON lines: {error}") from error
                    value = BadSample("line is not readable JSON", f"line {number}: {error}")
                seen = True
                yield number, value
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} cannot be read after line {number}: {error}") from error


def _entries(paths: str, conversion: Conversion) -> Iterator[Any]:
    """The entries of JSON lists and of JSONL files; BadSample for lines that cannot be read."""
    for name in several(paths):
        path = existing(name, "conversation file")
        if path.suffix == ".jsonl":
            yield from (value for _, value in json_lines(path, "conversation file"))
            continue
        content = read_json(name, "conversation file")
        if not isinstance(content, list):
            raise UserError(f"{name} is not a LLaVA or ShareGPT file: it should hold a list of conversations")
        conversion.total = (conversion.total or 0) + len(content)
        yield from content


def _content(parts: Any, images: list[Any]) -> str:
    """A message's text; images among content parts become placeholders and are noted if they are named."""
    if isinstance(parts, str):
        return parts
    if not isinstance(parts, list):
        raise BadSample("a message has no text")
    text = ""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image_url", "image"):
            inside = part.get("image_url", part)
            found = inside if isinstance(inside, str) else None
            if isinstance(inside, Mapping):
                found = next((inside[name] for name in _NAMES if inside.get(name)), None)
            if found is not None:
                images.append(found)
            elif kind == "image_url":
                raise BadSample("an image_url has no url")
            text += IMAGE_PLACEHOLDER
        else:
            raise BadSample("a message has a part that is neither text nor image_url", str(kind))
    return text


def _turns(entry: Mapping[str, Any]) -> list[Any]:
    """The turns of an entry, whatever they are called."""
    turns = next((entry[name] for name in ("conversations", "messages", "texts") if entry.get(name)), None)
    if turns is None and isinstance(entry.get("output"), str) and "instruction" in entry:
        asked = [entry[name] for name in ("instruction", "input") if entry.get(name)]
        pairs = [*(entry.get("history") or []), ("\n".join(map(str, asked)), entry["output"])]
        turns = [{"user": pair[0], "assistant": pair[1]} for pair in pairs if len(pair) == 2]
    if not isinstance(turns, list) or not turns:
        raise BadSample("entry has no conversations")
    spread: list[Any] = []
    for turn in turns:
        if isinstance(turn, Mapping) and "user" in turn and "assistant" in turn:
            spread += [{"role": role, "content": turn[role]} for role in ("user", "assistant")]
        else:
            spread.append(turn)
    return spread


def _named_images(entry: Mapping[str, Any]) -> list[Any]:
    named = next((entry[name] for name in ("image", "images") if entry.get(name) is not None), None)
    images = [] if named is None else list(named) if isinstance(named, list | tuple) else [named]
    if not all(isinstance(image, str | bytes | Mapping) for image in images):
        raise BadSample("image is not a file name")
    return images


def conversation(entry: Any, insert: bool = False) -> tuple[list[dict[str, str]], list[Any]]:
    """Messages of our schema, and the images in order, each as `cells.read_cell` takes it.

    Args:
        entry: an object of one of the forms above.
        insert: images that no text has a place for are put before the first question. Entries with
            `texts` have no places at all, so it is always done for them.

    Raises:
        BadSample: with what is wrong.
    """
    if isinstance(entry, BadSample):
        raise entry
    if not isinstance(entry, Mapping):
        raise BadSample("entry is not an object")
    inline: list[Any] = []
    messages = []
    for turn in _turns(entry):
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
    system = entry.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    images = _named_images(entry) or inline
    used = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
    if not used and images and (insert or "texts" in entry):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is not None:
            first["content"] = IMAGE_PLACEHOLDER * len(images) + "\n" + first["content"]
            used = len(images)
    if used != len(images):
        raise BadSample(
            f"placeholders and images differ: it has {used} {IMAGE_PLACEHOLDER} and {len(images)} image(s)"
        )
    return messages, images


def recipes(conversion: Conversion, paths: str, images: str, insert: bool = False) -> Iterator[Recipe]:
    """Recipes for the entries of conversation files, in their order."""
    folders = [str(folder) for folder in ImageFolders(images).folders] if images else []
    for number, entry in enumerate(_entries(paths, conversion)):
        named = entry.get("id") if isinstance(entry, Mapping) else None
        name = str(named if named is not None else number)
        key = f"{number:08d}-{safe_key(name)}"[:100]
        try:
            messages, cells = conversation(entry, insert)
        except BadSample as error:
            conversion.lose(key, error)
            continue
        record = {"messages": messages, "id": name}
        for field in ("kind", "lang", "source"):
            if isinstance(entry.get(field), str):
                record[field] = entry[field]
        yield Recipe(key, cells_sample, (cells, folders, record))
