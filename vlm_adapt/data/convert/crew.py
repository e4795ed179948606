"""Writer processes: each takes a task, writes it, and takes the next.

Knows processes, their pipes and their deaths; knows nothing about what a task writes. A writer is a
Python of its own that imports only what entries need. It sees the end of the process that started it
as the end of its pipe, and leaves; a writer that dies ends the conversion with one sentence.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from vlm_adapt.data.convert.task import Job, run_task
from vlm_adapt.errors import UserError

Task = tuple[int, bytes]
_PATIENCE = 5.0  # seconds for a writer that was told to end
_GONE = (EOFError, BrokenPipeError, ConnectionResetError)
_COMMAND = "from vlm_adapt.data.convert.crew import serve; serve({})"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(handle: int) -> None:
    """The life of a writer process: a job, then tasks, until the pipe ends."""
    link = Connection(handle)
    with suppress(*_GONE):  # whoever wanted the shards has left; what was half-written is gone as well
        job = link.recv()
        while True:
            number, places = link.recv()
            try:
                record = run_task(job, number, places, lambda count: link.send(("cooked", count)))
            except _GONE:
                raise
            except UserError as error:
                link.send(("refused", str(error)))
            except Exception:
                link.send(("failed", traceback.format_exc()))  # raised again where it can be seen
            else:
                link.send(("done", record))


class _Writer:
    """A writer process as the main process sees it."""

    def __init__(self, job: Job, keep: tuple[int, ...]):
        self.link, theirs = Pipe()
        places = os.pathsep.join(place or os.getcwd() for place in sys.path)
        # Every core has a writer, so libraries in them need no threads; Ctrl-C is for the main process.
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": places}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND.format(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), *keep),
            env=environment,
            process_group=0,
        )
        theirs.close()
        self.task: Task = (-1, b"")
        self._send(job)

    def _send(self, what: Any) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # its death is noticed at the next `receive`
            self.link.send(what)

    def give(self, task: Task) -> None:
        """Let it write a task."""
        self.task = task
        self._send(task)

    def receive(self) -> tuple[str, Any]:
        """What it has to tell. UserError if it has died."""
        try:
            return self.link.recv()
        except (EOFError, OSError) as error:
            code = self.process.wait()
            how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
            name = signal.Signals(-code).name if code < 0 else ""
            raise UserError(
                f"a writer process {how}{f' ({name})' if name else ''} while it wrote shard "
                f"{self.task[0]:06d}, perhaps for want of memory: finished shards are kept, start again to "
                "go on (with fewer workers)"
            ) from error

    def end(self) -> None:
        """End the process, whatever it does."""
        self.link.close()
        self.process.terminate()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def run_all(
    job: Job,
    tasks: Iterable[Task],
    workers: int,
    report: Callable[[int], None],
    keep: tuple[int, ...] = (),
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Write all tasks, and yield `(number, record)` as they finish, in any order.

    Args:
        workers: processes; with less than two, tasks are written in this process.
        report: called with the number of entries cooked since its last call.
        keep: file descriptors that the writers shall hold as well, such as that of a lock.

    Raises:
        UserError: a task could not be written, or a writer died.
        RuntimeError: a converter's function raised something unforeseen, with its traceback.
    """
    waiting = iter(tasks)
    if workers < 2:
        for number, places in waiting:
            yield number, run_task(job, number, places, report)
        return
    writers: dict[Connection, _Writer] = {}
    try:
        for task in waiting:
            writer = _Writer(job, keep)
            writers[writer.link] = writer
            writer.give(task)
            if len(writers) == workers:
                break
        busy = set(writers)
        while busy:
            for link in wait(list(busy)):
                writer = writers[link]  # type: ignore[index]
                kind, content = writer.receive()
                if kind == "cooked":
                    report(content)
                    continue
                if kind == "refused":
                    raise UserError(content)
                if kind == "failed":
                    raise RuntimeError(f"a writer process failed:\n{content}")
                number, following = writer.task[0], next(waiting, None)
                if following is None:
                    busy.discard(writer.link)
                else:
                    writer.give(following)
                yield number, content
    finally:
        for writer in writers.values():
            writer.end()
        for path in job.folder.glob(".*.part"):
            if path != job.entries:
                path.unlink(missing_ok=True)
