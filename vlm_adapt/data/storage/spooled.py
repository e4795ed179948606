"""Shards that cannot be read in place: compressed ones, and those of servers without ranges or commands.

Knows how to unpack a stream and to lay it in the cache once; knows nothing about where streams come
from. What was evicted is made again, and its identity holds the checksum of what came out.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vlm_adapt.data.storage import Settings, Store, is_local, shown
from vlm_adapt.data.storage.cache import Cache
from vlm_adapt.data.storage.notes import note
from vlm_adapt.data.storage.unpack import unpacked
from vlm_adapt.errors import UserError

_PATIENCE = 3600.0  # seconds to wait for another process that unpacks the same shard


class SpooledStore:
    """An unpacked shard: a file of the cache, which may have lost its name meanwhile."""

    def __init__(self, fd: int, size: int, digest: str, source: str, damage: str):
        self.fd, self.size, self.damage = fd, size, damage
        self.identity = f"spooled {size} {digest[:32]} of {source}"

    def pread(self, size: int, offset: int, /) -> bytes:
        """The bytes `[offset, offset + size)`; what follows in the file is the cache's."""
        return os.pread(self.fd, max(0, min(size, self.size - offset)), offset)

    def close(self, close: Callable[[int], None] = os.close) -> None:  # `os` is gone when Python ends
        """Close the file."""
        close(self.fd)


def source_of(identity: str) -> str:
    """The identity of what a spooled shard was made from; other identities are their own."""
    return identity.partition(" of ")[2] if identity.startswith("spooled ") else identity


def cannot_keep(settings: Settings, error: OSError) -> None:
    """Say that the cache does not work, and why; the reading goes on without it."""
    if settings.limit_bytes > 0:  # 0 was asked for
        note(
            str(settings.folder),
            "the cache cannot be written, what is read is not kept",
            error.strerror or "",
        )


def open_spooled(name: str, settings: Settings, source: str, chunks: Callable[[], Iterator[bytes]]) -> Store:
    """A shard from the cache, or made by `chunks()` (unpacked if compressed) and laid there.

    Args:
        name: of the shard.
        source: what tells the content of the source from another's.
        chunks: its bytes in order; raises UserError.
    """
    whose = os.path.abspath(name) if is_local(name) else name
    key, cache = f"spool {whose} {source}", Cache(settings.folder, settings.limit_bytes)
    facts: dict[str, Any] = {}
    try:
        entry = cache.open(key)
        if entry is None:
            with cache.lock(key, _PATIENCE):
                entry = cache.open(key) or cache.write(key, unpacked(name, chunks(), facts), facts)
        return SpooledStore(
            entry.fd, entry.size, entry.facts["digest"], source, entry.facts.get("damage", "")
        )
    except OSError as error:
        cannot_keep(settings, error)
    facts = {}
    try:
        fd, size, digest = _nameless(unpacked(name, chunks(), facts))
    except OSError as error:
        raise UserError(
            f"shard {shown(name)} must be unpacked to be read, and there is no room for it in "
            f"{settings.folder} nor in {tempfile.gettempdir()}: {error.strerror}; free some space"
        ) from error
    return SpooledStore(fd, size, digest, source, facts.get("damage", ""))


def _nameless(chunks: Iterable[bytes]) -> tuple[int, int, str]:
    """`(fd, bytes, digest)` of a file without a name, for what the cache cannot hold."""
    digest, size = hashlib.sha256(), 0
    with tempfile.TemporaryFile() as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        return os.dup(file.fileno()), size, digest.hexdigest()
