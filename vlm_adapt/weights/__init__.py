"""Where a part's numbers or data files come from: the table of packages, and its three verbs.

Knows which packages there are and when a cached one is still good; does not know how any of them is
read (`packages/`), fetched (`download.py`) or stored (`cache.py`). A new package is one file in
`packages/` and one line here. Importing this imports neither torch nor numpy.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from vlm_adapt.choices import Choices
from vlm_adapt.weights import cache
from vlm_adapt.weights.package import Package
from vlm_adapt.weights.sources import Source, parse, resolve, tensors_file

__all__ = [
    "PACKAGES", "Package", "Row", "Source",
    "fetch", "list_packages", "parse", "resolve", "tensors_file", "verify",
]  # fmt: skip

PACKAGES = Choices(
    "weights package",
    {
        "smollm2-135m-instruct": "vlm_adapt.weights.packages.smollm2:PACKAGE",
        "mobile-sam-tinyvit": "vlm_adapt.weights.packages.mobile_sam:PACKAGE",
        "efficientnet-lite0": "vlm_adapt.weights.packages.efficientnet_lite0:PACKAGE",
        "all-minilm-l6-v2": "vlm_adapt.weights.packages.minilm:PACKAGE",
        "easy-vqa": "vlm_adapt.weights.packages.easy_vqa:PACKAGE",
    },
)


class Row(NamedTuple):
    """A line of `weights list`; `size` is the download in bytes, `cached` the folder or None."""

    name: str
    what: str
    version: str
    size: int
    licence: str
    cached: Path | None


def _identity(package: Package) -> dict[str, Any]:
    return {
        "name": package.name,
        "version": package.version,
        "format": package.format,
        "archive": package.archive,
        "archive_sha256": package.sha256,
    }


def _entry(package: Package) -> str:
    return f"{package.name}-{package.version}-format{package.format}"


def fetch(name: str) -> Path:
    """The folder of a package's converted files; fetched and converted if it is not in the cache.

    Quick when cached (sizes are compared, nothing is hashed). Two processes may call it at once: the
    second waits and finds the first one's work. A damaged entry is named and made anew.

    Raises:
        UserError: unknown name, offline, wrong checksum, full disk, cache folder not writable.
    """
    package: Package = PACKAGES.load(name)
    place, identity = cache.root() / _entry(package), _identity(package)
    if not cache.faults(place, identity):
        return place
    with cache.lock(_entry(package)):
        wrong = cache.faults(place, identity)
        if not wrong:  # another process made it while this one waited
            return place
        if place.exists():
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            print(f"{place} is damaged ({wrong[0]}{more}): making it anew", file=sys.stderr, flush=True)
        return cache.publish(_entry(package), identity, lambda folder: _make(package, folder))


def _make(package: Package, folder: Path) -> None:
    from vlm_adapt.weights import download

    with download.archive(package) as path:
        start = time.perf_counter()
        print(f"converting {package.name}", file=sys.stderr, flush=True)
        package.convert(path, folder)
        print(f"converted {package.name} in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def list_packages() -> list[Row]:
    """One row for each package in the table, with its cached folder if that is whole."""
    rows = []
    for name in PACKAGES:
        package: Package = PACKAGES.load(name)
        place = cache.root() / _entry(package)
        cached = None if cache.faults(place, _identity(package)) else place
        rows.append(Row(name, package.what, package.version, package.size, package.licence, cached))
    return rows


def verify(name: str) -> list[str]:
    """Hash every cached file of a package against its receipt; what is wrong, or an empty list."""
    package: Package = PACKAGES.load(name)
    return cache.faults(cache.root() / _entry(package), _identity(package), deep=True)
