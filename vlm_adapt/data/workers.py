"""Processes that make microbatches ahead of training, and what is said when one of them dies.

Knows jobs and processes; knows nothing about what a job is. Finished batches come through shared
memory (torch's DataLoader). A worker that dies is replaced once for each sample it may have died of;
where a second one dies at the same sample, the run ends and names it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vlm_adapt.errors import UserError

PLACE_BYTES = 512  # for a key and a shard's name
RESTARTS = 5  # in a run; more deaths than that have a cause that a restart does not mend


_END = object()


class _Desk:
    """Shared memory in which every worker notes what it reads now."""

    places: Any = None


def tell_what_is_read(reader: Any, number: int) -> None:
    """Note the sample that this worker process begins to read; elsewhere nothing."""
    worker = get_worker_info()
    if worker is None or _Desk.places is None:
        return
    text = reader.place(number).encode("utf-8", "replace")[: PLACE_BYTES - 1]
    start = worker.id * PLACE_BYTES
    _Desk.places[start : start + PLACE_BYTES] = text + bytes(PLACE_BYTES - len(text))


class Ahead:
    """An iterator's items fetched ahead by a thread.

    Args:
        size: how many; 0 fetches nothing ahead, in the caller's own thread.
    """

    def __init__(self, items: Iterator[Any], size: int):
        self.items, self.size = items, size
        self.ready: queue.Queue[tuple[str, Any]] = queue.Queue(max(1, size))
        self.stopped = threading.Event()
        self.busy = threading.Lock()  # held while an item is fetched: forking then would copy held locks
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Ahead:
        return self

    def _fetch(self) -> None:
        try:
            while not self.stopped.is_set():
                with self.busy:
                    item = next(self.items, _END)
                self._put("end" if item is _END else "item", item)
                if item is _END:
                    return
        except BaseException as error:  # raised where the item is asked for
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> None:
        while not self.stopped.is_set():
            try:
                self.ready.put((kind, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.size:
            return next(self.items)
        if self.stopped.is_set():
            raise StopIteration
        if self.thread is None:  # after the workers were forked: threads and forks do not go together
            self.thread = threading.Thread(target=self._fetch, daemon=True)
            self.thread.start()
        kind, value = self.ready.get()
        if kind == "item":
            return value
        self.stopped.set()
        if kind == "error":
            raise value
        raise StopIteration

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        if self.thread is not None:
            self.thread.join(timeout=5)


class Workers:
    """Worker processes that turn jobs into batches, in order.

    Args:
        dataset: `dataset[job]` makes a batch.
        count: processes; 0 makes batches here.
        pin: put batches into page-locked memory.
    """

    def __init__(self, dataset: Dataset[Any], count: int, pin: bool = False):
        self.dataset, self.count, self.pin = dataset, count, pin
        self.restarts = 0
        self.fatal: set[str] = set()  # what a worker that died was reading

    def run(self, jobs: Ahead) -> Iterator[Any]:
        """A batch for every job."""
        if not self.count:
            yield from (self.dataset[job] for job in jobs)
            return
        owed: deque[Any] = deque()  # jobs handed out whose batches have not come
        while True:
            again = list(owed)
            owed.clear()
            jobs.busy.acquire()  # until the workers are forked, which is before they are handed a job
            loader = self._loader(_Handed(again, jobs, owed))
            try:
                for made in loader:
                    owed.popleft()
                    if isinstance(made, _Told):
                        raise UserError(made.text)
                    yield made
                return
            except RuntimeError as error:
                # The loader's words for a death; an error of our own in a worker comes with its traceback.
                if "DataLoader worker" not in str(error) or "exited unexpectedly" not in str(error):
                    raise
                self._mourn(loader, error)
            finally:
                loader._shutdown_workers()  # now, and not when the last traceback that knows them is gone

    def _loader(self, jobs: Iterator[Any]) -> Any:
        _Desk.places = multiprocessing.get_context("fork").RawArray(ctypes.c_char, self.count * PLACE_BYTES)
        loader = iter(
            DataLoader(
                _Guarded(self.dataset),
                batch_size=None,
                sampler=_Once(jobs),
                num_workers=self.count,
                prefetch_factor=4,
                multiprocessing_context="fork",
                pin_memory=self.pin,
                generator=torch.Generator(),  # else it draws from the state that dropout goes on from
                worker_init_fn=_outlive_a_signal,
            )
        )
        # Torch raises a worker's death in whatever line the main thread is at; ours is told when the
        # next batch is asked for, between steps.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return loader

    def _mourn(self, loader: Any, error: RuntimeError) -> None:
        """Say which worker died of what, and decide whether others take over."""
        dead = [(number, process) for number, process in enumerate(loader._workers) if not process.is_alive()]
        told, again = [], False
        for number, process in dead:
            raw = bytes(_Desk.places[number * PLACE_BYTES : (number + 1) * PLACE_BYTES])
            place = raw.rstrip(b"\0").decode("utf-8", "replace") or "nothing yet"
            told.append(f"{number} (process {process.pid}, {_ending(process.exitcode)}), reading {place}")
            again |= place in self.fatal
            self.fatal.add(place)
        self.restarts += 1
        words = f"data worker {'; '.join(told) or error}"
        if again or self.restarts > RESTARTS:
            reason = "for the second time at this sample" if again else f"after {RESTARTS} restarts"
            raise UserError(
                f"{words}, died {reason}: look at the sample with `vlm-adapt shards lint`, or give the "
                "workers more memory; start again to go on from the last checkpoint"
            )
        print(f"{words}, died; others take over and nothing is lost", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Told:
    """A UserError on its way out of a worker; raised there, torch would wrap it in a traceback."""

    text: str


class _Guarded(Dataset[Any]):
    """A dataset that hands out its user's mistakes instead of raising them."""

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset

    def __getitem__(self, job: Any) -> Any:
        try:
            return self.dataset[job]
        except UserError as error:
            return _Told(str(error))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"


def _outlive_a_signal(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers too; the run still needs them for its last step."""

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, once)


class _Handed:
    """Jobs on their way to workers: first those whose batches never came; every one is noted as owed."""

    def __init__(self, again: list[Any], jobs: Ahead, owed: deque[Any]):
        self.again, self.jobs, self.owed = deque(again), jobs, owed
        self.forked = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self.forked:
            self.forked = True
            self.jobs.busy.release()
        job = self.again.popleft() if self.again else next(self.jobs)
        self.owed.append(job)
        return job


class _Once:
    """An iterator that DataLoader takes for a sampler."""

    def __init__(self, items: Iterator[Any]):
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return self.items
