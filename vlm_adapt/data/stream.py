"""The stream of optimizer steps: global batches in one fixed order, cut for ranks and microbatches.

Knows rows, batch sizes and worker processes; knows nothing about models. The global batch of a step
follows from the plan, whatever the number of ranks and workers, and every step carries the cursor to go
on after it: what was prefetched and not trained on is read again.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch.utils.data import Dataset

from vlm_adapt.data.collate import collate
from vlm_adapt.data.problems import Account
from vlm_adapt.data.rows import Cursor, Row, Rows
from vlm_adapt.data.storage.notes import noted
from vlm_adapt.data.workers import Ahead, Workers, tell_what_is_read


@dataclass(frozen=True)
class Shape:
    """How a global batch is cut: microbatch m of rank r holds rows (m * ranks + r) * size onwards."""

    per_device: int
    accumulation: int
    rank: int = 0
    ranks: int = 1

    @property
    def global_batch(self) -> int:
        """Rows an optimizer step takes from the stream."""
        return self.per_device * self.accumulation * self.ranks

    def places(self, microbatch: int) -> range:
        """This rank's places in the global batch."""
        first = (microbatch * self.ranks + self.rank) * self.per_device
        return range(first, first + self.per_device)


@dataclass
class Step(Generic[Cursor]):
    """What one rank trains on in one optimizer step.

    Attributes:
        cursor: where the stream goes on after it.
        epoch: that the cursor is in.
        wait: seconds that training waited for it.
    """

    batches: list[Any]
    cursor: Cursor
    epoch: int
    account: Account
    wait: float = 0.0


class Microbatches(Dataset[tuple[Any, Account]]):
    """Makes a microbatch of its rows; runs in worker processes."""

    def __init__(self, reader: Any, options: dict[str, Any], collate: Callable[..., Any] = collate):
        self.reader, self.options, self.collate = reader, options, collate
        self.told: dict[str, int] = {}  # notes of this process that are in an account already

    def __getitem__(self, rows: Any) -> tuple[Any, Account]:
        account, made = Account(), []
        for row in rows:
            row_texts: list[Any] = []
            for unit in row:
                tell_what_is_read(self.reader, unit.number)
                texts = self.reader.training(
                    unit.number, unit.epoch, unit.position, account, unit.texts, unit.apart
                )
                row_texts += texts if unit.texts is not None else [[text] for text in texts]
            if row and row[0].texts is None:
                made += row_texts  # each text has a row of its own
            elif row:
                made.append(row_texts)
        for problem, count in noted():
            account.mended[str(problem)] = count - self.told.get(str(problem), 0)
            self.told[str(problem)] = count
        account.mended = {reason: count for reason, count in account.mended.items() if count}
        return self.collate(made, samples=account.used, **self.options), account


class Stream(Generic[Cursor]):
    """Steps from a cursor on.

    Args:
        reader: of texts or of masks: `training(number, epoch, position, account, texts, apart)` gives rows.
        options: of `collate`, which puts rows together.
        workers: processes that read ahead; 0 reads in this one.
    """

    def __init__(
        self,
        reader: Any,
        rows: Rows[Cursor],
        shape: Shape,
        options: dict[str, Any],
        workers: int = 0,
        collate: Callable[..., Any] = collate,
    ):
        self.reader, self.rows, self.shape, self.workers = reader, rows, shape, workers
        self.dataset = Microbatches(reader, options, collate)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that show every sample once."""
        return self.rows.steps_per_epoch(self.shape.global_batch)

    def _cuts(self, cursor: Cursor, count: int) -> Iterator[tuple[Cursor, list[tuple[Row, ...]]]]:
        """For each step the cursor after it and this rank's microbatches.

        Ranks cut the same order on their own, so nothing needs to be sent between them.
        """
        shape = self.shape
        places = [shape.places(microbatch) for microbatch in range(shape.accumulation)]
        mine = [place for part in places for place in part]
        for _ in range(count):
            rows, cursor = self.rows.take(cursor, shape.global_batch, mine)
            yield cursor, [tuple(rows[part.start : part.stop]) for part in places]

    def steps(self, cursor: Cursor, count: int) -> Iterator[Step[Cursor]]:
        """`count` steps after the cursor.

        Raises:
            UserError: a worker process died again at the sample at which one died before.
        """
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        after: deque[Cursor] = deque()

        def jobs() -> Iterator[tuple[Row, ...]]:
            for place, microbatches in self._cuts(cursor, count):
                after.append(place)
                yield from microbatches

        workers = Workers(self.dataset, self.workers, pin=torch.cuda.is_available())
        # Measuring texts for packing reads shards: not in the moment when training asks for a batch.
        with Ahead(jobs(), 4 * self.workers) as ahead:
            made = workers.run(ahead)
            for _ in range(count):
                account, batches, started = Account(), [], time.perf_counter()
                for _ in range(self.shape.accumulation):
                    batch, part = next(made)
                    batches.append(batch)
                    account.merge(part)
                place = after.popleft()
                wait = time.perf_counter() - started
                yield Step(batches, place, self.rows.epoch(place), account, wait)
