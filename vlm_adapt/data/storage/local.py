"""Shards that are files of this machine.

Knows files; knows nothing about tar. A plain file is read with `pread`, a compressed one is unpacked
once (spooled.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

from vlm_adapt.data.storage import Settings, Store
from vlm_adapt.data.storage.spooled import open_spooled
from vlm_adapt.data.storage.unpack import LONGEST_MAGIC, compression_of
from vlm_adapt.errors import UserError

_CHUNK = 1 << 18


class LocalStore:
    """An open file. Its descriptor serves forked workers as well: `pread` has no position to share."""

    damage = ""

    def __init__(self, fd: int, size: int, identity: str):
        self.fd, self.size, self.identity = fd, size, identity
        self.pread = partial(os.pread, fd)  # nothing between the reader and the system

    def close(self, close: Callable[[int], None] = os.close) -> None:  # `os` is gone when Python ends
        """Close the file."""
        close(self.fd)


def _identity(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


class _Local:
    """How files are served."""

    def probe(self, name: str, settings: Settings) -> str:
        """Size and time of change of a file."""
        try:
            return _identity(os.stat(name))
        except OSError as error:
            raise UserError(f"cannot open shard {name}: {error.strerror}") from error

    def open_store(self, name: str, settings: Settings, identity: str | None) -> Store:
        """The file itself, or what it unpacks to."""
        try:
            fd = os.open(name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise UserError(f"cannot open shard {name}: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            compressed = compression_of(os.pread(fd, LONGEST_MAGIC, 0))
        except OSError as error:  # a folder, say
            os.close(fd)
            raise UserError(f"cannot read shard {name}: {error.strerror}") from error
        if not compressed:
            return LocalStore(fd, status.st_size, _identity(status))
        os.close(fd)
        return open_spooled(name, settings, _identity(status), lambda: _chunks(name))


def _chunks(name: str) -> Iterator[bytes]:
    try:
        with open(name, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise UserError(f"cannot read shard {name}: {error.strerror}") from error


SCHEME = _Local()
