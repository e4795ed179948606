"""Samples to tar shards of bounded size, each whole or not there at all.

Knows the tar format and how to finish a file safely; knows nothing about where samples come from
(convert/) or whether they make sense (sample.py). The same samples give the same bytes.

A folder of shards belongs to one conversion. `dataset.json` is written last and says that it is
finished; until then `dataset.unfinished.json` says whose the shards are.
"""

from __future__ import annotations

import errno
import io
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
_SHARD = re.compile(r"\d{6,}\.tar")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Errors of the file system as one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(f"no space left to write {path}: free some or choose another folder") from error
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f".{path.name}.part")
    with clear_errors(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def _to_bytes(key: str, name: str, value: Any) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        return value.encode()
    if name == "json" or name.endswith(".json"):
        return json.dumps(value, ensure_ascii=False).encode()
    raise TypeError(f"member '{name}' of sample '{key}' is a {type(value).__name__}, not bytes or text")


class ShardWriter:
    """Writes samples to `folder/000000.tar`, `000001.tar`, ...; a context manager.

    Args:
        folder: made if it is not there.
        max_bytes, max_count: a shard is finished before it would hold more (one sample always fits).
        overwrite: remove shards that are there already; without it they are an error.
        unfinished: written to `dataset.unfinished.json` before anything else; whoever gave it removes
            it when the set is complete. Readers refuse a folder that has it.

    A sample is `{"__key__": key, extension: content, ...}`: bytes, text, or for `json` any JSON value;
    members are written in the order given. webdataset cuts a key at the first dot of its base name, so
    a key with a dot there is refused.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int = 256 << 20,
        max_count: int = 10_000,
        overwrite: bool = False,
        unfinished: Mapping[str, Any] | None = None,
    ):
        if max_bytes < 1 or max_count < 1:
            raise UserError(f"a shard must hold something: max_bytes {max_bytes}, max_count {max_count}")
        self.folder, self.max_bytes, self.max_count = Path(folder), max_bytes, max_count
        self.shards: list[dict[str, Any]] = []
        with clear_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        present = sorted(self.folder.glob("*.tar"))
        foreign = [path.name for path in present if not _SHARD.fullmatch(path.name)]
        if foreign:  # not even overwrite may remove what was never written here
            raise UserError(f"{self.folder} holds other archives ({foreign[0]}): choose another folder")
        if present and not overwrite:
            raise UserError(
                f"{self.folder} already holds {len(present)} shard(s): choose another folder or say overwrite"
            )
        if unfinished is not None:
            write_json(self.folder / UNFINISHED, unfinished)
        with clear_errors(self.folder):
            (self.folder / SUMMARY).unlink(missing_ok=True)  # first: what is left is not a finished set
            for path in [*present, *self.folder.glob(".*.part")]:
                path.unlink()
        self._file: BinaryIO | None = None
        self._keys: set[str] = set()
        self._position = 0

    @property
    def count(self) -> int:
        """Samples written so far, the open shard's included."""
        return sum(shard["samples"] for shard in self.shards) + len(self._keys)

    def _path(self) -> Path:
        return self.folder / f"{len(self.shards):06d}.tar"

    def _temporary(self) -> Path:
        return self.folder / f".{self._path().name}.part"

    def write(self, sample: Mapping[str, Any]) -> None:
        """Add a sample. UserError if the disk is full (nothing half-written stays) or the key unusable."""
        key = sample["__key__"]
        base = key.rsplit("/", 1)[-1]
        if not base or "." in base or key.startswith(("/", "__")) or "\0" in key:
            raise UserError(f"'{key}' cannot be a key: it needs a base name without dots")
        block = io.BytesIO()
        for name, value in sample.items():
            if name == "__key__":
                continue
            if name != name.lower() or "/" in name or not name:
                raise UserError(f"'{name}' in sample '{key}' cannot be an extension: use lower case, no '/'")
            data = _to_bytes(key, name, value)
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size, info.mode = len(data), 0o644  # owner, group and time stay 0: same bytes every time
            block.write(info.tobuf(tarfile.PAX_FORMAT))
            block.write(data)
            block.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        content = block.getvalue()
        if not content:
            raise UserError(f"sample '{key}' has no members")
        full = self._position + len(content) > self.max_bytes or len(self._keys) >= self.max_count
        if self._keys and full:
            self._finish()
        if key in self._keys:
            raise UserError(f"two samples have the key '{key}' in {self._path()}: make keys unique")
        try:
            with clear_errors(self._path()):
                if self._file is None:
                    self._file = open(self._temporary(), "wb")
                self._file.write(content)
        except BaseException:
            self._discard()
            raise
        self._position += len(content)
        self._keys.add(key)

    def _finish(self) -> None:
        """The open shard gets its end mark and its final name."""
        if self._file is None:
            return
        path = self._path()
        try:
            with clear_errors(path):
                end = self._position + 2 * tarfile.BLOCKSIZE
                self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary(), path)
        except BaseException:
            self._discard()
            raise
        self.shards.append({"name": path.name, "samples": len(self._keys), "bytes": path.stat().st_size})
        self._file, self._position, self._keys = None, 0, set()

    def _discard(self) -> None:
        """The open shard is given up."""
        if self._file is not None:
            with suppress(OSError):  # closing may try once more to write to a full disk
                self._file.close()
            with suppress(OSError):
                self._temporary().unlink(missing_ok=True)
            self._file, self._position, self._keys = None, 0, set()

    def close(self) -> None:
        """Finish the last shard."""
        self._finish()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()
