"""One self-contained HTML page of a run: summary, curves, scores, samples.

Puts the page together; what is on disk is read.py's, scores are scores.py's, curves curves.py's, data
data.py's, samples gallery.py's, the looks style.py's. The page loads nothing from anywhere and asks for
no network.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from vlm_adapt.report.account import Told, told
from vlm_adapt.report.curves import curves
from vlm_adapt.report.data import data_section
from vlm_adapt.report.gallery import gallery
from vlm_adapt.report.masks import masks
from vlm_adapt.report.read import RunRecord, read_run
from vlm_adapt.report.scores import parts, score_text, scores
from vlm_adapt.report.series import pick, smooth
from vlm_adapt.report.style import CSS, SCRIPT
from vlm_adapt.report.words import count, duration, number, share


def write_report(run_folder: Path, output: Path | None = None, samples: int = 240) -> Path:
    """Write the report of a run and return its path.

    Args:
        run_folder: the run's folder, with any of journal.jsonl, metrics.json, predictions.jsonl (the last two
            also in a folder below), parts.json and the config.
        output: the HTML file; by default `report.html` in the run's folder.
        samples: how many samples are shown at most.

    Raises:
        UserError: there is no such folder, or nothing in it to report on.
    """
    run_folder = Path(run_folder)
    record = read_run(run_folder)
    output = Path(output) if output is not None else run_folder / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    page = render(record, samples, output)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(output)
    return output


def render(record: RunRecord, samples: int = 240, page: Path | None = None) -> str:
    """The page as text; `page` is where it will lie."""
    cards, notes = gallery(record.predictions, record.predictions_folder, record.folder, samples)
    account = told(record)
    data = data_section(record, account, page)
    notes = [*record.notes, *notes]
    above = [_summary(record, account), _notes(notes), scores(record), masks(record), curves(record)]
    sections = [*above, data, parts(record), cards]
    title = escape(_name(record))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{title} · run report</title><style>{CSS}</style></head><body><main>"
        f"{''.join(sections)}</main><script>{SCRIPT}</script></body></html>"
    )


def _name(record: RunRecord) -> str:
    start = record.event("start")
    return str(start.get("name") or start.get("config") or record.folder.resolve().name)


def _look(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _tile(title: str, value: str, note: str = "") -> str:
    small = f"<small>{escape(note)}</small>" if note else ""
    return f'<div class="tile"><span>{escape(title)}</span><strong>{escape(value)}</strong>{small}</div>'


def _summary(record: RunRecord, account: Told | None) -> str:
    start, tiles = record.event("start"), []
    for name in ("accuracy", "CIDEr", "miou", "pixel_accuracy"):
        value, blind = _look(record.metrics, name), _look(record.metrics, "blind", name)
        if isinstance(value, int | float):
            note = f"{score_text(name, blind)} blind" if isinstance(blind, int | float) else ""
            title = {"miou": "mIoU"}.get(name, name.replace("_", " "))
            tiles.append(
                _tile(title.capitalize() if title.islower() else title, score_text(name, value), note)
            )
    # Of the last stage: the one before may have minimised something else.
    last_stage = record.steps[-1].get("stage") if record.steps else None
    losses = pick([step for step in record.steps if step.get("stage") == last_stage], "loss")
    if losses:
        last = smooth(losses)[-1][1]
        tiles.append(_tile("Loss", number(last), f"smoothed; first step {number(losses[0][1])}"))
    if record.steps:
        last_line = record.steps[-1]
        seen = last_line.get("samples")
        note = f"{number(seen)} samples" if isinstance(seen, int | float) else ""
        tiles.append(_tile("Steps", count(last_line["step"]), note))
    if record.elapsed:
        resumed = sum(event.get("event") == "resume" for event in record.events)
        note = f"resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed else ""
        tiles.append(_tile("Working time", duration(record.elapsed), note))
    speeds = [y for _, y in pick(record.steps, "tokens_per_second")]
    if speeds:
        tiles.append(_tile("Tokens a second", number(statistics.median(speeds)), "median"))
    if account is not None and account.refused and account.read:
        note = f"{count(account.refused)} samples; see Data"
        tiles.append(_tile("Refused", share(account.refused / account.read), note))
    facts = {
        "Vision": _look(record.config, "model", "vision", "model"),
        "Connector": _look(record.config, "model", "connector", "name"),
        "Language": _look(record.config, "model", "language", "model"),
        "Adapted": _adapted(record.config),
        "Hardware": start.get("hardware"),
        "Versions": start.get("versions"),
        "Seed": _look(record.config, "seed"),
    }
    listed = "".join(
        f"<div><dt>{name}</dt><dd>{escape(_words(value))}</dd></div>"
        for name, value in facts.items()
        if value not in (None, "", {}, [])
    )
    return (
        f'<header><p class="over">vlm_adapt run report</p><h1>{escape(_name(record))}</h1>'
        f"{f'<dl class=facts>{listed}</dl>' if listed else ''}</header>"
        f'<div class="tiles">{"".join(tiles)}</div>'
    )


def _adapted(config: Any) -> str | None:
    stages = _look(config, "stages") or []
    plans: list[tuple[Any, Any]] = [
        (s.get("name"), s.get("adapt")) for s in stages if isinstance(s, Mapping) and s.get("adapt")
    ]
    plans = plans or [(None, _look(config, "adapt") or [])]
    texts = []
    for name, plan in plans:
        lines = [f"{p.get('method')} on {p.get('where')}" for p in plan if isinstance(p, Mapping)]
        texts.append((f"{name}: " if name else "") + ", ".join(lines))
    return "; ".join(texts) or None


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _notes(notes: list[str]) -> str:
    if not notes:
        return ""
    return f'<aside class="notes"><ul>{"".join(f"<li>{escape(n)}</li>" for n in notes)}</ul></aside>'
