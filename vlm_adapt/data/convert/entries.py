"""The entries of a conversion, waiting on the disk to be written: shuffled, counted, dealt to shards.

Knows recipes and where they lie in a file of ours; knows nothing about images or shards. In memory an
entry takes 16 bytes, so that millions of them cost no more than their source does.
"""

from __future__ import annotations

import hashlib
import pickle
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from vlm_adapt.data.convert.common import Recipe
from vlm_adapt.data.write import clear_errors

Entry = Recipe | Mapping[str, Any]


def key_of(entry: Entry) -> str:
    """The key of the sample that an entry makes."""
    return entry.key if isinstance(entry, Recipe) else entry["__key__"]


def load(file: BinaryIO, offset: int) -> Entry:
    """The entry at a place of the file that `Entries` wrote in this very conversion."""
    file.seek(offset)
    return pickle.load(file)


def read(path: Path, offsets: Iterable[int]) -> Iterator[Entry]:
    """The entries at these places, one after another."""
    with open(path, "rb") as file:
        for offset in offsets:
            yield load(file, offset)


class Entries:
    """A file of entries; a context manager that removes it.

    Args:
        path: of the file, on the disk that the shards go to.

    Attributes:
        offsets: uint64 [entries], where each lies, in the order in which they will be written.
    """

    def __init__(self, path: Path):
        self.path = path
        self.offsets = np.zeros(0, dtype=np.uint64)
        self._digest = hashlib.blake2b(digest_size=8)

    def __enter__(self) -> Entries:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.offsets)

    def gather(self, entries: Iterable[Entry]) -> list[str]:
        """Write the entries down. Returns the keys of those left out because an entry before has the key."""
        offsets, hashes, position = array("Q"), array("Q"), 0
        with clear_errors(self.path):
            file = open(self.path, "wb")
        with closing(file):
            for entry in entries:  # errors of the source are not errors of this file
                key = key_of(entry).encode("utf-8", "surrogateescape")
                self._digest.update(key + b"\0")
                hashes.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))
                offsets.append(position)
                data = pickle.dumps(entry, protocol=pickle.HIGHEST_PROTOCOL)
                with clear_errors(self.path):
                    position += file.write(data)
            with clear_errors(self.path):
                file.flush()
        self.offsets = np.frombuffer(offsets, dtype=np.uint64) if offsets else self.offsets
        again = self._repeated(np.frombuffer(hashes, dtype=np.uint64) if hashes else self.offsets)
        keys = [key_of(entry) for entry in read(self.path, (int(self.offsets[place]) for place in again))]
        self.offsets = np.delete(self.offsets, again)
        return keys

    def _repeated(self, hashes_E: np.ndarray) -> list[int]:
        """Places of entries whose key an earlier one has. Equal hashes are only a hint."""
        order = np.argsort(hashes_E, kind="stable")
        equal = np.flatnonzero(hashes_E[order][1:] == hashes_E[order][:-1])
        places = sorted({int(place) for at in equal for place in order[at : at + 2]})
        seen: set[str] = set()
        again = []
        for place, entry in zip(places, read(self.path, (int(self.offsets[p]) for p in places)), strict=True):
            key = key_of(entry)
            if key in seen:
                again.append(place)
            seen.add(key)
        return again

    def shuffle(self, seed: int) -> None:
        """Another order, the same for the same seed."""
        self.offsets = self.offsets[np.random.default_rng(seed).permutation(len(self.offsets))]

    def spread(self, runs: int = 16, length: int = 4) -> np.ndarray:
        """Places in the file of a few entries: runs at even distances, as neighbours often share a file."""
        starts = np.arange(runs) * len(self.offsets) // runs
        places = np.unique(starts[:, None] + np.arange(length))
        return self.offsets[places[places < len(self.offsets)]]

    def deal(self, shards: int) -> list[bytes]:
        """The entries of each of so many shards, whose counts differ by one at most, packed small."""
        cuts = [len(self.offsets) * number // shards for number in range(shards + 1)]
        return [self.offsets[a:b].tobytes() for a, b in zip(cuts, cuts[1:], strict=False)]

    def digest(self) -> str:
        """16 letters that differ when the keys do, or their order in the source."""
        return self._digest.hexdigest()
