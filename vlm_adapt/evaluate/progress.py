"""What a person sees while samples are scored: done, rate and time left. Knows counts only."""

from __future__ import annotations

import sys
import time

from vlm_adapt import dist

EVERY = 5.0  # seconds between lines


class Told:
    """Called with batches done and in all; the main rank prints a line now and then."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.printed = self.started

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if dist.is_main() and now - self.printed > EVERY:
            self.printed = now
            rate = done / (now - self.started)
            text = f"scored {done}/{total} batches  {rate:.2f} batches/s  {(total - done) / rate:.0f} s left"
            print(text, file=sys.stderr, flush=True)
