"""The stream of optimizer steps: global batches in one fixed order, cut for ranks and microbatches.

Knows the plan's order, batch sizes and worker processes; knows nothing about models. The global batch
of a step is a run of the plan's order, whatever the number of ranks and workers, and every step
carries the cursor to go on after it: what was prefetched and not trained on is read again.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vlm_adapt.data.collate import Batch, collate
from vlm_adapt.data.lanes import LaneCursor, Plan
from vlm_adapt.data.problems import Account
from vlm_adapt.data.reader import Reader


@dataclass(frozen=True)
class Shape:
    """How a global batch is cut: microbatch m of rank r holds samples (m * ranks + r) * size onwards."""

    per_device: int
    accumulation: int
    rank: int = 0
    ranks: int = 1

    @property
    def global_batch(self) -> int:
        """Samples an optimizer step takes from the stream."""
        return self.per_device * self.accumulation * self.ranks


@dataclass
class Step:
    """What one rank trains on in one optimizer step."""

    batches: list[Batch]
    cursor: LaneCursor
    account: Account
    wait: float = 0.0


Job = tuple[int, tuple[tuple[int, int], ...]]  # epoch, (position, sample number) of a microbatch


class _Jobs(Dataset[tuple[Batch, Account]]):
    """Makes a microbatch of a job; runs in worker processes."""

    def __init__(self, reader: Reader, options: dict[str, Any]):
        self.reader, self.options = reader, options

    def __getitem__(self, job: Any) -> tuple[Batch, Account]:
        epoch, places = job
        account, rows = Account(), []
        for position, number in places:
            rows += self.reader.training(number, epoch, position, account)
        return collate(rows, samples=account.used, **self.options), account


class Stream:
    """Steps from a cursor on.

    Args:
        options: of `collate`.
        workers: processes that read ahead; 0 reads in this one.
    """

    def __init__(self, reader: Reader, plan: Plan, shape: Shape, options: dict[str, Any], workers: int = 0):
        self.reader, self.plan, self.shape, self.workers = reader, plan, shape, workers
        self.dataset = _Jobs(reader, options)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch; the last one takes what is left."""
        return -(-len(self.plan) // self.shape.global_batch)

    def _cuts(self, cursor: LaneCursor) -> Iterator[tuple[LaneCursor, list[Job]]]:
        shape = self.shape
        while True:
            epoch, position = cursor.epoch, cursor.position
            if position >= len(self.plan):
                epoch, position = epoch + 1, 0
            numbers, cursor = self.plan.take(LaneCursor(epoch, position), shape.global_batch, wrap=False)
            places = [(position + offset, number) for offset, number in enumerate(numbers)]
            jobs = []
            for microbatch in range(shape.accumulation):
                first = (microbatch * shape.ranks + shape.rank) * shape.per_device
                jobs.append((epoch, tuple(places[first : first + shape.per_device])))
            yield cursor, jobs

    def steps(self, cursor: LaneCursor, count: int) -> Iterator[Step]:
        """`count` steps after the cursor."""
        # Ranks cut the same order on their own, so nothing needs to be sent between them.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        cuts, ahead = self._cuts(cursor), self._cuts(cursor)

        def jobs() -> Iterator[Job]:
            for _ in range(count):
                yield from next(ahead)[1]

        loader = iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                sampler=_Once(jobs()),
                num_workers=self.workers,
                prefetch_factor=4 if self.workers else None,
                generator=torch.Generator(),  # else it draws from the state that dropout goes on from
                worker_init_fn=_outlive_a_signal,
            )
        )
        for _ in range(count):
            after, mine = next(cuts)
            account, batches, started = Account(), [], time.perf_counter()
            for _ in mine:
                batch, part = next(loader)
                batches.append(batch)
                account.merge(part)
            yield Step(batches, after, account, time.perf_counter() - started)


def _outlive_a_signal(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers too; the run still needs them for its last step."""

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, once)


class _Once:
    """An iterator that DataLoader takes for a sampler."""

    def __init__(self, items: Iterator[Job]):
        self.items = items

    def __iter__(self) -> Iterator[Job]:
        return self.items
