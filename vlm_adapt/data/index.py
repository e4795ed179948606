"""The index of a tar shard: beside it, from the cache, or built by reading its headers.

Knows where an index may be found and when it fits; knows nothing about its arrays (shard_index.py) or
how members make samples (grouping.py).

A sidecar `NAME.tar.index.npz` is used when it fits the shard beside it: the same size, and the same
blocks at a few places. It is ignored, with a note, when it does not.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from vlm_adapt.data.grouping import group, split_name
from vlm_adapt.data.problems import Problem
from vlm_adapt.data.shard_index import FORMAT, ShardIndex, from_bytes, marks_of
from vlm_adapt.data.storage import Settings, is_local, open_store, probe, scheme_of, shown
from vlm_adapt.data.storage.cache import Cache
from vlm_adapt.data.storage.http import Content, read_range, read_small
from vlm_adapt.data.storage.notes import note
from vlm_adapt.data.storage.spooled import cannot_keep
from vlm_adapt.data.storage.unpack import is_compressed_name
from vlm_adapt.data.tar import BLOCK
from vlm_adapt.errors import UserError

__all__ = ["ShardIndex", "build_index", "load_index", "split_name", "write_sidecar"]

SIDECAR = ".index.npz"
WORTH_KEEPING = 1000  # members; the index of a smaller local shard is sooner built than found


def build_index(
    path: str | os.PathLike[str], settings: Settings | None = None, source: str | None = None
) -> ShardIndex:
    """Scan the headers of a shard; of a local one no member's data is read.

    Args:
        path: of the shard.
        settings: of its storage.
        source: what `probe` said of it, if it was asked.

    Raises UserError if the shard cannot be opened; any damage becomes `problems`.
    """
    name = os.fspath(path)
    store = open_store(name, settings or Settings(), source)
    try:
        groups, problems = group(shown(name), store.pread, store.size)
        if store.damage:
            problems.insert(0, Problem(shown(name), "", store.damage))
        return ShardIndex.of(name, store.size, store.identity, groups, problems)
    except OSError as error:
        raise UserError(f"cannot read shard {shown(name)}: {error.strerror}") from error
    finally:
        store.close()


def _cache_key(name: str, source: str) -> str:
    whose = os.path.abspath(name) if is_local(name) else name
    return f"index {FORMAT} {whose} {source}"


def forget_index(name: str, source: str, settings: Settings) -> None:
    """Remove an index from the cache: its shard turned out to be another."""
    Cache(settings.folder, settings.limit_bytes).forget(_cache_key(name, source))


def load_index(
    path: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
) -> ShardIndex:
    """The index of a shard: from the cache if its content was indexed before, from its sidecar, or built.

    "The same content" is a file's absolute path, size and time of change; an address and its size and
    ETag; a command.

    Args:
        path: of the shard.
        cache: the cache folder; None is the usual one, and indexes of small local shards are not kept.
        settings: in place of `cache`.

    Raises UserError if the shard cannot be read.
    """
    name = os.fspath(path)
    settings = settings or Settings(cache=os.fspath(cache) if cache is not None else None)
    source = probe(name, settings)
    kept, key = Cache(settings.folder, settings.limit_bytes), _cache_key(name, source)
    data = kept.read(key)
    found = from_bytes(data, name) if data is not None else None
    if found:
        return found[0]
    index = _from_sidecar(name, source, settings)
    local = is_local(name)
    if index is not None and local:
        return index
    index = index or build_index(name, settings, source)
    if local and settings.cache is None and len(index.offset) < WORTH_KEEPING:
        return index
    # What a file held before it was changed meanwhile must not be kept as what it holds now.
    if index.identity == source or not local or index.identity.startswith("spooled "):
        try:
            os.close(kept.write(key, [index.to_bytes()]).fd)
        except OSError as error:
            cannot_keep(settings, error)
    return index


def sidecar_name(name: str) -> str | None:
    """Where the sidecar of a shard would lie; None for a command or a compressed shard."""
    scheme = scheme_of(name)
    if scheme == "pipe":
        return None
    if scheme == "file":
        return None if is_compressed_name(name) else name + SIDECAR
    parts = urlsplit(name)
    return None if is_compressed_name(parts.path) else urlunsplit(parts._replace(path=parts.path + SIDECAR))


def _from_sidecar(name: str, source: str, settings: Settings) -> ShardIndex | None:
    """The index beside a shard, if there is one and it fits."""
    place = sidecar_name(name)
    if place is None:
        return None
    content = None if is_local(name) else Content.parse(source)
    if content is None:
        try:
            data: bytes | None = Path(place).read_bytes()
        except OSError:
            return None
    elif content.ranges:
        data = read_small(place, settings)
    else:  # the shard has to be fetched whole in any case
        return None
    if data is None:
        return None
    found = from_bytes(data, name)
    if found is None:
        note(shown(place), "an index beside a shard is not one of this version and is not used")
        return None
    index, marks = found
    if not _fits(index, marks, name, content, settings):
        note(shown(place), "an index does not fit the shard beside it and is not used")
        return None
    return replace(index, identity=source)


def _fits(
    index: ShardIndex, marks: list[tuple[int, int]], name: str, content: Content | None, settings: Settings
) -> bool:
    if not marks and index.file_bytes >= BLOCK:
        return False
    if content is not None:  # two small requests: what differs elsewhere moves what lies last
        if content.size != index.file_bytes:
            return False
        return all(
            zlib.crc32(read_range(name, place, BLOCK, settings, content)) == checksum
            for place, checksum in marks[-2:]
            if place + BLOCK <= index.file_bytes
        )
    store = open_store(name, settings)
    try:
        return store.size == index.file_bytes and all(
            zlib.crc32(store.pread(BLOCK, place)) == checksum for place, checksum in marks
        )
    except OSError as error:
        raise UserError(f"cannot read shard {name}: {error.strerror}") from error
    finally:
        store.close()


def write_sidecar(path: str | os.PathLike[str]) -> Path:
    """Write the index of a local shard beside it, atomically; the same shard gives the same bytes.

    Returns the sidecar's path. UserError if the shard is compressed or remote, or cannot be read, or the
    sidecar cannot be written.
    """
    name = os.fspath(path)
    if not is_local(name):
        raise UserError(f"an index is written beside local shards only, and {shown(name)} is none")
    index = build_index(name)
    if index.identity.startswith("spooled "):
        raise UserError(
            f"shard {name} is compressed: an index beside it would save nothing, so unpack it first"
        )
    with open(name, "rb") as file:
        marks = marks_of(index, lambda size, offset: os.pread(file.fileno(), size, offset))
    index = replace(index, identity="")  # it holds the time of change, which a copy does not share
    target, temporary = Path(name + SIDECAR), None
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        with open(fd, "wb") as file:
            file.write(index.to_bytes(marks))
            file.flush()
            os.fsync(fd)
        os.chmod(temporary, os.stat(name).st_mode & 0o666)
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    return target
