"""What became of every sample: named problems, refusals, and the account that adds them up.

Knows reasons, keys and counts; knows nothing about where samples come from or why they are wanted.
Nothing is dropped in this house without an entry here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_adapt.config.schema import Source

EXAMPLES = 5
_NUMBER = re.compile(r"\d[\d,.]*(?<=\d)")


@dataclass(frozen=True)
class Problem:
    """One loss, named: the shard (or source file), the sample's key ("" if unknown), and why."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.key or '(no key)'}: {self.reason}"


class BadSample(ValueError):
    """A sample that cannot be used.

    Args:
        reason: the class of trouble ("damaged image"), by which it is counted. Numbers in it are counted
            as one class ("3 tokens" and "4 tokens" are both "N tokens").
        detail: what is special here ("50000 x 50000").
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)  # both in args, so that it survives pickling between processes
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass
class Account:
    """Samples read, used, truncated, split and refused, with a few example keys of each reason.

    Every count is a plain sum, so accounts of workers and ranks merge in any order.

    Attributes:
        split: used samples whose texts lie in more than one row.
        sources: for each source by name `read`, `used`, `refused` and `tokens` (learned ones).
        mended: troubles of servers and caches that cost no sample, and how often.
        fresh: every refusal since someone took them: (source, key, why). Not kept in checkpoints.
    """

    read: int = 0
    used: int = 0
    truncated: int = 0
    split: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    mended: dict[str, int] = field(default_factory=dict)
    fresh: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def refusals(self) -> int:
        """How many samples were refused, for whatever reason."""
        return sum(self.refused.values())

    def use(self, truncated: bool = False, source: str = "", tokens: int = 0, split: bool = False) -> None:
        """One more sample was read and used, perhaps shortened or split; `tokens` of it are learned."""
        self.read += 1
        self.used += 1
        self.truncated += truncated
        self.split += split
        self._source(source, read=1, used=1, tokens=tokens)

    def refuse(self, key: str, why: str | BadSample, source: str = "") -> None:
        """One more sample was read and refused."""
        self.read += 1
        self.lose(key, why)
        self._source(source, read=1, refused=1)
        self.fresh.append((source, key, str(why)))

    def _source(self, name: str, **counts: int) -> None:
        if name:
            own = self.sources.setdefault(name, dict.fromkeys(("read", "used", "refused", "tokens"), 0))
            for what, count in counts.items():
                own[what] += count

    def lose(self, key: str, why: str | BadSample) -> None:
        """One more sample was refused before it could be read (a member of a cut-off shard, say)."""
        full, detail = (why.reason, why.detail) if isinstance(why, BadSample) else (why, "")
        reason = _NUMBER.sub("N", full)
        if reason != full:
            detail = str(why)
        self.refused[reason] = self.refused.get(reason, 0) + 1
        self._show(reason, f"{key} ({detail})" if detail else key)

    def lose_all(self, problems: Iterable[Problem]) -> None:
        """Enter the problems of shards."""
        for problem in problems:
            self.lose(f"{problem.key} in {problem.shard}".removeprefix(" in "), problem.reason)

    def _show(self, reason: str, example: str) -> None:
        shown = self.examples.setdefault(reason, [])
        if len(shown) < EXAMPLES and example not in shown:
            shown.append(example)

    def merge(self, other: Account) -> None:
        """Add another worker's account to this one."""
        self.read += other.read
        self.used += other.used
        self.truncated += other.truncated
        self.split += other.split
        self.fresh += other.fresh
        for reason, count in other.mended.items():
            self.mended[reason] = self.mended.get(reason, 0) + count
        for name, counts in other.sources.items():
            self._source(name, **counts)
        for reason, count in other.refused.items():
            self.refused[reason] = self.refused.get(reason, 0) + count
            for example in other.examples.get(reason, []):
                self._show(reason, example)

    def named(self) -> str:
        """The refusals in words: how many for each reason, and the first of them by name."""
        return "; ".join(
            f"{count:,} x {reason}: {', '.join(self.examples.get(reason, []))}"
            for reason, count in self.refused.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a journal or a checkpoint."""
        return {
            "read": self.read,
            "used": self.used,
            "truncated": self.truncated,
            "split": self.split,
            "refused": dict(self.refused),
            "examples": {reason: list(keys) for reason, keys in self.examples.items()},
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
            "mended": dict(self.mended),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Account:
        """The inverse of `to_dict`."""
        return cls(
            read=data["read"],
            used=data["used"],
            truncated=data["truncated"],
            split=data["split"],
            refused=dict(data["refused"]),
            examples={reason: list(keys) for reason, keys in data["examples"].items()},
            sources={name: dict(counts) for name, counts in data["sources"].items()},
            mended=dict(data.get("mended", {})),
        )


def source_names(sources: Sequence[Source]) -> list[str]:
    """What the journal calls each source: its name, or its first shard pattern; numbered where equal."""
    names: list[str] = []
    for source in sources:
        first = source.shards if isinstance(source.shards, str) else source.shards[0]
        name = source.name or PurePath(first.split("::")[0]).name or first
        names.append(name if name not in names else f"{name} ({len(names)})")
    return names
