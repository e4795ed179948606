"""Several texts a row: each lane fills rows of its own samples, alone and always in the same way.

Knows lengths of texts and lanes; knows nothing about files, models or workers. Row j of the stream is
the next row of lane j % L, so the rows are the same for any number of ranks and workers. A lane that is
put down and taken up elsewhere needs only its place and what it has read and not yet used.

    lane:   read ahead  [ 281 ][ 400 ][ 96 ][ 935 ][ 310 ] ...
    row:    the oldest text, and of the others those that fill the row best (subset sum)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_adapt.data.lanes import Plan, shuffled
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.rows import Measure, Row, Rows, Unit, check_batching
from vlm_adapt.errors import UserError

AHEAD = 12  # texts that a lane has at hand at least
REFUSED_AT_ONCE = 64  # refused samples after which a row is given up, so that someone hears of them
MEASURED = 512  # samples by which the rows of an epoch are estimated


def fill(lengths: Sequence[int], room: int) -> list[int]:
    """Which texts share a row: the first one, and others that leave the least room, earlier ones first.

    Exact, by a set of reachable sums kept as the bits of an integer.

    Args:
        lengths: of the texts at hand, the oldest first; the first one must fit.
        room: tokens of the row.

    Returns:
        Places in `lengths`, rising, the first one among them.
    """
    room -= lengths[0]
    within = (1 << (room + 1)) - 1
    sums = [1]  # bit s: the first texts have a subset of s tokens
    for length in lengths[1:]:
        sums.append((sums[-1] | sums[-1] << length) & within)
    left, chosen = sums[-1].bit_length() - 1, []
    for place in range(len(lengths) - 1, 0, -1):
        if left and not sums[place - 1] >> left & 1:
            chosen.append(place)
            left -= lengths[place]
    return [0, *reversed(chosen)]


@dataclass(frozen=True)
class Pending:
    """A text that was read and waits for its row: text number `text` of `texts` of a lane's item."""

    item: int
    text: int
    texts: int
    length: int


@dataclass(frozen=True)
class LaneState:
    """A lane put down: rows given, items read (through all epochs), and the texts that wait.

    `pending` is None for a state from a checkpoint, which holds only (item, text) of them in `waiting`.
    """

    rows: int = 0
    read: int = 0
    pending: tuple[Pending, ...] | None = ()
    waiting: tuple[tuple[int, int], ...] = ()

    def places(self) -> list[tuple[int, int]]:
        """(item, text) of every text that waits."""
        if self.pending is None:
            return list(self.waiting)
        return [(one.item, one.text) for one in self.pending]


@dataclass(frozen=True)
class PackedCursor:
    """Rows taken of the whole stream, and the lanes that this rank has carried."""

    taken: int = 0
    lanes: Mapping[int, LaneState] = field(default_factory=dict)


class PackedRows(Rows[PackedCursor]):
    """Rows of at most `length` tokens. Epochs run into each other: a row may hold texts of two.

    Args:
        length: tokens of a row; every text fits.
    """

    kind = "packed"

    def __init__(self, plan: Plan, measure: Measure | None = None, length: int = 0, count: int = 0):
        super().__init__(plan, measure, length, count)
        self.lanes = min(plan.lanes, len(plan))  # a lane without samples has no rows

    def start(self) -> PackedCursor:
        """See Rows."""
        return PackedCursor()

    def take(
        self, cursor: PackedCursor, count: int, mine: Collection[int] | None = None
    ) -> tuple[list[Row], PackedCursor]:
        """See Rows. Only the lanes of the places in `mine` are read."""
        lanes = dict(cursor.lanes)
        rows: list[Row] = [()] * count
        for place in range(count) if mine is None else sorted(mine):
            turn, lane = divmod(cursor.taken + place, self.lanes)
            state = lanes.get(lane, LaneState())
            while state.rows <= turn:  # rows of this lane that other ranks had are passed over
                rows[place], state = self._row(lane, state)
            lanes[lane] = state
        return rows, PackedCursor(cursor.taken + count, lanes)

    def _row(self, lane: int, state: LaneState) -> tuple[Row, LaneState]:
        """The next row of a lane."""
        pending, read = self._pending(lane, state), state.read
        refused: list[Unit] = []
        while len(pending) < AHEAD or sum(one.length for one in pending) < 2 * self.length:
            if len(refused) >= REFUSED_AT_ONCE:
                break
            epoch, position, number = self._sample(lane, read)
            try:
                lengths = self.measure(number, epoch, position)
                pending += [Pending(read, text, len(lengths), size) for text, size in enumerate(lengths)]
            except BadSample:
                refused.append(Unit(epoch, position, number, ()))
            read += 1
        chosen = fill([one.length for one in pending], self.length) if pending else []
        texts: dict[int, list[Pending]] = {}
        for place in chosen:
            texts.setdefault(pending[place].item, []).append(pending[place])
        row = [
            Unit(*self._sample(lane, item), tuple(one.text for one in parts), len(parts) < parts[0].texts)
            for item, parts in texts.items()
        ]
        taken = set(chosen)
        rest = tuple(one for place, one in enumerate(pending) if place not in taken)
        return (*row, *refused), LaneState(state.rows + 1, read, rest)

    def _pending(self, lane: int, state: LaneState) -> list[Pending]:
        if state.pending is not None:
            return list(state.pending)
        found: list[Pending] = []
        lengths: dict[int, list[int]] = {}
        for item, text in state.waiting:
            if item not in lengths:
                epoch, position, number = self._sample(lane, item)
                lengths[item] = self.measure(number, epoch, position)
            found.append(Pending(item, text, len(lengths[item]), lengths[item][text]))
        return found

    def _sample(self, lane: int, item: int) -> tuple[int, int, int]:
        """(epoch, position, number) of an item of a lane, counted through all epochs."""
        epoch, index = divmod(item, self.plan.size(lane))
        return epoch, index * self.plan.lanes + lane, int(self.plan.lane(epoch, lane)[index])

    def steps_per_epoch(self, count: int) -> int:
        """An estimate from the lengths of some samples drawn by the plan's seed."""
        total = measured = 0
        for position in shuffled(len(self.plan), self.plan.seed, "estimate")[:MEASURED].tolist():
            measured += 1
            try:
                total += sum(self.measure(self.plan.at(0, position), 0, position))
            except BadSample:
                continue  # counted when its turn comes
        rows = total / max(1, measured) * len(self.plan) / self.length
        return max(1, round(rows / count))

    def epoch(self, cursor: PackedCursor) -> int:
        """The epoch of the lane that is furthest behind, of those carried."""
        return min((state.read // self.plan.size(lane) for lane, state in cursor.lanes.items()), default=0)

    def state(self, cursors: Sequence[PackedCursor]) -> dict[str, Any]:
        """A line a lane: rows, items read, and the texts that wait as `items back[.text]`; about 3 kB."""
        lanes: dict[int, LaneState] = {}
        for cursor in cursors:
            for lane, state in cursor.lanes.items():
                if lane not in lanes or lanes[lane].rows < state.rows:
                    lanes[lane] = state
        written = {}
        for lane, state in sorted(lanes.items()):
            back = [
                f"{state.read - item}.{text}" if text else f"{state.read - item}"
                for item, text in state.places()
            ]
            written[str(lane)] = f"{state.rows} {state.read} {' '.join(back)}".strip()
        words = {"batching": self.kind, "taken": cursors[0].taken, "row_length": self.length}
        return {
            **words,
            **self.plan.words(),
            "lanes": written,
        }

    def resume(self, state: dict[str, Any], count: int) -> PackedCursor:
        """See Rows."""
        check_batching(state, self.kind)
        self.plan.resume({"epoch": 0, "position": 0, **state})  # only to compare the fingerprints
        if state["row_length"] != self.length:
            raise UserError(
                f"cannot resume packed data: rows had {state['row_length']} tokens and have {self.length} "
                "now; set data.row_length as it was"
            )
        lanes = {}
        for lane, line in state["lanes"].items():
            rows, read, *back = line.split()
            waiting = [tuple(map(int, f"{place}.0".split(".")[:2])) for place in back]
            places = tuple((int(read) - items, text) for items, text in waiting)
            lanes[int(lane)] = LaneState(int(rows), int(read), None, places)
        return PackedCursor(int(state["taken"]), lanes)
