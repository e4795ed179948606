"""Samples to tar shards of bounded size, each whole or not there at all.

Knows the tar format and how to finish a file safely; knows nothing about where samples come from
(convert/) or whether they make sense (sample.py). The same samples give the same bytes.

A folder of shards belongs to one conversion. `dataset.json` is written last and says that it is
finished; until then `dataset.unfinished.json` says whose the shards are.
"""

from __future__ import annotations

import errno
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from vlm_adapt.errors import UserError

SUMMARY, UNFINISHED = "dataset.json", "dataset.unfinished.json"
_SHARD = re.compile(r"\d{6,}(_\d{3,})?\.tar")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME, _SIZE, _SUM = 100, slice(124, 136), slice(148, 156)  # of a tar header: the name's end, size, checksum
_LARGEST = 8**11  # what the size field can say


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Errors of the file system as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(f"no space left to write {path}: free some or choose another folder") from error
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, content: Mapping[str, Any], sync: bool = True) -> None:
    """Write a JSON file atomically.

    Args:
        sync: wait until it is on the disk; not for what is written again if it should be lost.
    """
    temporary = path.with_name(f".{path.name}.part")
    with clear_errors(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, ensure_ascii=False)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def check_bounds(max_bytes: int, max_count: int) -> None:
    """UserError if a shard so bounded could hold nothing."""
    if max_bytes < 1 or max_count < 1:
        raise UserError(f"a shard must hold something: max_bytes {max_bytes}, max_count {max_count}")


def shards_in(folder: Path) -> list[Path]:
    """Shards that were written here; UserError if other archives lie among them."""
    present = sorted(folder.glob("*.tar"))
    foreign = [path.name for path in present if not _SHARD.fullmatch(path.name)]
    if foreign:  # not even overwrite may remove what was never written here
        raise UserError(f"{folder} holds other archives ({foreign[0]}): choose another folder")
    return present


def check_folder(folder: Path, overwrite: bool) -> None:
    """UserError if shards lie in the folder that may not be replaced."""
    present = shards_in(folder)
    if present and not overwrite:
        raise UserError(
            f"{folder} already holds {len(present)} shard(s): choose another folder or say overwrite"
        )


def remove_shards(folder: Path, keep: frozenset[str] = frozenset()) -> None:
    """Remove shards and what was left half-written, but not the files named in `keep`.

    The summary goes first: what is left then is not a finished set.
    """
    from vlm_adapt.data.index import SIDECAR

    with clear_errors(folder):
        (folder / SUMMARY).unlink(missing_ok=True)
        for path in [*shards_in(folder), *folder.glob(".*.part")]:
            if path.name not in keep:
                path.unlink()
                if path.suffix == ".tar":
                    path.with_name(path.name + SIDECAR).unlink(missing_ok=True)


def _to_bytes(key: str, name: str, value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    if name == "json" or name.endswith(".json"):
        return json.dumps(value, ensure_ascii=False).encode()
    raise TypeError(f"member '{name}' of sample '{key}' is a {type(value).__name__}, not bytes or text")


def _tarfile_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644  # owner, group and time stay 0: same bytes every time
    return info.tobuf(tarfile.PAX_FORMAT)


_EMPTY = _tarfile_header("", 0)
_EMPTY_SUM = sum(_EMPTY) - sum(_EMPTY[_SIZE]) - sum(_EMPTY[_SUM]) + 8 * ord(" ")


def _header(name: str, size: int) -> bytes:
    """What tarfile writes before a file of this name: the same bytes in a tenth of its time."""
    if len(name) > _NAME or not name.isascii() or size >= _LARGEST:
        return _tarfile_header(name, size)
    plain = name.encode("ascii")
    octal = b"%011o\0" % size
    checksum = b"%06o\0 " % (_EMPTY_SUM + sum(plain) + sum(octal))
    start, middle, end = _EMPTY[_NAME : _SIZE.start], _EMPTY[_SIZE.stop : _SUM.start], _EMPTY[_SUM.stop :]
    return b"".join((plain.ljust(_NAME, b"\0"), start, octal, middle, checksum, end))


def encode_sample(sample: Mapping[str, Any]) -> bytes:
    """A sample as it lies in a tar, headers and all.

    Args:
        sample: `{"__key__": key, extension: content, ...}`: bytes, text, or for `json` any JSON value.

    Raises:
        UserError: a key or an extension that webdataset would misread, or no members. It cuts a key at
            the first dot of its base name, so a key with a dot there is refused.
    """
    key = sample["__key__"]
    base = key.rsplit("/", 1)[-1]
    if not base or "." in base or key.startswith(("/", "__")) or "\0" in key:
        raise UserError(f"'{key}' cannot be a key: it needs a base name without dots")
    blocks: list[bytes] = []
    for name, value in sample.items():
        if name == "__key__":
            continue
        if name != name.lower() or "/" in name or not name:
            raise UserError(f"'{name}' in sample '{key}' cannot be an extension: use lower case, no '/'")
        data = _to_bytes(key, name, value)
        blocks += [_header(f"{key}.{name}", len(data)), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    if not blocks:
        raise UserError(f"sample '{key}' has no members")
    return b"".join(blocks)


class Shard:
    """One shard while it is written, under a name that readers do not look for.

    Args:
        path: its final name, which it gets from `finish` only.
    """

    def __init__(self, path: Path):
        self.path, self.keys, self.bytes = path, set[str](), 0
        self._temporary = path.with_name(f".{path.name}.part")
        with clear_errors(path):
            self._file: BinaryIO = open(self._temporary, "wb")

    def write(self, key: str, content: bytes) -> None:
        """Add an encoded sample. UserError if the disk is full (nothing half-written stays) or the key is
        there already."""
        if key in self.keys:
            raise UserError(f"two samples have the key '{key}' in {self.path}: make keys unique")
        try:
            with clear_errors(self.path):
                self._file.write(content)
        except BaseException:
            self.discard()
            raise
        self.keys.add(key)
        self.bytes += len(content)

    def finish(self) -> dict[str, Any]:
        """End mark, final name, index; returns `{name, samples, bytes}`."""
        from vlm_adapt.data.index import write_sidecar  # numpy and more, which `--help` need not load

        try:
            with clear_errors(self.path):
                end = self.bytes + 2 * tarfile.BLOCKSIZE
                self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
                self._file.flush()
                os.fsync(self._file.fileno())
                size = self._file.tell()
                self._file.close()
                os.replace(self._temporary, self.path)
                write_sidecar(self.path)
        except BaseException:
            self.discard()
            raise
        return {"name": self.path.name, "samples": len(self.keys), "bytes": size}

    def discard(self) -> None:
        """Give it up."""
        with suppress(OSError):  # closing may try once more to write to a full disk
            self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


class ShardWriter:
    """Writes samples to `folder/000000.tar`, `000001.tar`, ...; a context manager.

    Args:
        folder: made if it is not there.
        max_bytes, max_count: a shard is finished before it would hold more (one sample always fits).
        overwrite: remove shards that are there already; without it they are an error.
        unfinished: written to `dataset.unfinished.json` before anything else; whoever gave it removes
            it when the set is complete. Readers refuse a folder that has it.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int = 256 << 20,
        max_count: int = 10_000,
        overwrite: bool = False,
        unfinished: Mapping[str, Any] | None = None,
    ):
        check_bounds(max_bytes, max_count)
        self.folder, self.max_bytes, self.max_count = Path(folder), max_bytes, max_count
        self.shards: list[dict[str, Any]] = []
        with clear_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        check_folder(self.folder, overwrite)
        if unfinished is not None:
            write_json(self.folder / UNFINISHED, unfinished)
        remove_shards(self.folder)
        self._shard: Shard | None = None

    @property
    def count(self) -> int:
        """Samples written so far, the open shard's included."""
        return sum(shard["samples"] for shard in self.shards) + (len(self._shard.keys) if self._shard else 0)

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample (see `encode_sample`); members are written in the order given."""
        content = encode_sample(sample)
        if self._shard and (
            self._shard.bytes + len(content) > self.max_bytes or len(self._shard.keys) >= self.max_count
        ):
            self.close()
        if self._shard is None:
            self._shard = Shard(self.folder / f"{len(self.shards):06d}.tar")
        self._shard.write(sample["__key__"], content)

    def close(self) -> None:
        """Finish the last shard."""
        if self._shard is not None:
            self.shards.append(self._shard.finish())
            self._shard = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self._shard is not None:
            self._shard.discard()
            self._shard = None
