"""One conversion at a time in a folder. Knows the folder and its lock; knows nothing about shards.

The lock is the kernel's, on the folder itself: no file is left, and it is held until the last of the
processes that have its descriptor has ended, writers that outlive a killed conversion included.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_adapt.errors import UserError

PATIENCE = 15.0  # seconds: what was killed a moment ago may still be ending


@contextmanager
def hold(folder: Path) -> Iterator[int]:
    """Keep other conversions out of a folder that exists; yields the lock's descriptor.

    Raises:
        UserError: another process writes there.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    until = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    break  # a file system without locks
                if time.monotonic() > until:
                    raise UserError(
                        f"another process is writing shards into {folder}: wait for it, or choose another "
                        "folder"
                    ) from error
            time.sleep(0.2)
        yield handle
    finally:
        os.close(handle)
