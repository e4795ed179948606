"""The members of a tar archive, found by reading its headers only, and every damage on the way.

Knows ustar, GNU and pax headers and how to find the next good one after a bad one; knows nothing
about samples or keys. On an intact archive it lists what Python's `tarfile` lists; on a damaged one
`tarfile` stops without a word, and this goes on and says so.

    [header 512][data, padded to 512] ... [512 zero bytes][512 zero bytes]
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

Read = Callable[[int, int], bytes]  # (size, offset): fewer bytes at the end only

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
CHUNK = 1 << 20
META_LIMIT = 1 << 20  # a long name or a pax header beyond this is not one: never allocate on its word

_REGULAR = frozenset(b"07\0")
_LINKS = frozenset(b"12")
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, directories, fifos: no data blocks follow
_PAX_RECORD = re.compile(rb"(\d+) ([^=]+)=")


@dataclass(frozen=True)
class Member:
    """A regular file: its bytes are `archive[offset : offset + size]`."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Unreadable:
    """A member that is there and cannot be had as a run of bytes (a link, a sparse file)."""

    name: str
    reason: str


@dataclass(frozen=True)
class Damage:
    """The archive is broken at `offset`: the files on both sides may have lost companions.

    `name` is the member that was cut, where that much is known.
    """

    offset: int
    reason: str
    name: str = ""


@dataclass
class _Header:
    name: str
    size: int
    kind: int


def _text(field: bytes) -> str:
    """A NUL-terminated name; bytes that are not UTF-8 survive as surrogates, as in `tarfile`."""
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """An octal number, or GNU's base-256 form (first byte 0x80 or 0xff) for what octal cannot hold."""
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big")
        return value - 256 ** (len(field) - 1) if field[0] == 0xFF else value
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _parse(block: bytes) -> _Header | None:
    """The header in a block of 512 bytes, or None if its checksum or its numbers are wrong."""
    try:
        checksum, size = _number(block[148:156]), _number(block[124:136])
    except ValueError:
        return None
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if checksum != total:
        # Some old tars summed signed characters.
        high = sum(byte >= 128 for byte in block) - sum(byte >= 128 for byte in block[148:156])
        if checksum != total - 256 * high:
            return None
    if size < 0:
        return None
    kind, name = block[156], _text(block[:100])
    if block[345] and kind not in b"LKS":
        name = f"{_text(block[345:500])}/{name}"
    if kind == 0 and name.endswith("/"):
        kind = ord("5")  # how version 7 wrote a directory
    return _Header(name, size, kind)


def _pax_records(payload: bytes) -> dict[str, str] | None:
    """The records of an extended header, None where they do not follow each other without a gap."""
    records, position = {}, 0
    while position < len(payload) and payload[position]:  # zeros may follow the last one
        match = _PAX_RECORD.match(payload, position)
        length = int(match.group(1)) if match and len(match.group(1)) < 10 else 0
        if match is None or payload[position + length - 1 : position + length] != b"\n":
            return None
        value = payload[match.end() : position + length - 1]
        records[match.group(2).decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        position += length
    return records


def _next_header(read: Read, position: int) -> int | None:
    """The offset of the first plausible header at or after `position` (a multiple of 512), or None."""
    while chunk := read(CHUNK, position):
        found = chunk.find(b"ustar")
        while found >= 0:
            start = found - 257
            if start >= 0 and start % BLOCK == 0 and len(chunk) >= start + BLOCK:
                if _parse(chunk[start : start + BLOCK]):
                    return position + start
            found = chunk.find(b"ustar", found + 1)
        position += CHUNK
    return None


def _is_zero_from(read: Read, position: int) -> bool:
    while chunk := read(CHUNK, position):
        if chunk.count(0) != len(chunk):
            return False
        position += len(chunk)
    return True


def _sparse(pax: dict[str, str], kind: int) -> bool:
    return kind == ord("S") or any(name.startswith("GNU.sparse.") for name in pax)


def scan(source: int | Read, length: int) -> Iterator[Member | Unreadable | Damage]:
    """Yield the members of an archive of `length` bytes in order, and each damage in place.

    Args:
        source: an open file, or `read(size, offset)`.
        length: bytes of the archive.

    After a bad header the scan goes on at the next block that is a header with a right checksum. (An
    archive stored inside a damaged member could be taken for such; the damage before it is reported.)
    tar sums its headers, but not what an extended header holds: a damaged long name is a wrong name.
    """
    read: Read = partial(os.pread, source) if isinstance(source, int) else source
    position, everywhere = 0, dict[str, str]()
    records: dict[str, str] | None = None
    pax, long_name = dict[str, str](), None
    while True:
        block = read(BLOCK, position)
        if len(block) < BLOCK:
            # A header never begins with a zero byte: one is enough to know that the end had begun.
            if not block.startswith(b"\0"):
                yield Damage(position, "cut off: the end-of-archive mark is missing")
            return
        if block == ZERO_BLOCK and _is_zero_from(read, position):
            return
        header = _parse(block) if block != ZERO_BLOCK else None
        payload = b""
        if header and header.kind in b"LKxXg":
            payload = read(min(header.size, META_LIMIT), position + BLOCK)
            if header.size > META_LIMIT:
                header = None
            elif len(payload) < header.size:
                yield Damage(position, "cut off inside an extended header")
                return
            elif header.kind in b"xXg":
                records = _pax_records(payload)
                if records is None:
                    header = None
        if header is None:
            following = _next_header(read, position + BLOCK)
            what = "corrupt header"
            if block == ZERO_BLOCK:
                what = "data after an end-of-archive mark (joined archives?)"
            if following is None:
                what = "not a tar archive" if position == 0 else f"{what}, and no good header after it"
                yield Damage(position, what)
                return
            yield Damage(position, f"{what} ({following - position:,} bytes skipped)")
            position, pax, long_name = following, {}, None
            continue
        after = position + BLOCK + -(-header.size // BLOCK) * BLOCK
        if header.kind in b"LKxXg":
            if header.kind == ord("L"):
                long_name = _text(payload)
            elif header.kind == ord("g"):
                everywhere.update(records or {})
            elif header.kind in b"xX":
                pax.update(records or {})
            position = after
            continue
        pax = {**everywhere, **pax}
        name, size = pax.get("path", long_name if long_name is not None else header.name), header.size
        if pax.get("size", "").isdigit():
            size = int(pax["size"])
        start = position + BLOCK
        if header.kind in _WITHOUT_DATA:
            after = start
        else:
            after = start + -(-size // BLOCK) * BLOCK
            if start + size > length:
                yield Damage(position, "cut off inside a member", name)
                return
        if header.kind in _LINKS:
            yield Unreadable(name, "a member is a link: store files, not links")
        elif _sparse(pax, header.kind):
            yield Unreadable(name, "a member is a sparse file: write the archive without --sparse")
            if header.kind == ord("S"):
                after += _sparse_blocks(read, block, start) * BLOCK
        elif header.kind in _REGULAR and not name.endswith("/"):
            yield Member(name, start, size)
        position, pax, long_name = after, {}, None


def _sparse_blocks(read: Read, block: bytes, start: int) -> int:
    """How many blocks of GNU sparse map follow the header before the data."""
    count, more = 0, block[482]
    while more:
        extension = read(BLOCK, start + count * BLOCK)
        count += 1
        more = extension[504] if len(extension) == BLOCK else 0
    return count
