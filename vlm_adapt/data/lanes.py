"""The order in which samples are read: a pure function of (counts, seed, epoch), carried by lanes.

Knows numbers of samples and how to permute them; knows nothing about files, ranks or workers. Nothing
here depends on how many processes read, so the stream of samples is the same for one or for many.

    shards, permuted:   [ 7 ][ 2 ][ 9 ][ 0 ] ...          a row of samples for each source
    lanes:              |---0---|---1---|--- ... ---|     every lane gets its part of every source
    within a lane:      sources mixed, shuffled, whole or in windows
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
    """The shards of one source, by their counts of samples, and how much of it an epoch shows.

    A weight of 2.0 shows each sample twice an epoch, 0.5 a random half of them and the other half the
    next epoch: no sample comes again before all have come.

    Attributes:
        samples: how many an epoch shows, if that is not to follow from the weight.
        mark: tells these samples from others, where counts do not.
    """

    counts: tuple[int, ...]
    weight: float = 1.0
    samples: int | None = None
    mark: str = ""

    @property
    def shown(self) -> int:
        """Samples of this source in an epoch."""
        total = sum(self.counts)
        if self.samples is not None:
            return self.samples if total else 0
        whole = int(self.weight)
        return whole * total + round((self.weight - whole) * total)


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
        self.samples = sum(source.shown for source in self.sources)
        if self.samples == 0:
            raise UserError("an epoch would have no samples: the shards are empty or their weights are 0")
        self._rows: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._lanes: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        """Samples in an epoch."""
        return self.samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": OrderedDict(), "_lanes": OrderedDict()}

    def fingerprint(self) -> str:
        """16 letters that differ when the order would: kept with a cursor, checked on resuming."""
        words = (self.sources, self.seed, self.lanes, self.shuffle, self.window)
        return hashlib.blake2b(repr(words).encode(), digest_size=8).hexdigest()

    def _row(self, epoch: int) -> list[np.ndarray]:
        """The sample ids of an epoch, for each source shard after permuted shard. int64 [shown]"""
        if epoch not in self._rows:
            rows, start = [], 0
            for number, source in enumerate(self.sources):
                pieces = self._pieces(source, number, epoch, start)
                if self.shuffle:
                    words = ("shards", number) if number else ("shards",)
                    order = shuffled(len(pieces), self.seed, epoch, *words)
                    pieces = [pieces[place] for place in order]
                rows.append(np.concatenate(pieces) if pieces else np.zeros(0, np.int64))
                start += sum(source.counts)
            self._rows[epoch] = rows
            while len(self._rows) > 2:  # the end of one epoch and the start of the next
                self._rows.popitem(last=False)
        return self._rows[epoch]

    def _pieces(self, source: Source, number: int, epoch: int, start: int) -> list[np.ndarray]:
        """What an epoch shows of a source, cut at shards: the next samples of an endless row of passes."""
        total, shown = sum(source.counts), source.shown
        ends = start + np.cumsum([0, *source.counts], dtype=np.int64)
        pieces: list[np.ndarray] = []
        begin = epoch * shown
        for turn in range(begin // total, -(-(begin + shown) // total)) if total else ():
            low, high = max(begin - turn * total, 0), min(begin + shown - turn * total, total)
            if (low, high) == (0, total):
                pieces += [np.arange(first, last) for first, last in zip(ends[:-1], ends[1:], strict=True)]
                continue
            drawn = np.sort(start + shuffled(total, self.seed, number, turn, "pass")[low:high])
            pieces += np.split(drawn, np.searchsorted(drawn, ends[1:-1]))
        return pieces

    def size(self, lane: int) -> int:
        """Samples of a lane in an epoch: the same in all epochs, and in all lanes to within one."""
        return self.samples // self.lanes + (lane < self.samples % self.lanes)

    def lane(self, epoch: int, lane: int) -> np.ndarray:
        """The sample ids that a lane yields in an epoch, in order. int64 [size(lane)]"""
        if not self.shuffle:
            return np.concatenate(self._row(epoch))[lane :: self.lanes]
        place = (epoch, lane)
        if place not in self._lanes:
            self._lanes[place] = self._mixed(self._parts(epoch, lane), epoch, lane)
            while len(self._lanes) > 2 * self.lanes:
                self._lanes.popitem(last=False)
        return self._lanes[place]

    def _parts(self, epoch: int, lane: int) -> list[np.ndarray]:
        """A lane's part of each source. Rests go to the lanes after those that had the last rests."""
        parts, turned = [], 0
        for row in self._row(epoch):
            size, more = divmod(len(row), self.lanes)
            begin = lane * size + sum((other - turned) % self.lanes < more for other in range(lane))
            parts.append(row[begin : begin + size + ((lane - turned) % self.lanes < more)])
            turned += more
        return parts

    def _mixed(self, parts: list[np.ndarray], epoch: int, lane: int) -> np.ndarray:
        """The parts of a lane in one order, as often as each has samples."""
        whole = np.concatenate(parts)
        present = [part for part in parts if len(part)]
        if self.window is None or len(present) < 2 or len(whole) <= self.window:
            return whole[self._within(len(whole), epoch, lane)]
        order = [
            part[self._within(len(part), epoch, f"{lane}.{number}")] for number, part in enumerate(present)
        ]
        turn = np.repeat(np.arange(len(order)), [len(part) for part in order])
        turn = turn[shuffled(len(turn), self.seed, epoch, lane, "mix")]
        mixture = np.empty(len(whole), dtype=np.int64)
        for number, part in enumerate(order):
            mixture[turn == number] = part
        return mixture

    def _within(self, count: int, epoch: int, lane: int | str) -> np.ndarray:
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
        return {**cursor.to_dict(), **self.words()}

    def words(self) -> dict[str, Any]:
        """What tells this order from others, for a state and for whoever must say what has changed."""
        settings = {
            "number of sources": len(self.sources),
            "samples of the sources": [sum(source.counts) for source in self.sources],
            "samples that an epoch shows of them": [source.shown for source in self.sources],
            "keys of the samples": [source.mark for source in self.sources],
            "seed": self.seed,
            "lanes": self.lanes,
            "shuffle": self.shuffle,
            "shuffle_window": self.window,
        }
        return {"samples": self.samples, "fingerprint": self.fingerprint(), "settings": settings}

    def resume(self, state: dict[str, Any]) -> LaneCursor:
        """The cursor of a saved state; UserError if the data, its weights or the seed are not the same."""
        if state["fingerprint"] != self.fingerprint():
            before, now = state.get("settings", {}), self.words()["settings"]
            changed = [
                f"{what} (was {before[what]}, is {now[what]})" if "keys" not in what else what
                for what in now
                if what in before and before[what] != now[what]
            ]
            raise UserError(
                f"cannot resume the data stream: it differs in {', '.join(changed) or 'shard order'}; "
                "restore the data and settings, or start over with --fresh"
            )
        return LaneCursor(int(state["epoch"]), int(state["position"]))
