"""One task of a conversion: cook its entries and write them to a shard, or to several if they are large.

Knows entries, the account of what they lose, and the record that says a task is done; knows nothing
about other tasks, processes or progress bars. The same task writes the same bytes, wherever it runs.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_adapt.data.convert.common import LOST, Recipe
from vlm_adapt.data.convert.entries import Entry, key_of, read
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.write import Shard, encode_sample, write_json

_MASK = re.compile(r"mask(\.\d+)?\.png")
EVERY = 32  # samples between two reports of progress


@dataclass(frozen=True)
class Job:
    """What all tasks of a conversion have in common.

    Attributes:
        folder: where the shards go.
        entries: the file of entries.
        mark: whose records count (see `record_of`).
        max_bytes: of a shard.
        check: decode every image and read every record as training will.
    """

    folder: Path
    entries: Path
    mark: str
    max_bytes: int
    check: bool


def cook(entry: Entry, check: bool = False, account: Account | None = None) -> bytes:
    """The sample of an entry as it lies in a tar. Raises BadSample if it cannot be used.

    Args:
        check: see Job.
        account: what was left out of the sample is entered here.
    """
    if isinstance(entry, Recipe):
        sample: Mapping[str, Any] = {"__key__": entry.key, **entry.function(*entry.arguments)}
    else:
        sample = entry
    if LOST in sample:
        sample = dict(sample)
        for part, reason in sample.pop(LOST):
            if account is not None:
                account.lose(f"{key_of(entry)} ({part})", reason)
    if check:
        _check(sample)
    return encode_sample(sample)


def _check(sample: Mapping[str, Any]) -> None:
    """Whether the readers of shards will take it."""
    from vlm_adapt.data.images import decode
    from vlm_adapt.data.sample import parse_sample

    members = {name: value for name, value in sample.items() if name != "__key__"}
    members["json"] = json.dumps(members["json"], ensure_ascii=False).encode()
    for image in parse_sample(sample["__key__"], members).images:
        decode(image)
    for name, mask in members.items():
        if _MASK.fullmatch(name):
            decode(mask)


def record_path(folder: Path, number: int) -> Path:
    """Where the record of a finished task lies."""
    return folder / f".{number:06d}.done.json"


def record_of(job: Job, number: int) -> dict[str, Any] | None:
    """What a finished task of this conversion has written; None if it is not there or not whole."""
    try:
        record = json.loads(record_path(job.folder, number).read_text(encoding="utf-8"))
        if record["mark"] != job.mark:
            return None
        for shard in record["shards"]:
            if (job.folder / shard["name"]).stat().st_size != shard["bytes"]:
                return None
        Account.from_dict(record["account"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


def run_task(job: Job, number: int, places: bytes, report: Callable[[int], None]) -> dict[str, Any]:
    """Write the shards of a task: `000012.tar`, and `000012_001.tar` and so on if one cannot hold all.

    Args:
        places: uint64 positions in the file of entries, packed.
        report: called now and then with the number of entries cooked since the last call.

    Returns:
        the record, which also lies in the folder.
    """
    account = Account()
    shards: list[dict[str, Any]] = []
    shard: Shard | None = None
    waiting = 0
    try:
        for entry in read(job.entries, array("Q", places)):
            waiting += 1
            if waiting == EVERY:
                report(waiting)
                waiting = 0
            try:
                content = cook(entry, job.check, account)
            except BadSample as error:
                account.lose(key_of(entry), error)
                continue
            if shard and shard.bytes + len(content) > job.max_bytes:
                shards.append(shard.finish())
                shard = None
            if shard is None:
                part = f"_{len(shards):03d}" if shards else ""
                shard = Shard(job.folder / f"{number:06d}{part}.tar")
            shard.write(key_of(entry), content)
        report(waiting)
        if shard is not None:
            shards.append(shard.finish())
    except BaseException:
        if shard is not None:
            shard.discard()
        raise
    record = {"mark": job.mark, "shards": shards, "account": account.to_dict()}
    write_json(record_path(job.folder, number), record, sync=False)
    return record
