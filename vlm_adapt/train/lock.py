"""One run at a time in an output folder. Knows a folder and its lock; knows nothing about runs.

The lock is the kernel's, on the folder itself: no file is left, and whatever ends the process, kill -9
as well, gives it back.
"""

from __future__ import annotations

import os
from pathlib import Path

from vlm_adapt.folders import lock


class OutputLock:
    """Held while a run writes.

    Args:
        folder: the run's output folder; it need not exist yet.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.held: int | None = None

    def take(self) -> None:
        """Take the lock, if the folder exists and it is not held yet.

        Raises:
            UserError: another process writes there.
        """
        if self.held is not None or not self.folder.is_dir():
            return
        self.held = lock(
            self.folder,
            f"another process is training into '{self.folder}': wait for it, or choose another output_dir",
        )

    def release(self) -> None:
        """Give it back."""
        if self.held is not None:
            os.close(self.held)
            self.held = None
