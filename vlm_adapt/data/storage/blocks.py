"""Shards at HTTP addresses as blocks of a few MiB, each fetched once a machine and kept in the cache.

Knows which block a byte lies in and where blocks are kept; knows nothing about requests (http.py). A
server that knows no ranges is read whole (spooled.py), and so is a compressed shard.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from vlm_adapt.data.storage import Settings, Store
from vlm_adapt.data.storage.cache import Cache
from vlm_adapt.data.storage.http import Content, look, read_range, stream
from vlm_adapt.data.storage.spooled import cannot_keep, open_spooled, source_of
from vlm_adapt.data.storage.unpack import is_compressed_name

OPEN_BLOCKS = 16  # per thread; an evicted block keeps its place on the disk while it is open
IN_MEMORY = 4  # per thread, where the cache cannot be written


def _close(block: int | bytes, close: Callable[[int], None] = os.close) -> None:
    if isinstance(block, int):
        close(block)


class _Blocks(threading.local):
    """The blocks a thread read last: descriptors of cached ones, or bytes."""

    def __init__(self) -> None:
        self.held: OrderedDict[str, int | bytes] = OrderedDict()

    def get(self, key: str) -> int | bytes | None:
        block = self.held.get(key)
        if block is not None:
            self.held.move_to_end(key)
        return block

    def put(self, key: str, block: int | bytes) -> None:
        self.held[key] = block
        if isinstance(block, bytes):
            loose = [key for key, one in self.held.items() if isinstance(one, bytes)]
            for old in loose[:-IN_MEMORY]:
                del self.held[old]
        while len(self.held) > OPEN_BLOCKS:
            _close(self.held.popitem(last=False)[1])

    def clear(self, close: Callable[[int | bytes], None] = _close) -> None:
        """Let go of all."""
        while self.held:
            close(self.held.popitem()[1])

    __del__ = clear  # when a thread ends, or Python, where a module's names are gone already


_blocks = _Blocks()


class HttpStore:
    """A shard that is read by range requests."""

    damage = ""

    def __init__(self, address: str, settings: Settings, content: Content):
        assert content.size is not None
        self.address, self.settings, self.content = address, settings, content
        self.size, self.identity = content.size, str(content)
        self.cache = Cache(settings.folder, settings.limit_bytes)
        self.key = f"block {address} {content} {settings.block_bytes}"
        self._place = f"{settings.folder} {self.key}"  # two caches, two blocks

    def pread(self, size: int, offset: int, /) -> bytes:
        """The bytes `[offset, offset + size)`, fewer at the end. UserError if the server fails for long."""
        end = min(offset + size, self.size)
        unit = self.settings.block_bytes
        pieces = []
        while offset < end:
            number, start = divmod(offset, unit)
            length = min(end - offset, unit - start)
            pieces.append(self._read(number, start, length))
            offset += length
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Nothing: blocks are the thread's."""

    def _read(self, number: int, start: int, length: int) -> bytes:
        place = f"{self._place} {number}"
        block = _blocks.get(place)
        if block is None:
            block = self._block(number)
            _blocks.put(place, block)
        if isinstance(block, bytes):
            return block[start : start + length]
        return os.pread(block, length, start)

    def _block(self, number: int) -> int | bytes:
        """A block from the cache, or fetched into it; as bytes where the cache does not work."""
        key, data = f"{self.key} {number}", None
        entry = self.cache.open(key)
        if entry is not None:
            return entry.fd
        try:
            # Where another process fetches it already, wait for that one; but not for ever.
            with self.cache.lock(key, self.settings.retry_seconds):
                entry = self.cache.open(key)
                if entry is None:
                    data = self._fetch(number)
                    entry = self.cache.write(key, [data])
                return entry.fd
        except OSError as error:
            cannot_keep(self.settings, error)
        return bytes(self._fetch(number) if data is None else data)

    def _fetch(self, number: int) -> bytearray:
        unit = self.settings.block_bytes
        size = min(unit, self.size - number * unit)
        return read_range(self.address, number * unit, size, self.settings, self.content)


class _Http:
    """How addresses are served."""

    def probe(self, name: str, settings: Settings) -> str:
        """Size and ETag (else time of change) of an address."""
        return str(look(name, settings))

    def open_store(self, name: str, settings: Settings, identity: str | None) -> Store:
        """By ranges where that can be, else unpacked or copied whole."""
        content = Content.parse(source_of(identity)) if identity else look(name, settings)
        if content.ranges and not is_compressed_name(urlsplit(name).path):
            return HttpStore(name, settings, content)
        return open_spooled(name, settings, str(content), lambda: stream(name, settings, content))


SCHEME = _Http()
