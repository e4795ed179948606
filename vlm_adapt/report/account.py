"""What became of the samples of a run, by source and by reason, from what the run left in its folder.

Knows the finish event, the newest checkpoint's state, the journal's `sources` and `refused.jsonl`; each
may be missing. Knows nothing about how it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.report.read import RunRecord

REFUSED = "refused.jsonl"
KEYS_AT_MOST = 100_000  # of one reason are told apart; more are "and more"


@dataclass
class Reason:
    """One class of trouble: how often, where, in how many samples, and some of them by name."""

    reason: str
    count: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    samples: int | None = None


@dataclass
class Told:
    """What became of every sample.

    Attributes:
        sources: by name `read`, `used`, `refused`, `tokens`, as far as they are known.
        read, used, truncated, split, refused: of all sources.
        until: the step that these counts end with; None is the end of the run.
        reasons: of the refusals, the commonest first.
        mended: troubles of servers and caches that cost no sample, and how often.
        file: where each is named.
    """

    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    read: int = 0
    used: int = 0
    truncated: int = 0
    split: int = 0
    refused: int = 0
    until: int | None = None
    reasons: list[Reason] = field(default_factory=list)
    mended: dict[str, int] = field(default_factory=dict)
    file: Path | None = None


def told(record: RunRecord) -> Told | None:
    """The account of a run; None where nothing tells of it (an old journal, an evaluation alone)."""
    account, until = _account(record)
    path = record.folder / REFUSED
    reasons, broken = _named(path, until)
    if broken:
        record.notes.append(f"{broken} unreadable line(s) of {REFUSED} are left out.")
    if account is None and not reasons:
        return None
    account = account or {}
    found = Told(until=until, file=path if path.is_file() else None)
    for what in ("read", "used", "truncated", "split"):
        setattr(found, what, _whole(account.get(what)))
    for name, counts in _mapping(account.get("sources")).items():
        found.sources[str(name)] = {str(what): _whole(count) for what, count in _mapping(counts).items()}
    found.mended = {str(what): _whole(times) for what, times in _mapping(account.get("mended")).items()}
    counted = {str(why): _whole(count) for why, count in _mapping(account.get("refused")).items()}
    named = sum(one.count for one in reasons)
    found.refused = sum(counted.values()) if account else named
    if found.file and account and named != found.refused:
        record.notes.append(f"{REFUSED} names {named:,} of {found.refused:,} refused samples.")
    if not named:  # an account from before there was such a file
        examples = _mapping(account.get("examples"))
        for why, count in counted.items():
            shown = examples.get(why)
            reasons.append(Reason(why, count, {}, list(map(str, shown)) if isinstance(shown, list) else []))
    found.reasons = sorted(reasons, key=lambda one: (-one.count, one.reason))
    return found


def _account(record: RunRecord) -> tuple[Mapping[str, Any] | None, int | None]:
    """The newest account and the step it ends with: of the end, else of the newest checkpoint."""
    last = [e for e in record.events if e.get("event") in ("finish", "resume")][-1:]
    if last and isinstance(last[0].get("account"), Mapping):
        return last[0]["account"], None
    try:
        name = (record.folder / "latest").read_text(encoding="utf-8").strip()
        state = json.loads((record.folder / Path(name).name / "state.json").read_text(encoding="utf-8"))
        return (
            (state["account"], int(state["step"])) if isinstance(state["account"], Mapping) else (None, None)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None, None


def _named(path: Path, until: int | None) -> tuple[list[Reason], int]:
    """The refusals up to a step that a file names, by reason; and how many of its lines cannot be read."""
    if not path.is_file():
        return [], 0
    found: dict[str, Reason] = {}
    accounts: dict[str, Account] = {}
    keys: dict[str, set[tuple[str, str]]] = {}
    broken = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
                step, source, key, why = (line[name] for name in ("step", "source", "key", "reason"))
            except (ValueError, KeyError, TypeError):
                broken += bool(text.strip())
                continue
            if until is not None and isinstance(step, int) and step > until:
                continue
            one, (head, _, detail) = Account(), str(why).partition(": ")
            one.lose(str(key), BadSample(head, detail))
            (reason,) = one.refused  # numbers in it are N
            row = found.setdefault(reason, Reason(reason))
            row.count += 1
            row.sources[str(source)] = row.sources.get(str(source), 0) + 1
            accounts.setdefault(reason, Account()).merge(one)
            seen = keys.setdefault(reason, set())
            if len(seen) <= KEYS_AT_MOST:
                seen.add((str(source), str(key)))
    for reason, row in found.items():
        row.examples = accounts[reason].examples[reason]
        row.samples = len(keys[reason]) if len(keys[reason]) <= KEYS_AT_MOST else None
    return list(found.values()), broken


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
