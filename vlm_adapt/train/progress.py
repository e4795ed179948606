"""What a person sees while a run trains: a bar with rate and time left, or plain lines in a log.

Knows rich and terminals; knows nothing about what is trained.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

LINE_EVERY = 10.0  # seconds between lines when no terminal is there to redraw


class Progress:
    """A progress bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, name: str, total: int, done: int, quiet: bool = False):
        self.name, self.total, self.done, self.quiet = name, total, done, quiet
        self.start_done, self.started, self.printed = done, time.monotonic(), 0.0
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total, completed=self.done, text="")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, line: Mapping[str, Any]) -> None:
        """One more step is done."""
        self.done += 1
        if self.quiet:
            return
        text = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, text=text)
            return
        now = time.monotonic()
        if now - self.printed >= LINE_EVERY or self.done == self.total:
            self.printed = now
            rate = (self.done - self.start_done) / max(1e-9, now - self.started)
            left = (self.total - self.done) / max(1e-9, rate)
            text = f"{self.name} {self.done}/{self.total}  {text}  {rate:.2f} steps/s  {left:.0f} s left"
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)
