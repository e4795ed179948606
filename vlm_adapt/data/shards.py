"""Shards by pattern, and the bytes of any of their samples by number.

Knows names of shards, their indexes and how to read a run of bytes; knows nothing about the order of
reading, ranks or workers (lanes.py), or what a sample means (sample.py).
"""

from __future__ import annotations

import json
import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path

from vlm_adapt.data.index import ShardIndex, load_index
from vlm_adapt.data.problems import BadSample, Problem
from vlm_adapt.errors import UserError

OPEN_FILES = 64  # per thread; the usual limit of a process is 1024
GAP = 1 << 16  # members further apart than this are read one by one

Patterns = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?")


def _choices(inside: str) -> list[str]:
    """What stands between two braces, written out: `000..003` or `a,b`."""
    span = _RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last, step = span.group(1), span.group(2), int(span.group(3) or 1)
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    low, high = int(first), int(last)
    numbers = range(low, high + 1, step or 1) if low <= high else range(low, high - 1, -(step or 1))
    return [f"{number:0{width}d}" for number in numbers]


def expand_braces(pattern: str) -> list[str]:
    """`"a-{00..02}.tar" -> ["a-00.tar", "a-01.tar", "a-02.tar"]`; also `{a,b}`; several multiply."""
    pieces = _BRACES.split(pattern)  # text, inside, text, inside, ..., text
    options = [[piece] if place % 2 == 0 else _choices(piece) for place, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*options)]


def expand(patterns: Patterns) -> list[str]:
    """The shard files that patterns stand for, in order.

    A pattern is a file, braces (`train-{000..031}.tar`), `*` and `?`, a folder (all its `.tar` files,
    sorted by name), several of these joined by `::`, or a list of them. Raises UserError naming what
    was looked for when a file is missing or a pattern matches nothing.
    """
    given = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    files: list[str] = []
    for pattern in given:
        for part in os.fspath(pattern).split("::"):
            for name in expand_braces(os.path.expanduser(part)) if part else [""]:
                files.extend(_find(name, part))
    if not files:
        raise UserError("no shards were named: give a .tar file, a pattern or a folder of .tar files")
    return files


def _find(name: str, pattern: str) -> list[str]:
    if not name:
        raise UserError("a shard pattern has an empty part: write a file or folder between each '::'")
    if re.match(r"(https?|s3|gs|pipe):", name):
        raise UserError(f"shard '{name}' is not a local file: download it and name the file")
    path = Path(name)
    if path.is_file():
        return [name]
    if path.is_dir():
        _check_finished(path)
        found = sorted(str(entry) for entry in path.iterdir() if entry.suffix == ".tar" and entry.is_file())
        if not found:
            raise UserError(f"folder {name} holds no .tar shards")
        return found
    if any(letter in path.name for letter in "*?"):
        found = sorted(str(entry) for entry in path.parent.glob(path.name) if entry.is_file())
        if found:
            return found
        raise UserError(f"no file matches the shard pattern {name}")
    origin = f" (from the pattern '{pattern}')" if pattern != name else ""
    raise UserError(f"shard {name} does not exist{origin}")


def _check_finished(folder: Path) -> None:
    """A folder of ours is read whole or not at all (see write.py)."""
    if (folder / "dataset.unfinished.json").exists():
        raise UserError(f"the shards in {folder} are not all written: run their conversion to its end first")
    try:
        listed = [shard["name"] for shard in json.loads((folder / "dataset.json").read_text())["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not a folder that we wrote
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} of its {len(listed)} shards, {missing[0]} for one")


@dataclass(frozen=True)
class SampleRef:
    """Where one sample lies: its shard, its key, and `(extension, offset, size)` of each member."""

    shard: str
    key: str
    members: tuple[tuple[str, int, int], ...]
    shard_bytes: int
    shard_mtime_ns: int


class _OpenFiles(threading.local):
    """Descriptors of the shards read last, for each thread its own, so that no lock is ever held.

    A descriptor inherited by a forked worker serves it as well: `pread` has no position to share.
    """

    def __init__(self) -> None:
        self.files: OrderedDict[str, int] = OrderedDict()

    def get(self, ref: SampleRef) -> int:
        fd = self.files.get(ref.shard)
        if fd is not None:
            self.files.move_to_end(ref.shard)
            return fd
        try:
            fd = os.open(ref.shard, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise UserError(f"cannot open shard {ref.shard}: {error.strerror}") from error
        status = os.fstat(fd)
        if (status.st_size, status.st_mtime_ns) != (ref.shard_bytes, ref.shard_mtime_ns):
            os.close(fd)
            raise UserError(f"shard {ref.shard} was changed while in use: start again to read it anew")
        self.files[ref.shard] = fd
        while len(self.files) > OPEN_FILES:
            os.close(self.files.popitem(last=False)[1])
        return fd

    def __del__(self) -> None:
        for fd in self.files.values():
            os.close(fd)


_open_files = _OpenFiles()


def _pread(ref: SampleRef, offset: int, size: int) -> bytes:
    try:
        data = os.pread(_open_files.get(ref), size, offset)
        while len(data) < size:  # a signal, or a limit of the file system
            more = os.pread(_open_files.get(ref), size - len(data), offset + len(data))
            if not more:
                raise BadSample("the shard ends inside the sample", ref.shard)
            data += more
    except OSError as error:
        raise BadSample("the shard cannot be read", f"{ref.shard}: {error.strerror}") from error
    return data


def read_sample(ref: SampleRef) -> dict[str, bytes]:
    """The members of a sample by extension, in the order of the shard (`{"jpg": ..., "json": ...}`).

    Raises BadSample if the file system fails or the shard was cut, UserError if it was replaced.
    """
    if not ref.members:
        return {}
    start = ref.members[0][1]
    _, last, size = ref.members[-1]
    if last + size - start - sum(member[2] for member in ref.members) > GAP:
        return {name: _pread(ref, offset, size) for name, offset, size in ref.members}
    data = _pread(ref, start, last + size - start)  # neighbours: one call brings them all
    return {name: data[offset - start : offset - start + size] for name, offset, size in ref.members}


class ShardSet:
    """The shards of one source as one row of samples, numbered from 0.

    Args:
        patterns: see `expand`.
        cache: a folder that keeps indexes between runs; None builds them each time.

    Cheap to send to a worker process: it holds arrays, not files.
    """

    def __init__(self, patterns: Patterns, cache: str | os.PathLike[str] | None = None):
        self.indexes: list[ShardIndex] = [load_index(path, cache) for path in expand(patterns)]
        self.counts = tuple(len(index) for index in self.indexes)
        self._ends = list(accumulate(self.counts))

    @property
    def samples(self) -> int:
        """How many good samples there are; `counts` has them per shard."""
        return self._ends[-1]

    def __len__(self) -> int:
        return self.samples

    @property
    def problems(self) -> list[Problem]:
        """All that the indexes found wrong, in order."""
        return [problem for index in self.indexes for problem in index.problems]

    def ref(self, sample: int) -> SampleRef:
        """Where sample number `sample` of the row lies."""
        if not 0 <= sample < self.samples:
            raise IndexError(f"sample {sample} of {self.samples}")
        shard = bisect_right(self._ends, sample)
        index = self.indexes[shard]
        local = sample - (self._ends[shard] - self.counts[shard])
        return SampleRef(
            index.path, index.key(local), tuple(index.members(local)), index.file_bytes, index.mtime_ns
        )

    def read(self, sample: int) -> tuple[str, dict[str, bytes]]:
        """`(key, members)` of a sample; raises as `read_sample` does."""
        ref = self.ref(sample)
        return ref.key, read_sample(ref)

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        """All samples in the order of the shards."""
        return (self.read(sample) for sample in range(self.samples))


def joined(sets: Iterable[ShardSet]) -> list[int]:
    """Where each source begins when several rows are laid end to end (and the total, at the end)."""
    return [0, *accumulate(len(one) for one in sets)]
