"""The section on data: how full rows were, what each source gave, and what became of every sample.

Knows a run's record and its account; account.py reads, charts.py draws.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlm_adapt.config.schema import Data
from vlm_adapt.data.problems import source_names
from vlm_adapt.report.account import REFUSED, Reason, Told
from vlm_adapt.report.charts import BANDS, Line, line_chart, share_chart
from vlm_adapt.report.read import RunRecord
from vlm_adapt.report.series import pick, smooth
from vlm_adapt.report.words import count, number, share

REASONS_AT_MOST = 20
OTHERS = "all others"


def data_section(record: RunRecord, account: Told | None, page: Path | None = None) -> str:
    """The section's HTML; empty for runs that say nothing of their data.

    Args:
        page: where the page will lie, from where it links to the file of refusals.
    """
    charts = useful_chart(record) + source_charts(record)
    body = f'<div class="charts">{charts}</div>' if charts else ""
    if account is not None:
        body += _lead(account) + _sources(record, account) + _reasons(record, account, page)
    body += _left_out(record)
    return f'<section id="data"><h2>Data</h2>{body}</section>' if body else ""


def useful_chart(record: RunRecord) -> str:
    """The share of positions that are no padding; nothing where there never was any."""
    points = pick(record.steps, "useful_tokens")
    if all(y >= 1 for _, y in points):
        return ""
    lines = [Line("each step", points, faint=True), Line("smoothed", smooth(points))]
    mean = share(statistics.mean(y for _, y in points))
    how = _batching(record)
    title = f"Useful positions{f', {how}' if how else ''}: {mean}"
    return line_chart(title, lines, text=_percent, from_zero=True)


def _batching(record: RunRecord) -> str:
    """How rows were made, where that was the same in all stages; else nothing."""
    data, stages = (_named(record.config or {}, key) for key in ("data", "stages"))
    own = data.get("batching") if isinstance(data, Mapping) else None
    differs = any(_named(_named(stage, "data"), "batching") for stage in stages or ())
    return str(own) if own and not differs else ""


def _named(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def source_charts(record: RunRecord) -> str:
    """What share of samples, and of learned tokens, each source gave so far; nothing for one source."""
    lines = [line for line in record.steps if isinstance(line.get("sources"), Mapping)]
    names = _largest(lines)
    charts = ""
    for title, key in (("samples", "share_of_samples"), ("learned tokens", "share_of_tokens")):
        rows = []
        for line in lines:
            by_name = {str(name): _share(values, key) for name, values in line["sources"].items()}
            shares = [by_name.get(name, 0.0) for name in names]
            if names[-1] == OTHERS:
                shares[-1] = sum(value for name, value in by_name.items() if name not in names[:-1])
            rows.append((float(line["step"]), shares))
        charts += share_chart(f"Share of {title}, so far", names, rows)
    return charts


def _largest(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sources with a colour of their own, in the order of the journal; the smallest share one."""
    best: dict[str, float] = {}
    for line in lines:
        for name, values in line["sources"].items():
            best[str(name)] = max(best.get(str(name), 0.0), _share(values, "share_of_samples"))
    if len(best) <= BANDS:
        return list(best)
    kept = sorted(best, key=lambda name: -best[name])[:BANDS]
    return [*(name for name in best if name in kept), OTHERS]


def _share(values: Any, key: str) -> float:
    value = _named(values, key)
    return float(value) if isinstance(value, int | float) else 0.0


def _percent(value: float) -> str:
    return f"{number(100 * value)} %"


def _lead(account: Told) -> str:
    """The account in one sentence."""
    if not account.read:
        return ""
    when = "" if account.until is None else f"Up to the checkpoint of step {count(account.until)}: "
    words = [f"{when}{count(account.read)} samples were read"]
    words += [f"{count(account.used)} used"]
    words += [f"{count(account.truncated)} of them truncated"] if account.truncated else []
    words += [f"{count(account.split)} split over several rows"] if account.split else []
    words += [f"{count(account.refused)} refused" if account.refused else "none refused"]
    again = " A sample counts each time it comes." if account.refused else ""
    mended = "; ".join(f"{count(times)} x {escape(what)}" for what, times in account.mended.items())
    more = f" Mended on the way, at the cost of no sample: {mended}." if mended else ""
    return f'<p class="lead above">{", ".join(words)}.{again}{more}</p>'


def _left_out(record: RunRecord) -> str:
    """What scores left of sources, as the stages' events tell it, each source once."""
    told: dict[str, str] = {}
    for event in record.events:
        for name, kept in (_named(event, "selections") or {}).items():
            stays, whole, by = (_named(kept, key) for key in ("kept", "samples", "by"))
            if isinstance(stays, int) and isinstance(whole, int):
                told[str(name)] = f"{name}: {count(stays)} of {count(whole)} samples were kept by {by}."
    return "".join(f'<p class="lead above">{escape(text)}</p>' for text in told.values())


def _sources(record: RunRecord, account: Told) -> str:
    """A line for each source: read, used, refused, learned tokens, shares."""
    if not account.sources:
        return ""
    used = sum(counts.get("used", 0) for counts in account.sources.values())
    tokens = sum(counts.get("tokens", 0) for counts in account.sources.values())
    rows = sorted(account.sources.items(), key=_journal_order(record))
    wanted = _wanted(record)
    if len(rows) > 1:
        whats = ("read", "used", "refused", "tokens")
        rows.append(("all", {what: sum(c.get(what, 0) for _, c in rows) for what in whats}))
    body = ""
    for place, (name, counts) in enumerate(rows):
        read, refused = counts.get("read", 0), counts.get("refused", 0)
        cells = [
            count(read),
            count(counts.get("used", 0)),
            f"{count(refused)} <small>{share(refused / read)}</small>"
            if refused and read
            else count(refused),
            count(counts.get("tokens", 0)),
        ]
        if wanted:
            cells.append(share(wanted[name]) if name in wanted else "")
        if len(rows) > 1:
            cells += [_part(counts.get("used", 0), used), _part(counts.get("tokens", 0), tokens)]
        total = ' class="total"' if place and place == len(rows) - 1 else ""
        columns = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f"<tr{total}><th scope=row>{escape(name)}</th>{columns}</tr>"
    titles = ["read", "used", "refused", "learned tokens"]
    titles += ["wanted share"] if wanted else []
    titles += ["share of samples", "of learned tokens"] if len(rows) > 1 else []
    return _table(["source", *titles], body)


def _journal_order(record: RunRecord) -> Callable[[tuple[str, Any]], int]:
    """Sources in the order of the configuration, as the journal has them."""
    names = list(dict.fromkeys(str(n) for line in record.steps for n in _named(line, "sources") or ()))
    return lambda row: names.index(row[0]) if row[0] in names else len(names)


def _wanted(record: RunRecord) -> dict[str, float]:
    """The shares that the configuration asks for, where it mixes by weight and has no stages."""
    config = record.config or {}
    data = _named(config, "data")
    if _named(data, "mixing") != "weight" or config.get("stages"):
        return {}
    try:
        sources = Data.model_validate({"train": _named(data, "train")}).train
    except ValueError:
        return {}  # a configuration of another version
    total = sum(source.weight for source in sources)
    return {n: s.weight / total for n, s in zip(source_names(sources), sources, strict=True)}


def _part(value: int, whole: int) -> str:
    return share(value / whole) if whole else "–"


def _reasons(record: RunRecord, account: Told, page: Path | None) -> str:
    """Why samples were refused, and the first of them by name."""
    if not account.reasons:
        return ""
    body = ""
    for one in account.reasons[:REASONS_AT_MOST]:
        body += (
            f'<tr><th scope=row class="text">{escape(one.reason)}</th><td>{count(one.count)}</td>'
            f"<td>{_samples(one)}</td><td class=text>{escape(_where(one, account))}</td>"
            f"<td class=text>{''.join(f'<small>{escape(key)}</small>' for key in one.examples)}</td></tr>"
        )
    left = len(account.reasons) - REASONS_AT_MOST
    words = [f"{left} more reasons are not shown."] if left > 0 else []
    if account.file is not None:
        start = page.parent if page is not None else record.folder
        link = quote(Path(os.path.relpath(account.file, start)).as_posix())
        words.append(f'Every refusal is named in <a href="{escape(link)}">{REFUSED}</a>.')
    note = f'<p class="lead">{" ".join(words)}</p>' if words else ""
    table = _table(["why refused", "times", "samples", "of", "the first of them"], body, "why-refused")
    return table + note


def _samples(one: Reason) -> str:
    return "" if one.samples is None else count(one.samples)


def _where(one: Reason, account: Told) -> str:
    """The sources a reason came up in; a shard, by its file's name, for what its index found."""
    names = [name if name in account.sources else Path(name).name for name in one.sources]
    return ", ".join(dict.fromkeys(names))


def _table(titles: Sequence[str], body: str, kind: str = "") -> str:
    head = "".join(f"<th scope=col>{title}</th>" for title in titles)
    return (
        f'<div class="table {kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
