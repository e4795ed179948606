"""Runs a converter into a folder of shards: once, visibly, on all cores, and never half.

Knows the stages of a conversion and the marks of finished and unfinished folders; knows nothing about
any one dataset. Running it again with the same inputs returns at once; a conversion that was stopped
goes on where it was. The shards do not depend on how many processes wrote them.

    converter -> entries (recipes on the disk) -> shuffled, dealt to tasks -> writers -> shards, records
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from vlm_adapt.data.convert import CONVERTERS
from vlm_adapt.data.convert.common import Conversion
from vlm_adapt.data.convert.crew import Task, cores, run_all
from vlm_adapt.data.convert.entries import Entries, Entry, key_of, read
from vlm_adapt.data.convert.hold import hold
from vlm_adapt.data.convert.options import check_options, fingerprint, options_of
from vlm_adapt.data.convert.progress import Tell, shown
from vlm_adapt.data.convert.task import Job, cook, record_of, record_path
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.write import (
    SUMMARY,
    UNFINISHED,
    check_bounds,
    check_folder,
    clear_errors,
    remove_shards,
    write_json,
)
from vlm_adapt.errors import UserError

__all__ = ["check_options", "options_of", "write_dataset"]

MARGIN = 1.15  # shards are planned for a mean that 64 entries tell: two standard errors above it
_RECORDS = ".*.done.json"


def _read(path: Path) -> dict[str, Any]:
    """A summary written before, or nothing if it is not there or not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _whole(folder: Path, summary: Mapping[str, Any]) -> bool:
    """Whether all shards of a finished conversion still lie there."""
    try:
        return all((folder / shard["name"]).stat().st_size == shard["bytes"] for shard in summary["shards"])
    except (OSError, KeyError, TypeError):
        return False


def _counted(entries: Iterable[Entry], conversion: Conversion, tell: Tell) -> Iterator[Entry]:
    count = 0
    for count, entry in enumerate(entries, 1):
        yield entry
        if count % 1000 == 0:
            tell("reading the source", count, conversion.total)
    tell("reading the source", count, count)


def _mean_bytes(entries: Entries, check: bool, converter: str) -> float:
    """How large a sample is, from a few of them. UserError if not one of all can be used."""
    sizes = []
    for entry in read(entries.path, entries.spread().tolist()):
        try:
            sizes.append(len(cook(entry, check)))
        except BadSample:
            sizes.append(0)
    if any(sizes):
        return sum(sizes) / len(sizes)
    account = Account()  # a wrong folder of images, probably: it must not cost the shards that are there
    for entry in read(entries.path, entries.offsets.tolist()):
        try:
            return float(len(cook(entry, check)))
        except BadSample as error:
            account.lose(key_of(entry), error)
    raise UserError(_nothing(converter, account))


def _nothing(converter: str, account: Account) -> str:
    return f"converter '{converter}' found no usable sample ({account.named() or 'the source is empty'})"


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, made if need be, and then not left empty if nothing came of it."""
    new = not folder.exists()
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if new:
            with suppress(OSError):  # it holds something
                folder.rmdir()


def write_dataset(
    converter: str,
    folder: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    max_bytes: int = 256 << 20,
    max_count: int = 10_000,
    skip: int = 0,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    check: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Convert a dataset to shards in `folder`.

    Args:
        converter: a name of `CONVERTERS`.
        options: its options, as `options_of` lists them; words from a command line will do.
        max_bytes, max_count: of a shard. Shards get equal numbers of samples within these bounds.
        skip, limit: leave out the first entries of the source; take no more than so many.
        shuffle, seed: write them in another order, always the same for a seed.
        check: decode every image and refuse what is damaged; else only the beginning of a file is looked
            at, and training refuses what it cannot decode.
        overwrite: replace the shards of another conversion.
        workers: processes that write; all cores if not given. Shards are the same for any number.
        progress: show a bar on standard error.

    Returns:
        The content of `dataset.json`: converter, options, samples, bytes, shards, and what was refused
        and why. If it is there already for the same inputs, nothing is done.

    Raises:
        UserError: bad options or sources, shards of something else in the folder, no space, no sample, a
            writer process that died.
    """
    if skip < 0 or (limit is not None and limit < 1):
        raise UserError(f"skip must be 0 or more and limit 1 or more (skip {skip}, limit {limit})")
    if workers is not None and workers < 0:
        raise UserError(f"workers must be 0 or more (workers {workers})")
    check_bounds(max_bytes, max_count)
    checked = check_options(converter, options)
    folder = Path(folder)
    limits = {
        "max_bytes": max_bytes,
        "max_count": max_count,
        "skip": skip,
        "limit": limit,
        "shuffle": shuffle,
        "seed": seed if shuffle else None,
        "check": check,
    }
    mark = fingerprint(converter, checked, limits)
    done = _read(folder / SUMMARY)
    if done.get("fingerprint") == mark and _whole(folder, done):
        _clear_marks(folder)  # stopped between the last two steps
        return done
    ours = mark in (done.get("fingerprint"), _read(folder / UNFINISHED).get("fingerprint"))
    check_folder(folder, overwrite or ours)
    conversion = Conversion(shuffled=shuffle)
    stop = None if limit is None else skip + limit
    source: Iterator[Entry] = islice(CONVERTERS.load(converter)(conversion, **checked), skip, stop)
    first = next(source, None)  # a source that cannot be read makes no folder
    if first is None:
        raise UserError(_nothing(converter, conversion.account))
    summary = {"converter": converter, "options": checked, **limits, "fingerprint": mark}
    count = cores() if workers is None else workers
    with _made(folder), hold(folder) as lock, Entries(folder / ".entries.part") as entries:
        done = _read(folder / SUMMARY)
        if done.get("fingerprint") == mark and _whole(folder, done):
            return done  # another process did it while this one waited
        with shown(progress) as tell:
            for key in entries.gather(_counted(chain([first], source), conversion, tell)):
                conversion.lose(key, "another entry before it has this key")
            if shuffle:
                entries.shuffle(seed)
            by_bytes = len(entries) * _mean_bytes(entries, check, converter) * MARGIN / max_bytes
            shards = min(len(entries), max(math.ceil(len(entries) / max_count), math.ceil(by_bytes)))
            job = Job(folder, entries.path, f"{mark}-{entries.digest()}-{shards}", max_bytes, check)
            tasks = list(enumerate(entries.deal(shards)))
            records = _prepared(job, len(tasks), {"fingerprint": mark, "converter": converter})
            try:
                _write(job, tasks, records, count, tell, lock)
            except KeyboardInterrupt:
                if progress:
                    kept = f"{len(records)} of {len(tasks)} shards are finished"
                    print(f"stopped: {kept}; the same command goes on", file=sys.stderr)
                raise
        summary |= _totals([records[number] for number in sorted(records)], conversion.account)
        if not summary["samples"]:
            remove_shards(folder)
            _clear_marks(folder)
            raise UserError(_nothing(converter, conversion.account))
        write_json(folder / SUMMARY, summary)
        _clear_marks(folder)
    return summary


def _prepared(job: Job, tasks: int, unfinished: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The folder ready for the job; returns the records of its tasks that are done already."""
    records = {number: record for number in range(tasks) if (record := record_of(job, number))}
    keep = {shard["name"] for record in records.values() for shard in record["shards"]}
    write_json(job.folder / UNFINISHED, unfinished)
    remove_shards(job.folder, frozenset({*keep, job.entries.name}))
    names = {record_path(job.folder, number).name for number in records}
    with clear_errors(job.folder):
        for path in job.folder.glob(_RECORDS):
            if path.name not in names:
                path.unlink()
    return records


def _write(
    job: Job, tasks: list[Task], records: dict[int, dict[str, Any]], workers: int, tell: Tell, lock: int
) -> None:
    """Write the tasks that have no record yet; their records are added as they finish."""
    sizes = [len(places) // 8 for _, places in tasks]
    cooked = sum(sizes[number] for number in records)

    def report(count: int) -> None:
        nonlocal cooked
        cooked += count
        tell("writing shards", cooked, sum(sizes))

    report(0)
    missing = [task for task in tasks if task[0] not in records]
    for number, record in run_all(job, missing, min(workers, len(missing)), report, keep=(lock,)):
        records[number] = record


def _totals(records: list[dict[str, Any]], account: Account) -> dict[str, Any]:
    """What the tasks wrote together; what they refused is added to the account."""
    shards = [shard for record in records for shard in record["shards"]]
    for record in records:
        account.merge(Account.from_dict(record["account"]))
    return {
        "samples": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
        "refused": account.refused,
        "examples": account.examples,
    }


def _clear_marks(folder: Path) -> None:
    """A finished folder holds its shards and its summary."""
    with clear_errors(folder):
        (folder / UNFINISHED).unlink(missing_ok=True)
        for path in folder.glob(_RECORDS):
            path.unlink()
