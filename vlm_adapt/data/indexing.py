"""The indexes of many shards: loaded side by side where that is slow, written beside them on all cores.

Knows how to divide work and to show how far it is; knows nothing about what an index is (index.py).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

from vlm_adapt.data.index import ShardIndex, load_index, write_sidecar
from vlm_adapt.data.naming import Patterns, expand
from vlm_adapt.data.problems import Problem
from vlm_adapt.data.shard_index import from_bytes
from vlm_adapt.data.storage import Settings, is_local, shown
from vlm_adapt.data.storage.unpack import is_compressed_name
from vlm_adapt.errors import UserError

REQUESTS = 16  # at once: they wait for the network, not for a core
_QUIET = 3.0  # seconds before progress is shown


class _Progress:
    """One line on a terminal, after a few seconds; nothing elsewhere."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self.next = time.monotonic() + _QUIET
        self.shown, self.terminal = False, sys.stderr.isatty()

    def step(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if self.terminal and now >= self.next:
            print(f"\r{self.what}: {self.done:,} of {self.total:,}", end="", file=sys.stderr, flush=True)
            self.shown, self.next = True, now + 0.2

    def end(self) -> None:
        if self.shown:
            print(f"\r{self.what}: {self.done:,} of {self.total:,}", file=sys.stderr, flush=True)


def load_indexes(names: Sequence[str], settings: Settings) -> list[ShardIndex]:
    """The index of each shard, in order; see `load_index`.

    Plain local shards are read one after the other (a thread would not make Python faster), others by
    several threads. The first error ends it.
    """
    progress = _Progress("reading the indexes of shards", len(names))
    slow = [name for name in names if not is_local(name) or is_compressed_name(name)]
    found: dict[str, ShardIndex] = {}
    threads = min(REQUESTS, len(slow))
    if any(not name.startswith("http") for name in slow):
        threads = min(threads, max(2, os.cpu_count() or 2))  # they unpack, or run a command
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    try:
        if pool is not None:
            unique = list(dict.fromkeys(slow))
            for name, index in zip(
                unique, pool.map(lambda name: load_index(name, settings=settings), unique), strict=True
            ):
                found[name] = index
                progress.step()
        for name in names:
            if name not in found:
                found[name] = load_index(name, settings=settings)
                progress.step()
    finally:
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        progress.end()
    return [found[name] for name in names]


def _write_one(name: str) -> tuple[int, list[Problem]]:
    place = write_sidecar(name)
    loaded = from_bytes(place.read_bytes(), name)
    assert loaded is not None  # just written
    return len(loaded[0]), list(loaded[0].problems)


def _mapped(names: list[str], workers: int) -> Iterator[tuple[int, list[Problem]]]:
    if workers == 1:
        yield from map(_write_one, names)
        return
    # Not forked: the caller may hold threads and locks.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_write_one, names, chunksize=max(1, min(16, len(names) // (4 * workers))))


def write_sidecars(
    patterns: Patterns, workers: int = 0, tick: Callable[[int], None] | None = None
) -> tuple[int, int, list[Problem]]:
    """Write an index beside each of the local shards that patterns stand for.

    Args:
        patterns: see `expand`.
        workers: processes; 0 takes one for each core.
        tick: called with how many are done, after each.

    Returns:
        (shards, samples, what is wrong in them)

    Raises UserError if a shard is not local or compressed, before anything is written.
    """
    names = list(dict.fromkeys(expand(patterns)))
    for name in names:
        if not is_local(name) or is_compressed_name(name):
            raise UserError(f"an index is written beside plain local shards only, and {shown(name)} is none")
    samples, problems = 0, list[Problem]()
    workers = min(workers or os.cpu_count() or 1, len(names))
    for done, (count, wrong) in enumerate(_mapped(names, workers), 1):
        samples, problems = samples + count, problems + wrong
        if tick:
            tick(done)
    return len(names), samples, problems
