"""A folder that is written whole or not at all.

Knows folders and disks; knows nothing about what is written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_adapt.errors import UserError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which takes its name at the end.

    After an error, Ctrl-C or a full disk it is removed again.

    Raises:
        UserError: something is there already, or it cannot be written.
    """
    check_target(target)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if target.is_dir():
            target.rmdir()  # it is empty
        os.replace(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        sentence = disk_sentence(error, target)
        if sentence:
            raise UserError(sentence) from error
        raise


def check_target(target: Path) -> None:
    """Whether a folder of this name can be made; before any work.

    Raises:
        UserError: something is there already, or there is no permission.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"'{target}' is there already and not empty: choose another folder")
    there = next(path for path in target.absolute().parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"'{target}' cannot be written: there is no permission in '{there}'")


def disk_sentence(error: BaseException, target: Path) -> str:
    """What to say of an error of the disk; nothing for others."""
    text = str(error)
    from_disk = any(words in text for words in ("No space left", "I/O error", "File too large", "quota"))
    if isinstance(error, UserError) or not (isinstance(error, OSError) or from_disk):
        return ""
    if isinstance(error, shutil.Error) and isinstance(
        error.args[0], list
    ):  # of copytree: (from, to, why) a file
        text = str(error.args[0][0][2]).partition(": ")[0]
    reason = getattr(error, "strerror", None) or text
    return f"'{target}' cannot be written ({reason}): nothing was left there; make room or choose another"
