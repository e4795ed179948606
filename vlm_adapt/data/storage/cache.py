"""A folder of entries that all processes of a machine share, bounded in size.

Knows keys and bytes; knows nothing about what they mean. An entry is written beside its place and
renamed, and ends with its own length and SHA-256, so one that was cut off or damaged is noticed when it
is opened and is fetched again.

    [payload][facts, JSON][length of facts, 4 bytes][mark, 8 bytes]
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_adapt.data.storage.notes import note

MARK = b"VLMSHARD"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHUNK = 1 << 20
_LOW = 0.9  # an eviction goes down to this share of the limit, so that it is not needed at every write
_TOUCH = 60.0  # seconds between two updates of an entry's time of use
_ABANDONED = 24 * 3600.0  # a part of this age belongs to a process that died
_KNOWN = 20_000

# Entries whose digest this process (or the one it was forked from) has checked: path -> (stamp, facts)
_checked: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {}


class NoRoom(OSError):
    """The cache may not hold so much."""


@dataclass
class Entry:
    """An opened entry. It stays readable when it is evicted; `fd` is the caller's to close."""

    fd: int
    size: int
    facts: dict[str, Any]


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[bool]:
    """Hold a file's lock among processes and threads; False if it could not be had in so many seconds."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    held, wait, end = False, 0.001, time.monotonic() + seconds
    try:
        while not held:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                if time.monotonic() >= end:
                    break
                time.sleep(wait)
                wait = min(2 * wait, 0.05)
        yield held
    finally:
        if held:  # said aloud: a child that was forked meanwhile holds the file open too
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


class Cache:
    """Entries by key under a folder.

    Args:
        folder: made when something is written.
        limit_bytes: the most that all entries may hold together.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit = folder, limit_bytes

    def path(self, key: str) -> Path:
        """Where the entry of a key lies."""
        name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / "entries" / name[:2] / name[:40]

    def lock(self, key: str, seconds: float) -> Any:
        """The lock of a key (and of one in a few hundred others): see `locked`."""
        return locked(self.folder / "locks" / self.path(key).name[:2], seconds)

    def open(self, key: str) -> Entry | None:
        """The entry of a key, checked; None if there is none that is whole."""
        path = self.path(key)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            facts = _check(str(path), fd)
        except OSError:
            facts = None
        if facts is None:
            os.close(fd)
            with suppress(OSError):
                path.unlink()
            note(str(path), "a cached file was damaged and is fetched again")
            return None
        status = os.fstat(fd)
        if time.time() - status.st_atime > _TOUCH:
            with suppress(OSError):  # of another user
                os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        return Entry(fd, facts["bytes"], facts)

    def read(self, key: str) -> bytes | None:
        """The whole payload of an entry."""
        entry = self.open(key)
        if entry is None:
            return None
        try:
            return os.pread(entry.fd, entry.size, 0)
        except OSError:
            return None
        finally:
            os.close(entry.fd)

    def write(
        self, key: str, chunks: Iterable[bytes | bytearray], facts: dict[str, Any] | None = None
    ) -> Entry:
        """Make an entry. `facts` is read after the last chunk, so that a source may add to it.

        Raises OSError when there is no room or the folder cannot be written; nothing is left then.
        """
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns():x}.part")
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        taken = 0
        try:
            digest, size = hashlib.sha256(), 0
            for chunk in chunks:
                self._take(len(chunk))
                taken += len(chunk)
                digest.update(chunk)
                self._write(fd, chunk, size)
                size += len(chunk)
            facts = {"bytes": size, "digest": digest.hexdigest(), **(facts or {})}
            end = _ending(facts)
            self._take(len(end))
            taken += len(end)
            self._write(fd, end, size)
            os.replace(part, path)
            _check(str(path), fd, facts)
            return Entry(fd, size, facts)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                part.unlink(missing_ok=True)
            with suppress(OSError):
                self._take(-taken)
            raise

    def forget(self, key: str) -> None:
        """Remove an entry."""
        with suppress(OSError):
            self.path(key).unlink()

    def _write(self, fd: int, data: bytes | bytearray, offset: int) -> None:
        """Write all; when the disk is full before the limit is reached, older entries make room."""
        view = memoryview(data)
        while view:
            try:
                done = os.pwrite(fd, view, offset)
            except OSError as error:
                if error.errno not in NO_SPACE or not self._evict_for(4 * len(view)):
                    raise
                continue
            view, offset = view[done:], offset + done

    def _evict_for(self, size: int) -> bool:
        with locked(self.folder / "lock", 60):
            before = sum(entry[1] for entry in _entries(self.folder))
            after = self._evict(before - size)
            self._set_total(after)
        return after < before

    def _take(self, size: int) -> None:
        """Count bytes as held before they are written. Raises NoRoom if the limit forbids them."""
        with locked(self.folder / "lock", 60):
            total = self._total()
            if total is None or total + size > self.limit:
                total = sum(entry[1] for entry in _entries(self.folder))
                if total + size > self.limit:
                    total = self._evict(int(self.limit * _LOW) - size)
                if total + size > self.limit:
                    self._set_total(total)
                    raise NoRoom(errno.EFBIG, f"the limit of {self.limit:,} bytes is reached")
            self._set_total(max(0, total + size))

    def _total(self) -> int | None:
        try:
            return int((self.folder / "total").read_text())
        except (OSError, ValueError):
            return None  # counted anew

    def _set_total(self, total: int) -> None:
        # Written over, not renamed: the lock is held, and a torn number only means counting anew.
        path = self.folder / "total"
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "w") as file:
                file.write(f"{total:020d}")
        except OSError:  # a full disk: the entry itself may still fit
            with suppress(OSError):
                path.unlink()

    def _evict(self, target: int) -> int:
        """Remove entries, those used longest ago first, until `target` bytes are left; how many are."""
        entries = sorted(_entries(self.folder))
        total = sum(size for _, size, _ in entries)
        for used, size, path in entries:
            part = path.endswith(".part")
            if total <= target and not part:
                break
            if part and time.time() - used < _ABANDONED:
                continue  # being written
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total


def _entries(folder: Path) -> list[tuple[float, int, str]]:
    """`(time of last use, bytes, path)` of all entries."""
    found = []
    for group in _listed(folder / "entries"):
        for entry in _listed(group.path):
            with suppress(OSError):  # evicted meanwhile
                status = entry.stat()
                found.append((max(status.st_atime, status.st_mtime), status.st_size, entry.path))
    return found


def _listed(folder: Path | str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        return []


def _ending(facts: dict[str, Any]) -> bytes:
    text = json.dumps(facts).encode()
    return text + len(text).to_bytes(4, "little") + MARK


def _check(path: str, fd: int, known: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The facts of an open entry, None if it is not whole. Bytes are hashed once a process."""
    status = os.fstat(fd)
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    remembered = _checked.get(path)
    if known is None and remembered and remembered[0] == stamp:
        return remembered[1]
    facts = known or _read_facts(fd, status.st_size)
    if facts is None or (known is None and _digest(fd, facts["bytes"]) != facts["digest"]):
        return None
    _checked[path] = (stamp, facts)
    while len(_checked) > _KNOWN:
        with suppress(KeyError, RuntimeError, StopIteration):  # another thread was faster
            _checked.pop(next(iter(_checked)))
    return facts


def _read_facts(fd: int, size: int) -> dict[str, Any] | None:
    tail = os.pread(fd, 12, max(0, size - 12))
    length = int.from_bytes(tail[:4], "little")
    if len(tail) < 12 or tail[4:] != MARK or length + 12 > size:
        return None
    try:
        facts = json.loads(os.pread(fd, length, size - 12 - length))
    except ValueError:
        return None
    whole = isinstance(facts, dict) and facts.get("bytes") == size - 12 - length and "digest" in facts
    return facts if whole else None


def _digest(fd: int, size: int) -> str:
    digest, position = hashlib.sha256(), 0
    while position < size:
        chunk = os.pread(fd, min(_CHUNK, size - position), position)
        if not chunk:
            break
        digest.update(chunk)
        position += len(chunk)
    return digest.hexdigest()
