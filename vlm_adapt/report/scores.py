"""The sections of scores (bars by kind, tables) and of the parts that were trained.

Knows metrics.json and parts.json as read; knows nothing about how they came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from vlm_adapt.report.charts import bars
from vlm_adapt.report.plots import accuracy_rows
from vlm_adapt.report.read import RunRecord
from vlm_adapt.report.words import count, number, share

# Scores from 0 to 1 that are read as percentages; others (CIDEr, loss) are written as they are.
PERCENT = (
    *("accuracy", "BLEU", "ROUGE", "METEOR", "mIoU", "miou", "pixel_accuracy", "mean_accuracy"),
    *("frequency_weighted_iou", "harmonic_miou"),
)
COUNTS = ("samples", "samples_available", "samples_in_shards", "questions", "pixels")  # said in a sentence


def score_text(name: str, value: float) -> str:
    """A score as its readers write it: shares in percent, others as they are."""
    return share(value) if name.startswith(PERCENT) else number(value)


def groups(metrics: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """The metrics themselves under the name "", and each set of metrics that is named inside them."""
    metrics = metrics or {}
    return {"": metrics} | {
        str(name): value
        for name, value in metrics.items()
        if isinstance(value, Mapping)
        and not name.endswith("by_kind")
        and name not in ("blind", "absent", "account")
    }


def scores(record: RunRecord) -> str:
    """The section of bars and tables; empty for a run without metrics."""
    if not record.metrics:
        return ""
    tables = []
    for name, metrics in groups(record.metrics).items():
        title = f"Accuracy{f' on {name}' if name else ''}"
        counts = dict(metrics.get("samples_by_kind") or {})
        if isinstance(metrics.get("samples"), int):
            counts["all"] = metrics["samples"]
        counts = {k: v for k, v in counts.items() if isinstance(v, int)}
        shown = bars(title, accuracy_rows(metrics), counts) + _table(name, metrics)
        tables.append(shown + (_lead(metrics) if shown else ""))
    body = "".join(tables)
    return f'<section id="scores"><h2>Scores</h2>{body}</section>' if body else ""


def _lead(metrics: Mapping[str, Any]) -> str:
    """On how much it was scored, in a sentence."""
    number_of = {key: metrics[key] for key in COUNTS if isinstance(metrics.get(key), int)}
    account = metrics.get("account")
    refused: Any = account.get("refused") if isinstance(account, Mapping) else None
    refused = refused if isinstance(refused, Mapping) else {}
    lost = sum(refused.values())
    if "samples" not in number_of:
        return ""
    text = f"Scored on {count(number_of['samples'])} samples"
    if number_of.get("samples_in_shards", number_of["samples"]) != number_of["samples"]:
        text += f" of {count(number_of['samples_in_shards'])} in the shards"
    if number_of.get("questions", number_of["samples"]) != number_of["samples"]:
        text += f", {count(number_of['questions'])} questions"
    if lost:
        text += f"; {count(lost)} refused: {', '.join(f'{n} x {why}' for why, n in refused.items())}"
    return f'<p class="lead above">{escape(text)}.</p>'


def _table(name: str, metrics: Mapping[str, Any]) -> str:
    """The numbers that are not bars: caption scores, losses; with the blind ones beside."""
    blind = metrics.get("blind") if isinstance(metrics.get("blind"), Mapping) else {}
    rows = []
    for key, value in metrics.items():
        if (
            key in ("accuracy", *COUNTS)
            or (key == "blind_loss" and blind)
            or isinstance(value, bool)
            or not isinstance(value, int | float)
        ):
            continue
        cells = [score_text(key, value)]
        if blind:
            other = metrics.get("blind_loss") if key == "loss" else blind.get(key)
            cells.append(score_text(key, other) if isinstance(other, int | float) else "–")
        columns = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr><th scope=row>{escape(key)}</th>{columns}</tr>")
    absent = metrics.get("absent")
    for key, reason in (absent if isinstance(absent, Mapping) else {}).items():
        why = f'<td class="why" colspan=2>{escape(str(reason))}</td>'
        rows.append(f"<tr><th scope=row>{escape(str(key))}</th>{why}</tr>")
    if not rows:
        return ""
    titles = ["with its image", "blind"] if blind else ["score"]
    head = "".join(f"<th scope=col>{title}</th>" for title in titles)
    return (
        f'<div class="table"><table><thead><tr><th scope=col>{escape(name) or "metric"}</th>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def parts(record: RunRecord) -> str:
    """The table of trainable and frozen counts; empty without `parts.json`."""
    if not record.parts:
        return ""
    named = [row for row in record.parts if row["part"] != "all"]  # the file may hold the sum as well
    total = {"part": "all", **{k: sum(row[k] for row in named) for k in ("trainable", "frozen")}}
    rows = ""
    for row in [*named, total]:
        both = row["trainable"] + row["frozen"]
        part = share(row["trainable"] / both) if both else "–"
        rows += (
            f"<tr{' class=total' if row is total else ''}><th scope=row>{escape(row['part'])}</th>"
            f"<td>{count(row['trainable'])}</td><td>{count(row['frozen'])}</td><td>{part}</td></tr>"
        )
    return (
        '<section id="parts"><h2>What was trained</h2><div class="table"><table><thead><tr>'
        "<th scope=col>part</th><th scope=col>trainable</th><th scope=col>frozen</th>"
        "<th scope=col>trained</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )
