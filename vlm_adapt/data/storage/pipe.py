"""Shards that a shell command writes: `pipe:COMMAND`.

Knows how to run a command that may fail, say nothing, or never end; knows nothing about what it writes.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import IO

from vlm_adapt.data.storage import Settings, Store
from vlm_adapt.data.storage.spooled import open_spooled
from vlm_adapt.errors import UserError

_CHUNK = 1 << 18
_PIPE_CLOSED = (0, 141)  # 141: an earlier command of a pipeline wrote more than the next one wanted


def run(command: str, silence: float) -> Iterator[bytes]:
    """What a command writes to its standard output.

    UserError with the last line of its standard error if it fails, writes nothing at all, or is silent
    for `silence` seconds; it is then ended, with all it started.
    """
    shell = shutil.which("bash")
    words = [shell, "-o", "pipefail", "-c", command] if shell else ["/bin/sh", "-c", command]
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"the command '{command}' of a shard cannot be run: {error.strerror}") from error
        assert process.stdout
        wrote, end = False, time.monotonic() + silence
        try:
            while True:
                left = max(0.0, end - time.monotonic())
                if not select.select([process.stdout], [], [], left)[0]:
                    raise _failed(command, f"wrote nothing for {silence:.0f} s", errors)
                chunk = os.read(process.stdout.fileno(), _CHUNK)
                if not chunk:
                    break
                yield chunk
                wrote, end = True, time.monotonic() + silence
            try:
                code = process.wait(timeout=silence)
            except subprocess.TimeoutExpired:
                raise _failed(command, f"did not end within {silence:.0f} s", errors) from None
            if code not in _PIPE_CLOSED:
                how = f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
                raise _failed(command, how, errors)
            if not wrote:
                raise _failed(command, "wrote nothing", errors)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()


def _failed(command: str, how: str, errors: IO[bytes]) -> UserError:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 4096))
    lines = [line.strip() for line in errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return UserError(f"the command '{command}' of a shard {how}{f': {lines[-1]}' if lines else ''}")


class _Pipe:
    """How commands are served."""

    def probe(self, name: str, settings: Settings) -> str:
        """Nothing is known of a command before it runs."""
        return ""

    def open_store(self, name: str, settings: Settings, identity: str | None) -> Store:
        """What the command wrote, from the cache if it ran before."""
        command = name.removeprefix("pipe:").strip()
        return open_spooled(name, settings, "", lambda: run(command, settings.pipe_silence))


SCHEME = _Pipe()
