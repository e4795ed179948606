"""What a conversion shows while it runs: entries done, of how many, how fast, how long still.

Knows a terminal; knows nothing about what is converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Tell(Protocol):
    """Shows how far a stage of the work is."""

    def __call__(self, stage: str, done: int, total: int | None) -> None: ...


@contextmanager
def shown(show: bool) -> Iterator[Tell]:
    """A bar on standard error with count, rate and time left, or nothing."""
    if not show:
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        stages: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int | None) -> None:
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=total, completed=done, rate="")
            task = stages[stage]
            speed = bar.tasks[list(stages).index(stage)].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:,.0f}/s" if speed else "")

        yield tell
