"""Reads what a run left in its folder: journal, parts, metrics, predictions, config.

Every piece may be missing and a line may be broken (a run that was killed): what could not be read is named
in `notes`, never guessed. Knows nothing about how it is shown.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_adapt.errors import UserError

CONFIGS = ("config.yaml", "config.yml", "run.yaml", "config.json", "run.json")


@dataclass
class RunRecord:
    """A run as it stands on disk.

    Attributes:
        steps: the journal's lines of steps, by step, each step once.
        events: its other lines (start, resume, evaluate, stop), in order.
        metrics: `metrics.json` or None. predictions: the lines of `predictions.jsonl`.
        predictions_folder: what the images of the predictions are relative to.
        metrics_folder: where the metrics lie, with the pictures of an evaluation.
        parts: rows of {part, trainable, frozen}. config: the resolved run or None.
        elapsed: seconds of work in the journal, pauses between a stop and a resume left out.
        notes: sentences on what is missing, broken or repeated.
    """

    folder: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] | None = None
    predictions: list[dict[str, Any]] = field(default_factory=list)
    predictions_folder: Path = Path()
    metrics_folder: Path | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] | None = None
    elapsed: float = 0.0
    notes: list[str] = field(default_factory=list)

    def event(self, name: str) -> dict[str, Any]:
        """The last event of that name, or an empty one."""
        return next((e for e in reversed(self.events) if e.get("event") == name), {})


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        UserError: it is no folder, or holds neither a journal nor metrics nor predictions.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder at {folder}; give the output_dir of a run")
    record = RunRecord(folder)
    _read_journal(record)
    metrics = _find(folder, "metrics.json")
    record.metrics = _json(record, metrics) if metrics else None
    record.metrics_folder = metrics.parent if metrics else None
    predictions = _find(folder, "predictions.jsonl")
    if predictions:
        record.predictions_folder = predictions.parent
        record.predictions = [line for line in _lines(record, predictions) if "prediction" in line]
    _read_parts(record)
    _read_config(record)
    if not (record.steps or record.events or record.metrics or record.predictions):
        raise UserError(f"{folder} holds no journal.jsonl, metrics.json or predictions.jsonl to report on")
    if record.metrics is None:
        record.notes.append("This run has no metrics.json yet: it has not been evaluated.")
    masks = predictions and record.metrics and {"per_class", "sources"} & set(record.metrics)
    if metrics and not record.predictions and not masks:
        record.notes.append("There is no predictions.jsonl beside the metrics, so no samples are shown.")
    return record


def _find(folder: Path, name: str) -> Path | None:
    """The file in the folder, or else the newest one of that name in a folder below."""
    if (folder / name).is_file():
        return folder / name
    below = [path for path in folder.glob(f"*/{name}") if path.is_file()]
    return max(below, key=lambda path: (path.stat().st_mtime, str(path)), default=None)


def _json(record: RunRecord, path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        record.notes.append(f"{path.name} could not be read ({error}).")
        return None
    if not isinstance(value, dict):
        record.notes.append(f"{path.name} does not hold an object of names and values and is left out.")
        return None
    return value


def _lines(record: RunRecord, path: Path) -> list[dict[str, Any]]:
    good: list[dict[str, Any]] = []
    broken: list[int] = []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            broken.append(place)
            continue
        good.append(value) if isinstance(value, dict) else broken.append(place)
    if broken and broken[-1] == len(lines):
        record.notes.append(f"The last line of {path.name} is cut off: the run was stopped while writing it.")
        broken.pop()
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (" and more" if len(broken) > 5 else "")
        record.notes.append(f"{len(broken)} unreadable line(s) of {path.name} are left out: {shown}.")
    return good


def _read_journal(record: RunRecord) -> None:
    path = record.folder / "journal.jsonl"
    if not path.is_file():
        record.notes.append("There is no journal.jsonl, so no training curves are shown.")
        return
    by_step: dict[int, dict[str, Any]] = {}
    repeated, before = 0, None
    for line in _lines(record, path):
        now = line.get("time")
        if isinstance(now, int | float):
            if before is not None and line.get("event") not in ("start", "resume"):
                record.elapsed += max(0.0, now - before)
            before = now
        if "event" in line:
            record.events.append(line)
        elif isinstance(line.get("step"), int):
            repeated += line["step"] in by_step
            by_step[line["step"]] = line
    record.steps = [by_step[step] for step in sorted(by_step)]
    odd = sum(isinstance(s.get("loss"), float) and not math.isfinite(s["loss"]) for s in record.steps)
    if odd:
        record.notes.append(f"The loss of {odd} step(s) is not a finite number; they are not drawn.")
    if repeated:
        record.notes.append(f"{repeated} step(s) were run again after a resume; the later run is shown.")


def _read_parts(record: RunRecord) -> None:
    """`parts.json`: {part: {trainable, frozen}} or a list of {part, trainable, frozen}."""
    path = record.folder / "parts.json"
    if not path.is_file():
        return
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            value = [{"part": name, **counts} for name, counts in value.items()]
        record.parts = [
            {"part": str(row["part"]), "trainable": int(row["trainable"]), "frozen": int(row["frozen"])}
            for row in value
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        record.notes.append(f"parts.json could not be read ({type(error).__name__}: {error}).")


def _read_config(record: RunRecord) -> None:
    path = next((record.folder / n for n in CONFIGS if (record.folder / n).is_file()), None)
    if path is None:
        return
    if path.suffix == ".json":
        record.config = _json(record, path)
        return
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        record.notes.append(f"{path.name} could not be read ({type(error).__name__}).")
        return
    record.config = value if isinstance(value, dict) else None
