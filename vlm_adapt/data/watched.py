"""Numbers handed out to processes, where a process that dies or hangs is known by the number it was at.

Knows processes, pipes and signals; knows nothing about what is done with a number. A decoder written in C
can take its process down with it: here that is a result like any other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

PATIENCE = 120.0  # seconds that one number may take
CHUNK = 32
IDLE, BROKEN = -1, "error"
MOST_DEATHS = 1000  # beyond that the machine is ill, not the samples


@dataclass(frozen=True)
class Death:
    """What became of a number whose process did not come back."""

    why: str


@dataclass
class _Hand:
    """One process: its pipe, the number it is at (shared), and what it was given."""

    process: Any
    pipe: Connection
    place: Any
    job: tuple[int, int] | None = None
    seen: tuple[int, float] = field(default=(IDLE, 0.0))  # the number last seen in `place`, and since when


def _serve(work: Callable[[int], Any], pipe: Connection, place: Any) -> None:
    """The life of a process: ranges in, lists of results out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and sends us home
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # its threads do not live through a fork
    parent = os.getppid()
    while True:
        while not pipe.poll(1.0):
            if os.getppid() != parent:
                return
        job = pipe.recv()
        if job is None:
            return
        results = []
        try:
            for number in range(*job):
                place.value = number
                results.append(work(number))
        except Exception as error:  # handed to the parent, which raises it
            pipe.send((BROKEN, error))
            return
        place.value = IDLE
        pipe.send((job[0], results))


def each(
    work: Callable[[int], Any], total: int, workers: int, patience: float = PATIENCE
) -> Iterator[tuple[int, Any]]:
    """(number, work(number)) for every number below `total`, in any order; Death where a process died.

    Args:
        work: picklable where processes are spawned; its exceptions are raised here.
        workers: processes; 0 works in this one, where a death is ours.
        patience: seconds after which a number's process is ended.
    """
    if workers == 0:
        yield from ((number, work(number)) for number in range(total))
        return
    # Forking is at once and shares the indexes; elsewhere (macOS) it is not safe.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs = deque((first, min(first + CHUNK, total)) for first in range(0, total, CHUNK))
    hands: list[_Hand] = []
    deaths = 0
    try:
        while True:
            while jobs and len(hands) < workers:
                hands.append(_hire(context, work))
            for hand in hands:
                if hand.job is None and jobs:
                    hand.job = jobs.popleft()
                    hand.seen = (hand.job[0], time.monotonic())
                    hand.pipe.send(hand.job)
            busy = [hand for hand in hands if hand.job is not None]
            if not busy:
                return
            ready = set(wait([hand.pipe for hand in busy], timeout=0.2))
            for hand in busy:
                if hand.pipe in ready and (answer := _answer(hand)) is not None:
                    first, results = answer
                    if first == BROKEN:
                        raise results
                    hand.job = None
                    yield from enumerate(results, first)
                elif hand.pipe in ready or _hangs(hand, patience):
                    why, number = _bury(hand, patience)
                    hands.remove(hand)
                    first, last = hand.job or (number, number)
                    # What came before it in the range is done again: its results died too.
                    jobs.extendleft(
                        reversed([(a, b) for a, b in ((first, number), (number + 1, last)) if a < b])
                    )
                    deaths += 1
                    if deaths > MOST_DEATHS:
                        raise ChildProcessError(f"{deaths} processes died; the last one {why}")
                    yield number, Death(why)
    finally:
        for hand in hands:
            hand.process.kill()
            hand.process.join()


def _hire(context: Any, work: Callable[[int], Any]) -> _Hand:
    ours, theirs = context.Pipe()
    place = context.Value("q", IDLE, lock=False)
    process = context.Process(target=_serve, args=(work, theirs, place), daemon=True)
    process.start()
    theirs.close()
    return _Hand(process, ours, place)


def _answer(hand: _Hand) -> tuple[Any, Any] | None:
    """What it sent, or None when it died instead."""
    try:
        return hand.pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def _hangs(hand: _Hand, patience: float) -> bool:
    now, number = time.monotonic(), hand.place.value
    if number != hand.seen[0]:
        hand.seen = (number, now)
    return now - hand.seen[1] > patience


def _bury(hand: _Hand, patience: float) -> tuple[str, int]:
    """How a process ended (it is ended here if it hangs) and at which number."""
    hand.process.join(1.0)
    code = hand.process.exitcode
    number = hand.place.value
    if code is None:
        hand.process.kill()
        hand.process.join()
        why = f"took more than {patience:.0f} s"
    elif code < 0:
        name = signal.Signals(-code).name
        why = f"ended its process with {name}"
        why += " (out of memory?)" if name == "SIGKILL" else ""
    else:
        why = f"ended its process with code {code}"
    hand.pipe.close()
    first = hand.job[0] if hand.job else 0
    return why, number if number != IDLE else first
