"""One conversion at a time in a folder. Knows the folder and its lock; knows nothing about shards.

The lock is the kernel's, on the folder itself: no file is left, and it is held until the last of the
processes that have its descriptor has ended, writers that outlive a killed conversion included.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_adapt.folders import lock


@contextmanager
def hold(folder: Path) -> Iterator[int]:
    """Keep other conversions out of a folder that exists; yields the lock's descriptor.

    Raises:
        UserError: another process writes there.
    """
    handle = lock(
        folder, f"another process is writing shards into {folder}: wait for it, or choose another folder"
    )
    try:
        yield handle
    finally:
        os.close(handle)
