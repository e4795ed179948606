"""What went wrong and was mended while shards were read: counted, and said once.

Knows reasons and their counts; knows nothing about storage. A note is no loss: every sample is still
read. Losses are problems (problems.py).
"""

from __future__ import annotations

import os
import sys
import threading

from vlm_adapt.data.problems import Problem

_lock = threading.Lock()
_counts: dict[str, int] = {}
_first: dict[str, Problem] = {}


def note(where: str, reason: str, detail: str = "") -> None:
    """Count a reason; its first time in this process is written to stderr."""
    with _lock:
        _counts[reason] = _counts.get(reason, 0) + 1
        if reason in _first:
            return
        _first[reason] = Problem(where, "", f"{reason}: {detail}" if detail else reason)
        line = f"note: {where}: {reason}{f' ({detail})' if detail else ''}; more of the kind are only counted"
    print(line, file=sys.stderr, flush=True)


def noted() -> list[tuple[Problem, int]]:
    """The first case of each reason, and how many there were in this process."""
    with _lock:
        return [(problem, _counts[reason]) for reason, problem in _first.items() if _counts[reason]]


def forget() -> None:
    """Begin anew."""
    with _lock:
        _counts.clear()
        _first.clear()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    for reason in _counts:  # what the parent counted is the parent's; it stays said
        _counts[reason] = 0


os.register_at_fork(after_in_child=_after_fork)
