"""Ctrl-C and SIGTERM as a wish to stop after the current step. Knows signals only."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from vlm_adapt import dist


class Signals:
    """Remembers a SIGINT or SIGTERM while it is entered; a second one ends the process as usual."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether somebody wants the run to stop."""
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if dist.is_main():  # not print: a handler may have interrupted one
            os.write(2, b"\nstopping after this step (once more to stop at once)\n")
        signal.signal(number, self._before[number])

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
