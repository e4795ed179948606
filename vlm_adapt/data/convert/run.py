"""Runs a converter into a folder of shards: once, visibly, and never half.

Knows options, progress and the marks of finished and unfinished folders; knows nothing about any one
dataset. Running it again with the same inputs returns at once; an interrupted run begins anew.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from vlm_adapt.choices import nearest
from vlm_adapt.data.convert import CONVERTERS
from vlm_adapt.data.convert.common import Conversion
from vlm_adapt.data.write import SUMMARY, UNFINISHED, ShardWriter, clear_errors, write_json
from vlm_adapt.errors import UserError

FORMAT = 1  # part of the fingerprint: raise it when a converter would write something else
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options of a converter by name; a parameter without a default is required."""
    parameters = inspect.signature(CONVERTERS.load(name)).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their types and defaults; UserError for an unknown, missing or unusable one."""
    known = options_of(name)
    for option in given:
        if option not in known:
            raise UserError(
                f"converter '{name}' has no option '{option}'{nearest(option, known) or ':'} "
                f"it has {', '.join(known)}"
            )
    checked: dict[str, Any] = {}
    for option, parameter in known.items():
        if option not in given:
            if parameter.default is inspect.Parameter.empty:
                raise UserError(f"converter '{name}' needs the option '{option}': {option}=...")
            checked[option] = parameter.default
            continue
        value = given[option]
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            if str(value).lower() not in _WORDS:
                raise UserError(f"option '{option}' of converter '{name}' is '{value}': say true or false")
            checked[option] = _WORDS[str(value).lower()]
        else:
            checked[option] = value if isinstance(value, bool) else str(value)
    return checked


def fingerprint(name: str, options: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    """16 letters that differ when the shards would: converter, options, limits, state of the sources."""
    sources = {}
    for value in options.values():
        for part in str(value).split("::"):
            path = Path(part).expanduser()
            if part and path.exists():
                status = path.stat()
                sources[str(path.resolve())] = (status.st_size, status.st_mtime_ns)
    words = json.dumps([FORMAT, name, dict(options), dict(limits), sources], sort_keys=True)
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()


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


def _shown(
    samples: Iterator[dict[str, Any]], conversion: Conversion, limit: int | None
) -> Iterator[dict[str, Any]]:
    """The samples, with a bar of count, rate and time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("writing shards", total=None, rate="")
        for count, sample in enumerate(samples, 1):
            yield sample
            total = conversion.total if limit is None else min(limit, conversion.total or limit)
            speed = bar.tasks[0].speed
            bar.update(task, completed=count, total=total, rate=f"{speed:,.0f}/s" if speed else "")


def write_dataset(
    converter: str,
    folder: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    max_bytes: int = 256 << 20,
    max_count: int = 10_000,
    skip: int = 0,
    limit: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Convert a dataset to shards in `folder`.

    Args:
        converter: a name of `CONVERTERS`.
        options: its options, as `options_of` lists them; words from a command line will do.
        max_bytes, max_count: of a shard.
        skip, limit: leave out the first samples; write no more than so many.
        overwrite: replace the shards of another conversion.
        progress: show a bar on standard error.

    Returns:
        The content of `dataset.json`: converter, options, samples, bytes, shards, and what was refused
        and why. If it is there already for the same inputs, nothing is done.

    Raises:
        UserError: bad options or sources, shards of something else in the folder, no space, no sample.
    """
    if skip < 0 or (limit is not None and limit < 1):
        raise UserError(f"skip must be 0 or more and limit 1 or more (skip {skip}, limit {limit})")
    checked = check_options(converter, options)
    folder = Path(folder)
    limits = {"max_bytes": max_bytes, "max_count": max_count, "skip": skip, "limit": limit}
    mark = fingerprint(converter, checked, limits)
    done = _read(folder / SUMMARY)
    if done.get("fingerprint") == mark and _whole(folder, done):
        (folder / UNFINISHED).unlink(missing_ok=True)  # stopped between the last two steps
        return done
    ours = mark in (done.get("fingerprint"), _read(folder / UNFINISHED).get("fingerprint"))
    conversion = Conversion()
    samples: Iterator[dict[str, Any]] = islice(
        CONVERTERS.load(converter)(conversion, **checked), skip, None if limit is None else skip + limit
    )
    account = conversion.account
    first = next(samples, None)  # a source that cannot be read must not cost the shards that are there
    if first is None:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in account.refused.items())
        raise UserError(
            f"converter '{converter}' found no usable sample ({reasons or 'the source is empty'})"
        )
    unfinished = {"fingerprint": mark, "converter": converter}
    with ShardWriter(folder, max_bytes, max_count, overwrite or ours, unfinished) as writer:
        samples = chain([first], samples)
        for sample in _shown(samples, conversion, limit) if progress else samples:
            writer.write(sample)
    summary = {
        "converter": converter,
        "options": checked,
        **limits,
        "fingerprint": mark,
        "samples": sum(shard["samples"] for shard in writer.shards),
        "bytes": sum(shard["bytes"] for shard in writer.shards),
        "shards": writer.shards,
        "refused": account.refused,
        "examples": account.examples,
    }
    write_json(folder / SUMMARY, summary)
    with clear_errors(folder):
        (folder / UNFINISHED).unlink(missing_ok=True)
    return summary
