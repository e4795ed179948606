"""The cache folder: finished entries only, safe when several processes want the same one.

An entry is built in a folder beside its place, hashed into a receipt, flushed, and renamed. Knows
nothing about packages' contents or about networks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlm_adapt.errors import UserError
from vlm_adapt.folders import cache_root

RECEIPT = "receipt.json"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def root() -> Path:
    """The cache folder; see folders.py."""
    return cache_root()


def sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def megabytes(size: float) -> str:
    """`93 MB`, in units of a million bytes as pip counts them."""
    return f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def no_room(folder: Path) -> UserError:
    """The sentence for a full disk."""
    try:
        free = f"{megabytes(shutil.disk_usage(folder).free)} free"
    except OSError:
        free = "free space unknown"
    return UserError(
        f"not enough room in {folder} ({free}): free some space, or point VLM_ADAPT_CACHE at another disk; "
        "nothing half-written was kept"
    )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a full disk or a folder that may not be written into one clear sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise no_room(folder) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(
                f"cannot write to the cache folder {folder} ({error.strerror}): "
                "point VLM_ADAPT_CACHE at a folder of yours"
            ) from error
        raise
    except Exception as error:
        # safetensors reports the operating system's error only in its text.
        if type(error).__module__.startswith("safetensors") and "(os error 28)" in str(error):
            raise no_room(folder) from error
        raise


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the lock of one entry among processes; says so on stderr when it has to wait.

    The operating system releases it when its holder dies, however that happens.
    """
    import filelock

    folder = root() / "locks"
    with writing(root()):
        folder.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(folder / f"{name}.lock")
        try:
            held.acquire(timeout=0)
        except filelock.Timeout:
            print(f"waiting for another process that is fetching {name}", file=sys.stderr, flush=True)
            held.acquire()
    try:
        yield
    finally:
        held.release()


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a finished entry, or None if there is none that can be read."""
    try:
        receipt = json.loads((folder / RECEIPT).read_bytes())
    except (OSError, ValueError):
        return None
    return receipt if isinstance(receipt, dict) and isinstance(receipt.get("files"), dict) else None


def faults(folder: Path, identity: dict[str, Any], deep: bool = False) -> list[str]:
    """What is wrong with an entry; empty when it is whole.

    Args:
        folder: the entry.
        identity: what its receipt must say (name, version, format, archive's sha256).
        deep: also hash every file; otherwise only sizes are compared, which takes milliseconds.
    """
    receipt = read_receipt(folder)
    if receipt is None:
        return [f"no readable {RECEIPT}"]
    found = [f"{key} differs" for key, value in identity.items() if receipt.get(key) != value]
    base = str(folder) + os.sep
    for name, facts in receipt["files"].items():
        try:
            size = os.stat(base + name).st_size
        except OSError:
            found.append(f"{name} is missing")
            continue
        if size != facts["size"]:
            found.append(f"{name} has {size} bytes instead of {facts['size']}")
        elif deep and sha256(folder / name) != facts["sha256"]:
            found.append(f"{name} has other contents than when it was written")
    return found


def remove(folder: Path) -> None:
    """Delete a folder if it is there; its receipt goes first, so that a cut leaves no whole entry."""
    (folder / RECEIPT).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def _seal(folder: Path, identity: dict[str, Any]) -> None:
    """Hash and flush everything in `folder` and write its receipt."""
    mask = os.umask(0)
    os.umask(mask)
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        path.chmod(0o666 & ~mask)  # some writers make private files; a cache may be shared
        size = path.stat().st_size
        files[path.relative_to(folder).as_posix()] = {"sha256": sha256(path), "size": size}
        # Thousands of tiny images would take thousands of flushes. A crash leaves an unflushed file
        # empty, which the check of sizes notices.
        if size >= 1 << 16:
            _flush(path)
    text = json.dumps({**identity, "files": files}, indent=0)
    (folder / RECEIPT).write_text(text, encoding="utf-8")
    _flush(folder / RECEIPT)
    _flush(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(name: str, identity: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Make the entry `name` by `build(empty folder)` and put it in its place at once; returns the place.

    The caller holds the entry's lock, so whatever lies in the building folder is left from a process
    that died. A build that fails, for whatever reason, leaves nothing.

    Raises:
        UserError: if the disk is full or may not be written.
    """
    place, building = root() / name, root() / f"building-{name}"
    try:
        with writing(root()):
            remove(building)
            building.mkdir(parents=True)
            build(building)
            _seal(building, identity)
            remove(place)
            os.rename(building, place)
            _flush(place.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return place
