"""Shards by pattern, and the bytes of any of their samples by number.

Knows the indexes of shards and how to read a run of bytes; knows nothing about the order of reading,
ranks or workers (lanes.py), what a sample means (sample.py), or where bytes come from (storage/).
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from vlm_adapt.data.index import forget_index
from vlm_adapt.data.indexing import load_indexes
from vlm_adapt.data.naming import Patterns, expand, expand_braces
from vlm_adapt.data.problems import BadSample, Problem
from vlm_adapt.data.shard_index import ShardIndex
from vlm_adapt.data.storage import LIMIT_BYTES, Settings, Store, open_store, shown
from vlm_adapt.data.storage.notes import noted
from vlm_adapt.data.storage.spooled import source_of
from vlm_adapt.errors import UserError

__all__ = ["Patterns", "SampleRef", "ShardSet", "expand", "expand_braces", "joined", "read_sample"]

OPEN_SHARDS = 64  # per thread; the usual limit of a process is 1024 files
GAP = 1 << 16  # members further apart than this are read one by one
_DEFAULTS = Settings()


@dataclass(frozen=True)
class SampleRef:
    """Where one sample lies: its shard, its key, and `(extension, offset, size)` of each member.

    `identity` is the shard's when it was indexed: reading another content is an error.
    """

    shard: str
    key: str
    members: tuple[tuple[str, int, int], ...]
    identity: str
    settings: Settings = _DEFAULTS


class _OpenShards(threading.local):
    """The shards read last, for each thread its own, so that no lock is ever held.

    What a forked worker inherits serves it as well: nothing of a store has a position to share.
    """

    def __init__(self) -> None:
        self.stores: OrderedDict[str, tuple[Store, str, Settings]] = OrderedDict()

    def get(self, ref: SampleRef) -> Store:
        found = self.stores.get(ref.shard)
        if found is not None:
            store, identity, settings = found
            if identity == ref.identity and (settings is ref.settings or settings == ref.settings):
                self.stores.move_to_end(ref.shard)
                return store
            del self.stores[ref.shard]  # another content was indexed since
            store.close()
        store = open_store(ref.shard, ref.settings, ref.identity)
        if store.identity != ref.identity:
            store.close()
            forget_index(ref.shard, source_of(ref.identity), ref.settings)
            raise UserError(f"shard {shown(ref.shard)} was changed while in use: start again to read it anew")
        self.stores[ref.shard] = (store, ref.identity, ref.settings)
        while len(self.stores) > OPEN_SHARDS:
            self.stores.popitem(last=False)[1][0].close()
        return store

    def __del__(self) -> None:
        for store, _, _ in self.stores.values():
            store.close()


_open_shards = _OpenShards()


def _pread(ref: SampleRef, offset: int, size: int) -> bytes:
    try:
        store = _open_shards.get(ref)
        data = store.pread(size, offset)
        while len(data) < size:  # a signal, or a limit of the file system
            more = store.pread(size - len(data), offset + len(data))
            if not more:
                raise BadSample("the shard ends inside the sample", shown(ref.shard))
            data += more
    except OSError as error:
        raise BadSample("the shard cannot be read", f"{shown(ref.shard)}: {error.strerror}") from error
    return data


def read_sample(ref: SampleRef) -> dict[str, bytes]:
    """The members of a sample by extension, in the order of the shard (`{"jpg": ..., "json": ...}`).

    Raises BadSample if the file system fails or the shard was cut, UserError if it was replaced or if
    its server or command failed for good.
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
        cache: a folder that keeps indexes, and what was fetched of remote shards, for all processes and
            runs; None is `shards` in the cache folder, where indexes of small local shards are not kept.
        limit_bytes: what the cache may hold.
        settings: in place of `cache` and `limit_bytes`, with times and sizes too.

    Cheap to send to a worker process: it holds arrays, not files.
    """

    def __init__(
        self,
        patterns: Patterns,
        cache: str | os.PathLike[str] | None = None,
        limit_bytes: int = LIMIT_BYTES,
        settings: Settings | None = None,
    ):
        folder = os.fspath(cache) if cache is not None else None
        self.settings = settings or Settings(cache=folder, limit_bytes=limit_bytes)
        self.indexes: list[ShardIndex] = load_indexes(expand(patterns, self.settings), self.settings)
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

    @property
    def notes(self) -> list[tuple[Problem, int]]:
        """What went wrong and was mended in this process, of all sets: the first case, and how many."""
        return noted()

    def ref(self, sample: int) -> SampleRef:
        """Where sample number `sample` of the row lies."""
        if not 0 <= sample < self.samples:
            raise IndexError(f"sample {sample} of {self.samples}")
        shard = bisect_right(self._ends, sample)
        index = self.indexes[shard]
        local = sample - (self._ends[shard] - self.counts[shard])
        return SampleRef(
            index.path, index.key(local), tuple(index.members(local)), index.identity, self.settings
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
