"""Which samples make which row of a global batch: one a row, or rows of like length together.

Knows the plan's order, the sizes of batches and, where it needs them, lengths; knows nothing about
files, ranks' models or workers. Packed rows are in pack.py. What a row holds is the same for any number
of ranks and workers: it follows from the plan alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vlm_adapt.data.lanes import LaneCursor, Plan, shuffled
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

BATCHES_AT_ONCE = 16  # global batches that bucketing sorts together

Measure = Callable[[int, int, int], list[int]]  # (number, epoch, position) to the lengths of its texts


@dataclass(frozen=True)
class Unit:
    """A sample's part of a row.

    Attributes:
        texts: which of the sample's texts, by number; None is all of them, each in a row of its own.
            Empty for a sample that was refused, which is entered in the account by whoever reads it.
        apart: the sample's other texts are in other rows.
    """

    epoch: int
    position: int
    number: int
    texts: tuple[int, ...] | None = None
    apart: bool = False


Row = tuple[Unit, ...]
Cursor = TypeVar("Cursor")


class Rows(ABC, Generic[Cursor]):
    """The rows of the stream, global batch after global batch.

    Args:
        plan: the order of samples.
        measure: gives the lengths of a sample's texts, where a kind of rows wants to know them.
        length: tokens of a row, where rows are filled.
        count: rows of a global batch.
    """

    kind: str

    def __init__(self, plan: Plan, measure: Measure | None = None, length: int = 0, count: int = 0):
        self.plan, self.measure, self.length, self.count = plan, measure or _unknown, length, count

    @abstractmethod
    def start(self) -> Cursor:
        """The beginning of the stream."""

    @abstractmethod
    def take(
        self, cursor: Cursor, count: int, mine: Collection[int] | None = None
    ) -> tuple[list[Row], Cursor]:
        """The rows of the next global batch, at most `count` of them, and the cursor after them.

        Args:
            mine: places of the batch that are wanted; rows of other places may be empty. None is all.
        """

    @abstractmethod
    def steps_per_epoch(self, count: int) -> int:
        """Global batches of `count` rows that show every sample once (an estimate, where lengths matter)."""

    @abstractmethod
    def epoch(self, cursor: Cursor) -> int:
        """The epoch that a cursor is in."""

    @abstractmethod
    def state(self, cursors: Sequence[Cursor]) -> dict[str, Any]:
        """What a checkpoint keeps of the cursors of all ranks: plain values."""

    @abstractmethod
    def resume(self, state: dict[str, Any], count: int) -> Cursor:
        """The cursor of a state, for global batches of `count` rows.

        Raises:
            UserError: the data, its settings or the seed are not the same.
        """


class PaddedRows(Rows[LaneCursor]):
    """A sample a row, in the order of the plan; an epoch's last batch takes what is left."""

    kind = "padded"

    def start(self) -> LaneCursor:
        """The first position of the first epoch."""
        return LaneCursor()

    def take(
        self, cursor: LaneCursor, count: int, mine: Collection[int] | None = None
    ) -> tuple[list[Row], LaneCursor]:
        """See Rows."""
        begin = self._begin(cursor)
        numbers, after = self.plan.take(begin, count, wrap=False)
        places = enumerate(numbers, begin.position)
        return [(Unit(begin.epoch, position, number),) for position, number in places], after

    def _begin(self, cursor: LaneCursor) -> LaneCursor:
        return cursor if cursor.position < len(self.plan) else LaneCursor(cursor.epoch + 1)

    def steps_per_epoch(self, count: int) -> int:
        """Exact."""
        return -(-len(self.plan) // count)

    def epoch(self, cursor: LaneCursor) -> int:
        """See Rows."""
        return cursor.epoch

    def state(self, cursors: Sequence[LaneCursor]) -> dict[str, Any]:
        """Two numbers, and what tells this plan from others."""
        return {**self.plan.state(cursors[0]), "batching": self.kind}

    def resume(self, state: dict[str, Any], count: int) -> LaneCursor:
        """See Rows."""
        check_batching(state, self.kind)
        return self.plan.resume(state)


class BucketedRows(PaddedRows):
    """Rows of like length in a batch: the samples of some batches are sorted by length and dealt anew.

    The batches that come of it are taken in random order, an incomplete one last. Every rank measures
    every sample, which costs reading and tokenizing its text. Of a sample's texts the longest counts.
    """

    kind = "bucketed"

    def __init__(self, plan: Plan, measure: Measure | None = None, length: int = 0, count: int = 0):
        super().__init__(plan, measure, length, count)
        self._windows: OrderedDict[tuple[int, int], list[list[Row]]] = OrderedDict()

    def take(
        self, cursor: LaneCursor, count: int, mine: Collection[int] | None = None
    ) -> tuple[list[Row], LaneCursor]:
        """See Rows. `count` must be that of the constructor."""
        begin = self._begin(cursor)
        window, place = divmod(begin.position, BATCHES_AT_ONCE * self.count)
        rows = self._window(begin.epoch, window)[place // self.count]
        return rows, LaneCursor(begin.epoch, begin.position + len(rows))

    def _window(self, epoch: int, window: int) -> list[list[Row]]:
        if (epoch, window) not in self._windows:
            size = BATCHES_AT_ONCE * self.count
            numbers, _ = self.plan.take(LaneCursor(epoch, window * size), size, wrap=False)
            units = [Unit(epoch, window * size + place, number) for place, number in enumerate(numbers)]
            units.sort(key=lambda unit: (self._length(unit), unit.position))
            batches: list[list[Row]] = [
                [(unit,) for unit in units[first : first + self.count]]
                for first in range(0, len(units), self.count)
            ]
            whole = len(units) // self.count
            order = shuffled(whole, self.plan.seed, epoch, window, "buckets").tolist()
            self._windows[epoch, window] = [batches[place] for place in order] + batches[whole:]
            while len(self._windows) > 2:
                self._windows.popitem(last=False)
        return self._windows[epoch, window]

    def _length(self, unit: Unit) -> int:
        try:
            return max(self.measure(unit.number, unit.epoch, unit.position))
        except BadSample:
            return 0  # whoever makes its row enters it in the account

    def state(self, cursors: Sequence[LaneCursor]) -> dict[str, Any]:
        """See PaddedRows; with the size of a batch, on which the buckets depend."""
        return {**super().state(cursors), "global_batch": self.count}

    def resume(self, state: dict[str, Any], count: int) -> LaneCursor:
        """See Rows."""
        cursor = super().resume(state, count)
        if state["global_batch"] != count:
            raise UserError(
                f"cannot resume bucketed data: a step took {state['global_batch']} samples and now takes "
                f"{count}: keep per_device_train_batch_size x gradient_accumulation_steps x processes"
            )
        return cursor


def _unknown(number: int, epoch: int, position: int) -> list[int]:
    raise ValueError("these rows were made without a way to measure texts")


def check_batching(state: dict[str, Any], kind: str) -> None:
    """Raise UserError unless a saved state is of this kind of rows."""
    if state.get("batching") != kind:
        raise UserError(
            f"cannot resume the data stream: its rows were {state.get('batching')} and are {kind} now; "
            "set data.batching as it was"
        )
