"""The order in which samples are read: a pure function of (counts, seed, epoch), carried by lanes.

Knows numbers of samples and how to permute them; knows nothing about files, ranks or workers. Nothing
here depends on how many processes read, so the stream of samples is the same for one or for many.

    shards, permuted:   [ 7 ][ 2 ][ 9 ][ 0 ] ...          one row of samples
    lanes:              |---0---|---1---|--- ... ---|     cut at samples, equal to within one
    within a lane:      shuffled, whole or in windows
    the stream:         lane 0, 1, ..., L-1, 0, 1, ...    position p is item p // L of lane p % L

The shuffles sort raw 64-bit Philox output (its stream is fixed by its paper, Salmon et al. 2011, and
by NumPy's compatibility promise for bit generators; `Generator.permutation` has no such promise). The
key is a hash of the words (seed, epoch, lane, purpose). So an order is the same for every version.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_adapt.errors import UserError

LANES = 64


def shuffled(count: int, *words: int | str) -> np.ndarray:
    """A permutation of `range(count)` (int64) that depends on the words alone."""
    text = " ".join(str(word) for word in words).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


@dataclass(frozen=True)
class Source:
    """The shards of one source, by their counts of samples, and how often an epoch shows each sample.

    A weight of 2.0 shows each sample twice an epoch, 0.5 a random half of them (another half, drawn
    independently, the next epoch), 2.5 each twice and a random half a third time.
    """

    counts: tuple[int, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class LaneCursor:
    """A place in the stream: this many samples of this epoch have been taken."""

    epoch: int = 0
    position: int = 0

    def to_dict(self) -> dict[str, int]:
        """Plain data for a checkpoint."""
        return {"epoch": self.epoch, "position": self.position}


class Plan:
    """The order of every epoch.

    Args:
        sources: counts of samples per shard, or several `Source`s. Samples are numbered through all
            shards of all sources, in the order given.
        seed: another seed, another order.
        lanes: how many lanes the row is cut into.
        shuffle: False gives the row itself, the same in every epoch (fractions of a source are still
            drawn by seed and epoch, and kept in order).
        window: shuffle a lane only in windows of so many samples, so that a reader stays near one
            place in a shard; None shuffles the whole lane.
    """

    def __init__(
        self,
        sources: Sequence[int] | Sequence[Source],
        seed: int = 0,
        lanes: int = LANES,
        shuffle: bool = True,
        window: int | None = None,
    ):
        if lanes < 1 or (window is not None and window < 1):
            raise UserError(f"lanes and window must be at least 1 (lanes {lanes}, window {window})")
        listed = [one for one in sources if isinstance(one, Source)]
        numbers = tuple(int(one) for one in sources if not isinstance(one, Source))
        self.sources = (*listed, Source(numbers)) if numbers else tuple(listed)
        for source in self.sources:
            if not (0 <= source.weight < float("inf")):
                raise UserError(f"the weight of a source is {source.weight}: give a number of 0 or more")
        self.seed, self.lanes, self.shuffle, self.window = seed, lanes, shuffle, window
        self.samples = sum(self._shown(source) for source in self.sources)
        if self.samples == 0:
            raise UserError("an epoch would have no samples: the shards are empty or their weights are 0")
        self._rows: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lanes: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    @staticmethod
    def _shown(source: Source) -> int:
        """Samples of a source in an epoch."""
        total = sum(source.counts)
        copies = int(source.weight)
        return copies * total + round((source.weight - copies) * total)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": OrderedDict(), "_lanes": OrderedDict()}

    def fingerprint(self) -> str:
        """16 letters that differ when the order would: kept with a cursor, checked on resuming."""
        words = (self.sources, self.seed, self.lanes, self.shuffle, self.window)
        return hashlib.blake2b(repr(words).encode(), digest_size=8).hexdigest()

    def _row(self, epoch: int) -> np.ndarray:
        """The sample ids of an epoch, shard after permuted shard. int64 [samples]"""
        if epoch not in self._rows:
            pieces: list[np.ndarray] = []
            start = 0
            for number, source in enumerate(self.sources):
                ends = start + np.cumsum([0, *source.counts], dtype=np.int64)
                shards = [np.arange(low, high) for low, high in zip(ends[:-1], ends[1:], strict=True)]
                copies, total = int(source.weight), int(ends[-1]) - start
                extra = self._shown(source) - copies * total
                pieces.extend(shards * copies)
                if extra:
                    drawn = start + shuffled(total, self.seed, epoch, number, "fraction")[:extra]
                    pieces.extend(np.split(np.sort(drawn), np.searchsorted(np.sort(drawn), ends[1:-1])))
                start = int(ends[-1])
            if self.shuffle:
                pieces = [pieces[place] for place in shuffled(len(pieces), self.seed, epoch, "shards")]
            self._rows[epoch] = np.concatenate(pieces)
            while len(self._rows) > 2:  # the end of one epoch and the start of the next
                self._rows.popitem(last=False)
        return self._rows[epoch]

    def lane(self, epoch: int, lane: int) -> np.ndarray:
        """The sample ids that a lane yields in an epoch, in order. int64 [n or n + 1]"""
        if not self.shuffle:
            return self._row(epoch)[lane :: self.lanes]
        place = (epoch, lane)
        if place not in self._lanes:
            size, more = divmod(self.samples, self.lanes)
            begin = lane * size + min(lane, more)
            run = self._row(epoch)[begin : begin + size + (lane < more)]
            self._lanes[place] = run[self._within(len(run), epoch, lane)]
            while len(self._lanes) > 2 * self.lanes:
                self._lanes.popitem(last=False)
        return self._lanes[place]

    def _within(self, count: int, epoch: int, lane: int) -> np.ndarray:
        """The shuffle of a lane of `count` samples."""
        order = shuffled(count, self.seed, epoch, lane, "lane")
        if self.window is None or count <= self.window:
            return order
        # Windows begin elsewhere each epoch, so that neighbours in a shard are not neighbours for ever.
        shift = int(shuffled(self.window, self.seed, epoch, lane, "shift")[0])
        rank = np.empty(count, dtype=np.int64)
        rank[order] = np.arange(count)
        return np.lexsort((rank, (np.arange(count) + shift) // self.window))

    def order(self, epoch: int) -> np.ndarray:
        """All sample ids of an epoch in the order of the stream. int64 [samples]"""
        stream = np.empty(self.samples, dtype=np.int64)
        for lane in range(min(self.lanes, self.samples)):
            stream[lane :: self.lanes] = self.lane(epoch, lane)
        return stream

    def at(self, epoch: int, position: int) -> int:
        """The sample id at a position of an epoch, without laying out the whole order."""
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} of an epoch of {self.samples}")
        return int(self.lane(epoch, position % self.lanes)[position // self.lanes])

    def take(self, cursor: LaneCursor, count: int, wrap: bool = True) -> tuple[list[int], LaneCursor]:
        """The next `count` sample ids after a cursor, and the cursor after them.

        Runs on into the next epoch, or with `wrap=False` stops at the end of this one (the list is then
        shorter, and empty at the end).
        """
        ids: list[int] = []
        epoch, position = cursor.epoch, cursor.position
        while len(ids) < count:
            if position >= self.samples:
                if not wrap:
                    break
                epoch, position = epoch + 1, 0
            stop = min(self.samples, position + count - len(ids))
            ids.extend(self.at(epoch, place) for place in range(position, stop))
            position = stop
        return ids, LaneCursor(epoch, position)

    def state(self, cursor: LaneCursor) -> dict[str, Any]:
        """What a checkpoint keeps: a few numbers."""
        return {**cursor.to_dict(), "samples": self.samples, "fingerprint": self.fingerprint()}

    def resume(self, state: dict[str, Any]) -> LaneCursor:
        """The cursor of a saved state; UserError if the data, its weights or the seed are not the same."""
        if state["fingerprint"] != self.fingerprint():
            raise UserError(
                f"cannot resume the data stream: it had {state['samples']:,} samples an epoch and has "
                f"{self.samples:,}, or another seed, weight or shard order; restore the data and settings"
            )
        return LaneCursor(int(state["epoch"]), int(state["position"]))
