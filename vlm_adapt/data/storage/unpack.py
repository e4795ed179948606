"""Compressed streams to plain ones: gzip, bzip2 and xz, by their first bytes.

Knows the three formats of the standard library; knows nothing about files. What could be unpacked before
a damage is kept, and the damage is told.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from vlm_adapt.data.storage import shown
from vlm_adapt.errors import UserError

COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".tzst")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LONGEST_MAGIC = max(map(len, _MAGIC))
_MOST = 1 << 20  # unpacked bytes at a time: a small file may unpack to gigabytes


class _Gunzip:
    """zlib behind the interface of the other two."""

    def __init__(self) -> None:
        self.inner, self.tail, self.full = zlib.decompressobj(wbits=31), b"", False

    def decompress(self, data: bytes, most: int) -> bytes:
        out = self.inner.decompress(self.tail + data, most)
        self.tail, self.full = self.inner.unconsumed_tail, len(out) == most
        return out

    @property
    def needs_input(self) -> bool:
        return not self.tail and not self.full

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data


_MAKERS: dict[str, Any] = {"gzip": _Gunzip, "bzip2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}


def is_compressed_name(name: str) -> bool:
    """Whether a shard's name says that it is compressed."""
    return name.lower().endswith(COMPRESSED)


def compression_of(start: bytes) -> str:
    """The name of a compression by the first bytes of a file, "" if it is none."""
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")


def unpacked(name: str, chunks: Iterable[bytes], facts: dict[str, Any]) -> Iterator[bytes]:
    """The plain bytes of a stream, which may be plain already.

    A damage ends the stream, and `facts["damage"]` says what it was. UserError for zstd.
    """
    source = iter(chunks)
    start = b""
    while len(start) < LONGEST_MAGIC and (chunk := next(source, b"")):
        start += chunk
    kind = compression_of(start)
    if kind == "zstd":
        raise UserError(
            f"shard {shown(name)} is compressed with zstd, which Python's library does not unpack: "
            "name it as 'pipe:zstd -dc FILE', or compress it with gzip"
        )
    if not kind:
        if start:
            yield start
        yield from source
        return
    data = start
    while data:  # one round for each compressed stream: several may be joined
        unpacker = _MAKERS[kind]()
        try:
            while not unpacker.eof:
                if unpacker.needs_input and not data:
                    data = next(source, b"")
                    if not data:
                        facts["damage"] = f"the {kind} file is cut off"
                        return
                out = unpacker.decompress(data, _MOST)
                data = b""
                if out:
                    yield out
        except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
            if isinstance(error, UserError):
                raise  # of the source
            facts["damage"] = f"the {kind} file is damaged: {error}"
            return
        data = unpacker.unused_data.lstrip(b"\0")
        while len(data) < LONGEST_MAGIC and (more := next(source, b"")):
            data = (data + more).lstrip(b"\0")
        if data and compression_of(data) != kind:
            facts["damage"] = f"the {kind} file goes on with other data after its end"
            return
