"""Bytes of shards by name and offset, wherever they lie: local files, HTTP addresses, commands.

Knows which module serves which name; knows nothing about tar, samples or order. A store is opened by
name; plain local files are read with `pread` and nothing between.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from vlm_adapt.choices import Choices
from vlm_adapt.errors import UserError
from vlm_adapt.folders import cache_root

LIMIT_BYTES = 50_000_000_000

# Each module has `probe(name, settings)` and `open_store(name, settings, identity)`.
SCHEMES = Choices(
    "shard scheme",
    {
        "file": "vlm_adapt.data.storage.local:SCHEME",
        "http": "vlm_adapt.data.storage.blocks:SCHEME",
        "https": "vlm_adapt.data.storage.blocks:SCHEME",
        "pipe": "vlm_adapt.data.storage.pipe:SCHEME",
    },
)


@dataclass(frozen=True)
class Settings:
    """How shards are fetched and kept.

    Args:
        cache: folder of blocks, unpacked shards and indexes; None is `shards` in the cache folder.
        limit_bytes: what all of that may hold; what was used least recently goes first.
        block_bytes: remote shards are fetched in runs of so many bytes.
        retry_seconds: a block that has not come by then, all attempts together, is an error.
        stall_seconds: an attempt is given up when nothing comes for so long.
        pipe_silence: a command that writes nothing for so long is ended.
    """

    cache: str | None = None
    limit_bytes: int = LIMIT_BYTES
    block_bytes: int = 4 << 20
    retry_seconds: float = 120.0
    stall_seconds: float = 20.0
    pipe_silence: float = 300.0

    @property
    def folder(self) -> Path:
        """Where the cache lies."""
        return Path(self.cache).expanduser() if self.cache else cache_root() / "shards"


class Store(Protocol):
    """An opened shard.

    `identity` changes when the content does; `damage` says what of a compressed shard could not be
    unpacked, "" if nothing. `pread(size, offset)` gives fewer bytes only at the end; OSError and UserError
    are its errors.
    """

    size: int
    identity: str
    damage: str

    def pread(self, size: int, offset: int, /) -> bytes:
        """The bytes `[offset, offset + size)`."""

    def close(self) -> None:
        """Give back what the store holds."""


class Scheme(Protocol):
    """How names of one kind are served."""

    def probe(self, name: str, settings: Settings) -> str:
        """What tells today's content of a shard from another day's, without reading it."""

    def open_store(self, name: str, settings: Settings, identity: str | None) -> Store:
        """Open a shard. `identity`, where it is known, saves asking for it again."""


def scheme_of(name: str) -> str:
    """`"file"`, `"http"`, `"https"` or `"pipe"`; UserError for `s3://` and the like."""
    found = re.match(r"(pipe):|([A-Za-z][A-Za-z0-9+.-]*)://", name)
    if not found:
        return "file"
    scheme = (found.group(1) or found.group(2)).lower()
    if scheme not in SCHEMES or scheme == "file":
        raise UserError(
            f"shard '{shown(name)}': '{scheme}' is not read directly; give an http(s) address, a file, or "
            f"pipe:COMMAND that writes the shard"
        )
    return scheme


def is_local(name: str) -> bool:
    """Whether a name is a file or folder of this machine."""
    return scheme_of(name) == "file"


def probe(name: str, settings: Settings) -> str:
    """What tells today's content of a shard from another day's; cheap. UserError if it is not there."""
    scheme: Scheme = SCHEMES.load(scheme_of(name))
    return scheme.probe(name, settings)


def open_store(name: str, settings: Settings, identity: str | None = None) -> Store:
    """Open a shard for reading; UserError if that cannot be done.

    Args:
        identity: of the content that is expected, where that is known. The caller compares it with the
            store's.
    """
    scheme: Scheme = SCHEMES.load(scheme_of(name))
    return scheme.open_store(name, settings, identity)


def shown(name: str) -> str:
    """A name fit for messages: an address without its password and its query, which may hold a token."""
    if not re.match(r"https?://", name, re.IGNORECASE):
        return name
    parts = urlsplit(name)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
