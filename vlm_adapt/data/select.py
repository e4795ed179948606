"""Which samples of a source stay, by the scores of a sidecar: those between two quantiles.

Knows shards, keys and quantiles; knows nothing about models. EL2N and the last layer's gradient norm as
scores: Paul et al. 2021, arXiv:2107.07075; that the best share and end to keep depends on how much data
there is: Sorscher et al. 2022, arXiv:2206.14486.

The samples of a source that have a score are sorted by it. With n of them, those from place
round(lowest * n) to round(highest * n) stay, so ranges that meet share no sample and leave none out.
Samples of equal score are sorted by a checksum of shard name and key: neither the order of the shards
nor that of the file's lines matters, and no end of a shard is favoured.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from vlm_adapt.choices import nearest
from vlm_adapt.config.schema import Source
from vlm_adapt.data.index import ShardIndex
from vlm_adapt.data.score_file import Group, ScoreFile, read_score_file
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.data.storage import shown
from vlm_adapt.errors import UserError

EXAMPLES = 5


@dataclass(frozen=True)
class Selection:
    """What of a source stays, and why.

    Attributes:
        kept: sorted numbers of the samples that stay, int64.
        samples: of the source's shards.
        left_out: samples whose score lies outside the range.
        missing: samples that the file does not know; they stay.
        refused: samples that the scoring pass refused; they stay, and the stream refuses them by name.
        examples: some of the missing, by key and shard.
        lowest, highest: the least and greatest score that stay.
    """

    by: str
    kept: np.ndarray
    samples: int
    left_out: int
    missing: int
    refused: int
    examples: tuple[str, ...]
    lowest: float
    highest: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a journal."""
        return {
            "by": self.by,
            "samples": self.samples,
            "kept": len(self.kept),
            "left_out": self.left_out,
            "without_score": {"not in the file": self.missing, "refused by the pass": self.refused},
            "examples": list(self.examples),
            "lowest": self.lowest,
            "highest": self.highest,
        }

    def __str__(self) -> str:
        text = (
            f"{len(self.kept):,} of {self.samples:,} samples stay, those with {self.by} from "
            f"{self.lowest:.4g} to {self.highest:.4g}; {self.left_out:,} left out"
        )
        if self.missing:
            text += f"; {self.missing:,} that the scores do not know stay: {', '.join(self.examples)}"
        return text + (f"; {self.refused:,} that could not be scored stay" if self.refused else "")


def select(source: Source, shards: ShardSet) -> np.ndarray | None:
    """The numbers (sorted, int64) of a source's samples that stay; None when all do.

    Raises:
        UserError: see `selection`.
    """
    found = selection(source, shards)
    return None if found is None or len(found.kept) == len(shards) else found.kept


def selection(source: Source, shards: ShardSet) -> Selection | None:
    """What `source.keep` leaves of a source; None when it says nothing.

    Raises:
        UserError: the file cannot be read, does not have that score, belongs to other shards, or
            nothing would be left.
    """
    if source.keep is None:
        return None
    keep, path = source.keep, Path(source.keep.scores).expanduser()
    file = read_score_file(path)
    if keep.by not in file.scores:
        known = ", ".join(file.scores)
        near = nearest(keep.by, list(file.scores))
        raise UserError(f"'{path}' has no score '{keep.by}'{near}: it has {known}")
    scores, known_N, ties = _scores_of(source, shards, file, keep.by, path)
    scored = np.flatnonzero(np.isfinite(scores))
    missing = np.flatnonzero(~known_N)
    if 2 * len(missing) > len(scores):
        raise UserError(_strangers(path, file, shards, len(missing)))
    order = scored[np.lexsort((scored, ties[scored], scores[scored]))]
    stays = order[round(keep.lowest * len(order)) : round(keep.highest * len(order))]
    if not len(stays):
        raise UserError(
            f"keep: of {len(order):,} scored samples none lies between the quantiles {keep.lowest} and "
            f"{keep.highest} of {keep.by} in '{path}': widen the range"
        )
    unscored = np.flatnonzero(~np.isfinite(scores))
    return Selection(
        by=keep.by,
        kept=np.sort(np.concatenate([stays, unscored])).astype(np.int64),
        samples=len(shards),
        left_out=len(order) - len(stays),
        missing=len(missing),
        refused=len(unscored) - len(missing),
        examples=tuple(_named(shards, int(number)) for number in missing[:EXAMPLES]),
        lowest=float(scores[stays[0]]),
        highest=float(scores[stays[-1]]),
    )


def _scores_of(
    source: Source, shards: ShardSet, file: ScoreFile, by: str, path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each sample of a source: its score (NaN without), whether the file knows it, and its checksum."""
    by_group = np.argsort(file.group, kind="stable")
    bounds = np.searchsorted(file.group[by_group], np.arange(len(file.groups) + 1))
    by_name: dict[str, list[int]] = {}
    for place, one in enumerate(file.groups):
        by_name.setdefault(_file_name(one.shard), []).append(place)
    column = np.append(file.scores[by].astype(np.float64), np.nan)  # row -1: not in the file
    rows_N: list[int] = []
    ties_N: list[int] = []
    for index in shards.indexes:
        name = _file_name(index.path)
        group = _group_of(source, index, file, by_name.get(name, []), path)
        row_of: dict[bytes, int] = {}
        if group is not None:
            rows = by_group[bounds[group] : bounds[group + 1]]
            row_of = {file.keys[row]: row for row in rows.tolist()}
        keys, start = keys_of(index), zlib.crc32(name.encode("utf-8", "surrogateescape"))
        rows_N += [row_of.get(key, -1) for key in keys]
        ties_N += [zlib.crc32(key, start) for key in keys]
    found = np.array(rows_N, np.int64)
    return column[found], found >= 0, np.array(ties_N, np.int64)


def _group_of(
    source: Source, index: ShardIndex, file: ScoreFile, named: Sequence[int], path: Path
) -> int | None:
    """Which of the file's shards this one is: by name and size, then by the source's words, then by path.

    Args:
        named: places of the file's shards that have its name.

    Raises:
        UserError: several fit equally well.
    """
    fitting = [place for place in named if _same_size(file.groups[place], index)]
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    words = source.model_dump(mode="json")

    def likeness(place: int) -> tuple[bool, bool, int]:
        group = file.groups[place]
        scored = file.sources[group.source]
        same = [scored.get(key) == words[key] for key in ("task", "prompt")]
        return same[0], same[1], _common_end(group.shard, shown(index.path))

    best = max(map(likeness, fitting))
    fitting = [place for place in fitting if likeness(place) == best]
    if len({file.groups[place].shard for place in fitting}) > 1:
        paths = " and ".join(f"'{file.groups[place].shard}'" for place in fitting[:2])
        raise UserError(
            f"'{path}' has scores of {paths}, and '{shown(index.path)}' could be either: write a file of "
            "scores for each source (vlm-adapt scores --shards)"
        )
    return fitting[0]


def _same_size(group: Group, index: ShardIndex) -> bool:
    """Whether sizes agree, where both are known: a pipe has none."""
    return group.file_bytes <= 0 or index.file_bytes <= 0 or group.file_bytes == index.file_bytes


def _common_end(one: str, other: str) -> int:
    """How many parts two paths share at their ends, as absolute paths."""
    pairs = zip(
        reversed(PurePath(os.path.abspath(one)).parts),
        reversed(PurePath(os.path.abspath(other)).parts),
        strict=False,
    )
    count = 0
    for mine, its in pairs:
        if mine != its:
            break
        count += 1
    return count


def keys_of(index: ShardIndex) -> list[bytes]:
    """The keys of a shard's samples, in UTF-8, in order."""
    ends = index.key_end.tolist()
    return [index.key_text[first:last] for first, last in zip([0, *ends], ends, strict=False)]


def _named(shards: ShardSet, number: int) -> str:
    ref = shards.ref(number)
    return f"'{ref.key}' of {_file_name(ref.shard)}"


def _file_name(shard: str) -> str:
    """The last part of a path or an address, without what an address asks."""
    return PurePath(shown(shard)).name


def _strangers(path: Path, file: ScoreFile, shards: ShardSet, missing: int) -> str:
    """Why most samples of a source have no score, in one sentence."""
    text = f"'{path}' has no scores of {missing:,} of {len(shards):,} samples"
    names = {_file_name(group.shard): group.file_bytes for group in file.groups}
    first = shards.indexes[0]
    name = _file_name(first.path)
    if name not in names:
        some = ", ".join(list(names)[:3])
        return f"{text}: it belongs to other shards ({some}, not {name})"
    if not any(_same_size(group, first) for group in file.groups if _file_name(group.shard) == name):
        sizes = f"{names[name]:,} bytes when it was scored and {first.file_bytes:,} now"
        return f"{text}: shard {name} had {sizes}, so score it anew"
    return f"{text}: it was written with a limit, or for other shards; score these anew"
