"""Reads single members out of a wheel (zip) or a source archive (tar) without trusting their names.

Knows that a member's name may point outside the target folder and that a pickle may hold code; knows
nothing about what the members mean. Nothing is ever imported or executed from an archive.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def _safe(name: str, where: Path) -> PurePosixPath:
    """A member's path, or UserError if it is absolute, climbs with `..`, or names a drive."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in path.parts[0]:
        raise UserError(f"{where} holds a member named '{name}' that points outside the archive: refused")
    return path


class Archive:
    """A wheel or source archive, opened for reading; use it as a context manager.

    Only plain files are seen: links, devices and folders are neither listed nor read.

    Raises:
        UserError: if the file is neither a zip nor a tar, or is cut off.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        self._tar: tarfile.TarFile | None = None
        try:
            if zipfile.is_zipfile(self.path):
                self._zip = zipfile.ZipFile(self.path)
            else:
                self._tar = tarfile.open(self.path)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            raise UserError(f"cannot open the archive {self.path}: {error}") from error

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        (self._zip or self._tar).close()  # type: ignore[union-attr]

    def _files(self) -> Iterator[tuple[str, IO[bytes]]]:
        """Every plain file in the archive's own order (a compressed tar can only be read forwards)."""
        if self._zip is not None:
            for info in self._zip.infolist():
                mode = info.external_attr >> 16
                if not info.is_dir() and (mode & 0o170000) in (0, 0o100000):
                    with self._zip.open(info) as stream:
                        yield info.filename, stream
        elif self._tar is not None:
            for member in self._tar:
                content = self._tar.extractfile(member) if member.isreg() else None
                if content is not None:
                    yield member.name, content

    def read(self, *suffixes: str) -> list[bytes]:
        """The contents of the members whose path ends with each of `suffixes`, in that order.

        Raises:
            UserError: if one is missing or matches several members.
        """
        found: dict[str, bytes] = {}
        for name, stream in self._files():
            for suffix in suffixes:
                if PurePosixPath("/", name).match("*/" + suffix):
                    if suffix in found:
                        raise UserError(f"{self.path} holds more than one '{suffix}'")
                    found[suffix] = stream.read()
        missing = [suffix for suffix in suffixes if suffix not in found]
        if missing:
            raise UserError(f"{self.path} holds no '{missing[0]}'")
        return [found[suffix] for suffix in suffixes]

    def extract(self, prefix: str, folder: Path, skip: tuple[str, ...] = ()) -> int:
        """Write all files under `prefix` into `folder`, less the prefix; returns how many.

        Args:
            prefix: a folder inside the archive, such as `easy_vqa/data`.
            folder: where to write; subfolders are made.
            skip: names of files left out on purpose, such as `.DS_Store`.

        Raises:
            UserError: if a member's name points outside `folder`, or nothing lies under `prefix`.
        """
        parts, count = PurePosixPath(prefix).parts, 0
        for name, stream in self._files():
            path = _safe(name, self.path)
            if path.parts[: len(parts)] != parts or path.name in skip:
                continue
            target = folder.joinpath(*path.parts[len(parts) :])
            target.parent.mkdir(parents=True, exist_ok=True)
            # O_EXCL: a second member of the same name is an error, not a silent overwrite.
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
            count += 1
        if not count:
            raise UserError(f"{self.path} holds nothing under '{prefix}'")
        return count


def read_torch(data: bytes, where: str) -> dict[str, Tensor]:
    """The state dict in the bytes of a `.pt` file, read without running any code from it.

    Raises:
        UserError: if the pickle asks for anything but plain containers and tensors.
    """
    import torch

    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{where} is not a plain file of tensors and was not opened: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{where} holds something other than a flat dictionary of tensors")
    return dict(state)
