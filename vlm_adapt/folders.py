"""Where the house keeps what it can fetch or make again, and the lock of a folder that one process writes.

Knows environment variables and the kernel's locks; knows nothing about what is kept or written.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from vlm_adapt.errors import UserError

PATIENCE = 15.0  # seconds: what was killed a moment ago may still be ending


def cache_root() -> Path:
    """The cache folder: `$VLM_ADAPT_CACHE`, else `vlm_adapt` under `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("VLM_ADAPT_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "vlm_adapt"


def lock(folder: Path, taken: str) -> int:
    """Take the kernel's lock on a folder that exists: no file is left, and any end of a process frees it.

    Args:
        taken: the sentence for when another process holds it.

    Returns:
        The descriptor that holds it, for `os.close`. Processes that inherit it hold it as well.

    Raises:
        UserError: another process holds it, and still does after PATIENCE seconds.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return handle  # a file system without locks
            if time.monotonic() > until:
                os.close(handle)
                raise UserError(taken) from error
        time.sleep(0.2)
