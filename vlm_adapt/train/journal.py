"""The run's record: `journal.jsonl`, a line a step, plus events; TensorBoard and wandb on request.

Knows lines and files; knows nothing about what the numbers mean. Lines are flushed as they are
written: a killed run loses at most the step it was in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from vlm_adapt.errors import UserError

FILE = "journal.jsonl"


class Journal:
    """Writes on the main rank; does nothing elsewhere.

    Args:
        folder: the run's output folder.
        reporters: `tensorboard`, `wandb`.
    """

    def __init__(self, folder: Path, main: bool, reporters: Sequence[str] = (), name: str = ""):
        self.folder, self.main, self.name = folder, main, name
        self.file: TextIO | None = None
        self.kinds = tuple(reporters)
        self.reporters: list[Any] = []
        for kind in self.kinds:
            if importlib.util.find_spec(kind) is None:
                raise UserError(f"train.report_to '{kind}' needs `pip install {kind}`")

    def open(self) -> None:
        """Begin to write; until then nothing is made in the folder.

        Raises:
            UserError: the file cannot be opened.
        """
        if not self.main:
            return
        try:
            self.file = (self.folder / FILE).open("a", encoding="utf-8")
        except OSError as error:
            path = self.folder / FILE
            raise UserError(f"the journal '{path}' cannot be opened: {error.strerror}") from error
        self.reporters = [_reporter(kind, self.folder, self.name) for kind in self.kinds]

    def step(self, line: Mapping[str, Any]) -> None:
        """One optimizer step."""
        self._write(line)
        for reporter in self.reporters:
            reporter(int(line["step"]), _flat(line))

    def event(self, event: str, **values: Any) -> None:
        """Anything else that happened, with its time."""
        self._write({"event": event, **values, "time": round(time.time(), 3)})
        if event == "evaluate":
            for reporter in self.reporters:
                reporter(int(values["step"]), _flat(values["metrics"], "evaluate/"))

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.file is None:
            return
        try:
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"the journal '{self.folder / FILE}' cannot be written ({error.strerror}): free some space "
                "and start again; the run goes on from its last checkpoint"
            ) from error

    def close(self) -> None:
        """Every line was flushed when it was written, so a failure here has been told already."""
        if self.file is not None:
            file, self.file = self.file, None
            with suppress(OSError):
                file.close()


def read_journal(folder: Path, file: str = FILE) -> list[dict[str, Any]]:
    """The lines of the journal (or of another such file); a last line cut off by a kill is left out."""
    path = folder / file
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def rewind(folder: Path, step: int, file: str = FILE) -> int:
    """Drop lines of steps after `step`, which will be taken again.

    Returns:
        How many step lines were dropped.
    """
    lines = read_journal(folder, file)
    kept = [line for line in lines if line.get("step", 0) <= step]
    temporary = folder / (file + ".tmp")
    temporary.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8"
    )
    os.replace(temporary, folder / file)
    return sum("event" not in line for line in lines) - sum("event" not in line for line in kept)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[prefix + key] = float(value)
    return flat


def _reporter(kind: str, folder: Path, name: str) -> Any:
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return to_tensorboard
    import wandb

    run = wandb.init(project="vlm_adapt", name=name, dir=str(folder), resume="allow")
    return lambda step, values: run.log(values, step=step)
