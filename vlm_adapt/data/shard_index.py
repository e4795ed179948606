"""Where the samples of one shard lie, as arrays, and the same as bytes.

Knows arrays and their file format; knows nothing about where shards or these files lie (index.py).
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_adapt.data.grouping import Group
from vlm_adapt.data.problems import Problem
from vlm_adapt.data.storage import shown
from vlm_adapt.data.tar import BLOCK, Read

FORMAT = 2  # raise it whenever an index would come out differently, or is written differently
_ARRAYS = ("first", "offset", "size", "extension", "key_end")


def _small(values: Sequence[int]) -> np.ndarray:
    """Counts and offsets in the smallest type that holds them: there may be many millions."""
    return np.array(values, dtype=np.min_scalar_type(max(values, default=0)))


def _ends(sizes: Sequence[int]) -> np.ndarray:
    ends = np.cumsum(sizes, dtype=np.int64)
    return ends.astype(np.min_scalar_type(int(ends[-1]) if len(ends) else 0))


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie.

    Sample `i` is made of members `first[i]` to `first[i + 1]` (exclusive); member `m` is
    `size[m]` bytes at `offset[m]`, called `extensions[extension[m]]`.
    """

    path: str
    file_bytes: int
    identity: str  # see storage.Store: it changes when the content does
    first: np.ndarray  # [samples + 1], unsigned as all of these
    offset: np.ndarray  # [members]
    size: np.ndarray  # [members]
    extension: np.ndarray  # [members]
    extensions: tuple[str, ...]
    key_end: np.ndarray  # [samples], into key_text
    key_text: bytes
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.key_end)

    def key(self, sample: int) -> str:
        """The key of a sample of this shard."""
        start = int(self.key_end[sample - 1]) if sample else 0
        return self.key_text[start : int(self.key_end[sample])].decode("utf-8", "surrogateescape")

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """`(extension, offset, size)` of each member of a sample, in the order of the shard."""
        span = slice(int(self.first[sample]), int(self.first[sample + 1]))
        codes, offsets, sizes = self.extension[span], self.offset[span], self.size[span]
        names = self.extensions
        return [
            (names[code], offset, size)
            for code, offset, size in zip(codes.tolist(), offsets.tolist(), sizes.tolist(), strict=True)
        ]

    @classmethod
    def of(
        cls, path: str, file_bytes: int, identity: str, groups: list[Group], problems: list[Problem]
    ) -> ShardIndex:
        """The arrays of grouped members."""
        names: dict[str, int] = {}
        members = [member for group in groups for member in group.members]
        keys = [group.key.encode("utf-8", "surrogateescape") for group in groups]
        codes = [names.setdefault(sys.intern(member[0]), len(names)) for member in members]
        return cls(
            path=path,
            file_bytes=file_bytes,
            identity=identity,
            first=_ends([0, *(len(group.members) for group in groups)]),
            offset=_small([member[1] for member in members]),
            size=_small([member[2] for member in members]),
            extension=_small(codes),
            extensions=tuple(names),
            key_end=_ends([len(key) for key in keys]),
            key_text=b"".join(keys),
            problems=tuple(problems),
        )

    def to_bytes(self, marks: Sequence[tuple[int, int]] = ()) -> bytes:
        """An npz file. The same index gives the same bytes.

        Args:
            marks: see `marks_of`; for an index that travels with its shard.
        """
        words = {
            "format": FORMAT,
            "shard_bytes": self.file_bytes,
            "identity": self.identity,
            "marks": list(marks),
            "extensions": self.extensions,
            "problems": [[problem.key, problem.reason] for problem in self.problems],
        }
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays["key_text"] = np.frombuffer(self.key_text, dtype=np.uint8)
        arrays["words"] = np.frombuffer(json.dumps(words).encode(), dtype=np.uint8)
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()


def from_bytes(data: bytes, path: str) -> tuple[ShardIndex, list[tuple[int, int]]] | None:
    """`(index, marks)` from what `to_bytes` gave, for the shard at `path`; None if it is not whole."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
            words: dict[str, Any] = json.loads(file["words"].tobytes())
            key_text = file["key_text"].tobytes()
        if words["format"] != FORMAT:
            return None
        index = ShardIndex(
            path=path,
            file_bytes=int(words["shard_bytes"]),
            identity=str(words["identity"]),
            extensions=tuple(sys.intern(name) for name in words["extensions"]),
            key_text=key_text,
            problems=tuple(Problem(shown(path), key, reason) for key, reason in words["problems"]),
            **arrays,
        )
        marks = [(int(offset), int(checksum)) for offset, checksum in words["marks"]]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return (index, marks) if _fits_itself(index) else None


def _fits_itself(index: ShardIndex) -> bool:
    """Whether no number leads out of the arrays or of the shard: a sidecar may come from anywhere."""
    arrays = [getattr(index, name) for name in _ARRAYS]
    if any(array.ndim != 1 or array.dtype.kind != "u" for array in arrays):
        return False
    first, offset, size, extension, key_end = (array.astype(np.int64) for array in arrays)
    if len(first) != len(key_end) + 1 or not len(offset) == len(size) == len(extension) == first[-1]:
        return False
    if first[0] or (np.diff(first) < 0).any() or (np.diff(key_end, prepend=0) < 0).any():
        return False
    last_key = int(key_end[-1]) if len(key_end) else 0
    ends = offset + size
    return (
        last_key == len(index.key_text)
        and (extension < len(index.extensions)).all()
        and (offset >= 0).all()
        and (size >= 0).all()
        and (ends <= index.file_bytes).all()
    )


def mark_places(index: ShardIndex) -> list[int]:
    """The headers of the first, the middle and the last member, and what follows it.

    Other members elsewhere move the last one, or stand in its place, or follow it.
    """
    if not len(index.offset):
        places = {0}
    else:
        last = len(index.offset) - 1
        places = {int(index.offset[place]) - BLOCK for place in (0, last // 2, last)}
        places.add(-(-(int(index.offset[last]) + int(index.size[last])) // BLOCK) * BLOCK)
    return sorted(place for place in places if 0 <= place <= index.file_bytes - BLOCK)


def marks_of(index: ShardIndex, read: Read) -> list[tuple[int, int]]:
    """`(offset, checksum)` of a few blocks: an index fits a shard of its size that has the same ones."""
    return [(place, zlib.crc32(read(BLOCK, place))) for place in mark_places(index)]
