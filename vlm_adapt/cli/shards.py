"""The verbs of `vlm-adapt shards`: write samples and look into them.

Knows arguments, exit codes and wording; knows nothing of how anything is done (see cli/__init__.py).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_adapt.cli.common import STYLE, checked_run, counting, located, print_refused
from vlm_adapt.data.convert import CONVERTERS
from vlm_adapt.errors import UserError
from vlm_adapt.exits import INTERRUPTED

shards = typer.Typer(help="Write and look into shards of samples.", **STYLE)
Pattern = Annotated[str, typer.Argument(metavar="SHARDS", help="A .tar, a folder, or a-{000..031}.tar.")]
RunConfig = Annotated[
    Path | None, typer.Option("--config", help="Also as this run would read them (no weights are loaded).")
]


@shards.command("write")
def shards_write(
    converter: Annotated[
        str, typer.Argument(metavar="CONVERTER", help=f"One of {', '.join(sorted(CONVERTERS))}.")
    ],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE | OUTPUT | KEY=VALUE",
            help="Sources (paths or package:NAME) in the converter's order, the folder to write, and "
            "its options by name, as in: easy_vqa package:easy-vqa data/easy split=train.",
        ),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Take no more than so many samples.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Leave out the first so many.")] = 0,
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest shard, in MiB.")] = 256,
    shard_samples: Annotated[int, typer.Option(min=1, help="Most samples of a shard.")] = 10_000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other shards there.")] = False,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; all cores by default.")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="Write in another order.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Which order.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Decode every image; refuse damaged ones.")] = False,
) -> None:
    """Convert a dataset to shards; stopped, it goes on; done before, it is not done again."""
    from vlm_adapt.data.convert.run import check_options, options_of, write_dataset

    named = [word for word in words if re.match(r"\w+=", word)]
    *sources, output = [word for word in words if word not in named] or [""]
    known = list(options_of(converter))
    if not output:
        raise UserError(f"shards write {converter} needs a folder to write to")
    if len(sources) > len(known):
        raise UserError(f"converter '{converter}' has {len(known)} options and got {len(sources)} sources")
    options = dict(zip(known, sources, strict=False))
    for word in named:
        key, _, value = word.partition("=")
        if key in options:
            raise UserError(f"'{key}' was given twice: '{options[key]}' and '{value}'")
        options[key] = value
    check_options(converter, options)
    options = {key: located(value) for key, value in options.items()}
    done = write_dataset(
        converter,
        output,
        options,
        max_bytes=shard_mb << 20,
        max_count=shard_samples,
        skip=skip,
        limit=limit,
        shuffle=shuffle,
        seed=seed,
        check=check,
        overwrite=overwrite,
        workers=workers,
        progress=sys.stderr.isatty(),
    )
    size = f"{len(done['shards'])} shard(s), {done['bytes'] / 1e6:.1f} MB"
    print(f"{output}: {done['samples']:,} samples in {size}")
    print_refused(done)


@shards.command("converters")
def shards_converters(
    name: Annotated[str | None, typer.Argument(metavar="CONVERTER", help="Explain this one.")] = None,
) -> None:
    """List what can be converted, or explain one converter and its options."""
    import inspect

    from vlm_adapt.data.convert.options import options_of

    for each in sorted(CONVERTERS) if name is None else [name]:
        options = (
            key if value.default is value.empty else f"[{key}]" for key, value in options_of(each).items()
        )
        print(f"{each:16} {' '.join(options)}")
    if name is not None:
        function = CONVERTERS.load(name)
        print(f"\n{inspect.getdoc(inspect.getmodule(function))}\n\n{inspect.getdoc(function)}")


@shards.command("index")
def shards_index(
    patterns: Annotated[list[str], typer.Argument(metavar="SHARDS...", help="As in: data/train-*.tar")],
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 takes all cores.")] = 0,
) -> None:
    """Write an index beside each shard, so that no reader, here or remote, has to scan it."""
    from vlm_adapt.data.indexing import write_sidecars
    from vlm_adapt.data.naming import expand

    names = expand(patterns)
    with counting("index", len(names), "shards") as tick:
        count, samples, problems = write_sidecars(names, workers, tick)
    for problem in problems:
        print(problem)
    wrong = f"; {len(problems):,} problem(s), see 'shards lint'" if problems else ""
    print(f"{samples:,} samples in {count:,} shard(s) indexed{wrong}")


@shards.command("lint")
def shards_lint(
    pattern: Pattern,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes; all cores by default.")] = None,
    config: RunConfig = None,
    output: Annotated[Path | None, typer.Option(help="Write every key and reason into this JSON.")] = None,
) -> int:
    """Read and decode every sample, and name all that training would refuse; 1 if there is any."""
    run = checked_run(config, [], train=False, evaluate=False) if config else None
    from vlm_adapt.data.lint import lint, open_sets
    from vlm_adapt.data.write import write_json

    sets, findings = open_sets(pattern)
    more: dict[str, Any] = {}
    if run is not None and sets:
        from vlm_adapt.report.feed import open_feed

        feed = open_feed(run, [index.path for one in sets for index in one.indexes])
        more = {"reader": feed.reader, "max_pixels": run.data.max_pixels}
    total = sum(len(one) for one in sets)
    with counting("lint", total) as tick:
        count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        found = lint(sets, findings, count if workers is None else workers, tick=tick, **more)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, found.to_dict())
    for name, account in (("problem", found.account), ("truncated", found.shortened)):
        for reason, times in sorted(account.refused.items(), key=lambda one: -one[1]):
            print(f"{name}: {times:,} x {reason}: {', '.join(account.examples[reason][:3])}")
    for name, times in found.unread.most_common():
        print(f"not read: {times:,} x .{name}: the schema has no such member")
    clean = not found.findings
    seen = f"{found.checked:,} samples in {found.shards:,} shard(s)"
    if not found.complete:
        seen = f"PARTIAL, stopped after {found.checked:,} of {found.samples:,} samples"
    so_far = "" if found.complete else " so far"
    print(f"{seen}: {'no problem' if clean else f'{len(found.findings):,} problem(s)'}{so_far}")
    if output is not None:
        print(f"report: {output}")
    return INTERRUPTED if not found.complete else 0 if clean else 1


@shards.command("inspect")
def shards_inspect(
    pattern: Pattern,
    output: Annotated[Path | None, typer.Option(help="Also draw samples into this .png or .pdf.")] = None,
    config: RunConfig = None,
    count: Annotated[int, typer.Option(min=1, help="How many are drawn.")] = 24,
    encoded: Annotated[int, typer.Option(min=1, help="With --config: how many are encoded.")] = 2000,
    seed: Annotated[int, typer.Option(help="Which ones are drawn.")] = 0,
) -> None:
    """Count what lies in shards, name what is wrong, and draw some samples with masks and boxes.

    With --config also lengths in that run's tokens, what padding wastes and what packing saves.
    """
    run = checked_run(config, [], train=False, evaluate=False) if config else None
    from vlm_adapt.data.inspect import contact_sheet, summary
    from vlm_adapt.data.shards import ShardSet

    found = ShardSet(pattern)
    with counting("inspect", found.samples) as tick:
        figures = summary(found, tick=tick)
    for key, value in figures.items():
        if key not in ("refused", "examples") and value not in (None, {}, 0):
            text = (
                "  ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"
            )
            print(f"{key.replace('_', ' '):18} {text}")
    print_refused(figures)
    if output is not None:
        print(f"picture: {contact_sheet(found, output, count, seed, scale=2)}")
    if run is not None:
        from vlm_adapt.report.feed import open_feed
        from vlm_adapt.report.look import lines, look, tower_size

        feed = open_feed(run, [index.path for index in found.indexes])
        with counting("encode", min(encoded, found.samples)) as tick:
            lengths = look(feed, encoded, seed, tick)
        for name, text in lines(feed, lengths):
            print(f"{name:18} {text}")
        print_refused(lengths.account.to_dict())
        if output is not None:
            from vlm_adapt.report.look_chart import draw_look

            beside = output.with_name(f"{output.stem}-lengths{output.suffix or '.png'}")
            most, batching = feed.run.language_model.language.max_length, feed.run.data.batching
            print(f"picture: {draw_look(lengths, beside, tower_size(feed), most, batching)}")


@shards.command("show")
def shards_show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A sample's key, or '#17' for its number.")],
    pattern: Pattern,
    config: Annotated[Path, typer.Option(help="The run that reads it (no weights are loaded).")],
    epoch: Annotated[int, typer.Option(min=0, help="Whose draws are shown.")] = 0,
) -> None:
    """Print one sample as the model sees it: tokens with ids, what is learned, where images sit."""
    run = checked_run(config, [], train=False, evaluate=False)
    from vlm_adapt.data.shards import ShardSet

    found = ShardSet(pattern)
    from rich.console import Console

    from vlm_adapt.report.feed import open_feed
    from vlm_adapt.report.show import find, printed, show

    numbers = find(found, key)
    feed = open_feed(run, [index.path for index in found.indexes])
    console = Console()
    printed(show(feed, numbers[0], epoch, console.is_terminal), console)
    if len(numbers) > 1:
        others = ", ".join(f"#{number}" for number in numbers[1:6])
        print(f"{len(numbers)} samples have this key: also {others}")
