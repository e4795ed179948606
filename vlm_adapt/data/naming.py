"""Names of shards from patterns: braces, folders, `*`, `::` joins, addresses and commands.

Knows how shards are named; knows nothing about what is in them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from vlm_adapt.data.storage import Settings, scheme_of, shown
from vlm_adapt.data.storage.unpack import is_compressed_name
from vlm_adapt.errors import UserError

Patterns = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_BRACES = re.compile(r"\{([^{}]*)\}")
# In a command, what a shell would not take for a list either: {print $1}, ${name}, {a, b}.
_BRACES_IN_COMMAND = re.compile(r"(?<!\$)\{([^{}\s'\"$]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")
_BEGINS_A_NAME = re.compile(r"pipe:|https?://|\.{0,2}/|~", re.IGNORECASE)


def _choices(inside: str) -> list[str]:
    """What stands between two braces, written out: `000..003` or `a,b`."""
    span = _RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last, step = span.group(1), span.group(2), int(span.group(3) or 1)
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    low, high = int(first), int(last)
    numbers = range(low, high + 1, step or 1) if low <= high else range(low, high - 1, -(step or 1))
    return [f"{number:0{width}d}" for number in numbers]


def expand_braces(pattern: str) -> list[str]:
    """`"a-{00..02}.tar" -> ["a-00.tar", "a-01.tar", "a-02.tar"]`; also `{a,b}`; several multiply."""
    braces = _BRACES_IN_COMMAND if pattern.startswith("pipe:") else _BRACES
    pieces = braces.split(pattern)  # text, inside, text, inside, ..., text
    options = [[piece] if place % 2 == 0 else _choices(piece) for place, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*options)]


def split_joined(pattern: str) -> list[str]:
    """A pattern cut at its `::`.

    In a command, which may hold `::` itself, it is a join only before what is plainly another name:
    `pipe:`, an address, or a path that begins with `/`, `./`, `../` or `~`.
    """
    parts: list[str] = []
    for part in pattern.split("::"):
        if parts and parts[-1].startswith("pipe:") and not _BEGINS_A_NAME.match(part):
            parts[-1] += "::" + part
        else:
            parts.append(part)
    return parts


def expand(patterns: Patterns, settings: Settings | None = None) -> list[str]:
    """The shards that patterns stand for, in order.

    A pattern is a file, braces (`train-{000..031}.tar`), `*` and `?`, a folder (all its shards, sorted
    by name), an http(s) address (one that ends in `/` is a folder whose `dataset.json` names the
    shards), `pipe:COMMAND`, several of these joined by `::`, or a list of them. Raises UserError naming
    what was looked for when a file is missing or a pattern matches nothing. Addresses are looked at only
    where they are folders.
    """
    given = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    names: list[str] = []
    for pattern in given:
        for part in split_joined(os.fspath(pattern)):
            for name in expand_braces(part) if part else [""]:
                names.extend(_find(name, part, settings or Settings()))
    if not names:
        raise UserError("no shards were named: give a .tar file, a pattern or a folder of .tar files")
    return names


def _find(name: str, pattern: str, settings: Settings) -> list[str]:
    if not name:
        raise UserError("a shard pattern has an empty part: write a file or folder between each '::'")
    scheme = scheme_of(name)
    if scheme == "pipe":
        if not name.removeprefix("pipe:").strip():
            raise UserError("a shard is named 'pipe:' without a command: write pipe:COMMAND")
        return [name]
    return (
        _find_remote(name, settings) if scheme != "file" else _find_local(os.path.expanduser(name), pattern)
    )


def _find_local(name: str, pattern: str) -> list[str]:
    path = Path(name)
    if path.is_file():
        return [name]
    if path.is_dir():
        return _in_folder(path)
    if any(letter in path.name for letter in "*?"):
        found = sorted(str(entry) for entry in path.parent.glob(path.name) if entry.is_file())
        if found:
            return found
        raise UserError(f"no file matches the shard pattern {name}")
    origin = f" (from the pattern '{pattern}')" if pattern != name else ""
    raise UserError(f"shard {name} does not exist{origin}")


def _is_shard(name: str) -> bool:
    stem = name.lower()
    if is_compressed_name(stem):
        return stem.endswith((".tgz", ".tbz", ".tbz2", ".txz", ".tzst")) or Path(stem).stem.endswith(".tar")
    return name.endswith(".tar")


def _in_folder(folder: Path) -> list[str]:
    _check_finished(folder)
    found = sorted(str(entry) for entry in folder.iterdir() if _is_shard(entry.name) and entry.is_file())
    if not found:
        raise UserError(f"folder {folder} holds no .tar shards")
    plain = set(found)
    for name in found:
        if is_compressed_name(name) and os.path.splitext(name)[0] in plain:
            raise UserError(f"folder {folder} holds a shard twice, plain and compressed ({name}): remove one")
    return found


def _check_finished(folder: Path) -> None:
    """A folder of ours is read whole or not at all (see write.py)."""
    if (folder / "dataset.unfinished.json").exists():
        raise UserError(f"the shards in {folder} are not all written: run their conversion to its end first")
    try:
        listed = _listed((folder / "dataset.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return  # not a folder that we wrote
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of its {len(listed)} shards, {missing[0]} for one")


def _listed(content: bytes) -> list[str]:
    """The shards that a `dataset.json` names; ValueError, KeyError or TypeError if it is none."""
    return [str(shard["name"]) for shard in json.loads(content)["shards"]]


def _find_remote(address: str, settings: Settings) -> list[str]:
    parts = urlsplit(address)
    try:
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    if not host:
        raise UserError(f"'{shown(address)}' is not an address: write http(s)://HOST/PATH")
    if "*" in parts.path:
        raise UserError(
            f"'{shown(address)}': servers do not match '*'; use braces ({{000..031}}), or the address "
            "of a folder with a dataset.json, ending in '/'"
        )
    if not parts.path.endswith("/"):
        return [address]
    from vlm_adapt.data.storage.http import read_small

    query = f"?{parts.query}" if parts.query else ""
    content = read_small(urljoin(address, f"dataset.json{query}"), settings)
    if content is None:
        if read_small(urljoin(address, f"dataset.unfinished.json{query}"), settings) is not None:
            raise UserError(
                f"the shards in {shown(address)} are not all written: run their conversion to its end first"
            )
        raise UserError(
            f"{shown(address)} has no dataset.json that would name its shards: name them with braces, as in "
            f"{shown(address)}{{000000..000031}}.tar"
        )
    try:
        names = _listed(content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{shown(address)}dataset.json does not name shards as 'shards write' does"
        ) from error
    if not names:
        raise UserError(f"{shown(address)}dataset.json names no shard")
    return [urljoin(address, name + query) for name in names]
