"""Honest progress of a download: bytes that lie on the disk against the size that is expected.

Knows a folder and the name of a file that grows somewhere under it; nothing about who writes it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

_EVERY_S = 5.0


class Progress:
    """Shows a bar on a terminal, else a plain line on stderr every few seconds.

    Args:
        what: name for the lines.
        expected: bytes of the finished file.
        folder: where the file grows, at any depth.
        name: its file name.
    """

    def __init__(self, what: str, expected: int, folder: Path, name: str):
        self.what, self.expected, self.folder, self.name = what, expected, folder, name
        self.start = self.last = time.perf_counter()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.task = self.bar.add_task(f"fetching {self.what}", total=self.expected)
            self.bar.start()
        else:
            text = f"fetching {self.what} ({self.expected / 1e6:.0f} MB) with pip"
            print(text, file=sys.stderr, flush=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self._bytes())
            self.bar.stop()
        elif kind is None:
            self._line()

    def _bytes(self) -> int:
        """Size of the largest file of that name: pip copies the finished file once."""
        sizes = [0]
        for folder, _, names in os.walk(self.folder):
            if self.name in names:
                try:
                    sizes.append(os.stat(os.path.join(folder, self.name)).st_size)
                except FileNotFoundError:  # moved between the listing and the look
                    continue
        return min(max(sizes), self.expected)

    def _line(self) -> None:
        seconds = time.perf_counter() - self.start
        got = self._bytes()
        sizes = f"{got / 1e6:.1f} of {self.expected / 1e6:.1f} MB"
        text = f"{self.what}: {sizes} ({100 * got // max(self.expected, 1)} %) after {seconds:.0f} s"
        print(text, file=sys.stderr, flush=True)

    def look(self) -> None:
        """Look at the disk once and show what is new."""
        if self.bar is not None:
            self.bar.update(self.task, completed=self._bytes())
        elif time.perf_counter() - self.last >= _EVERY_S:
            self.last = time.perf_counter()
            self._line()
