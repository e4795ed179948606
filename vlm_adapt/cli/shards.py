"""The verbs of `vlm-adapt shards`: write samples and look into them.

Knows arguments, exit codes and wording; knows nothing of how anything is done (see cli/__init__.py).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlm_adapt.cli.common import STYLE, located, print_refused
from vlm_adapt.errors import UserError

shards = typer.Typer(help="Write and look into shards of samples.", **STYLE)


@shards.command("write")
def shards_write(
    converter: Annotated[
        str, typer.Argument(metavar="CONVERTER", help="coco_captions, easy_vqa, llava, nlvr or vqav2.")
    ],
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE | OUTPUT | KEY=VALUE",
            help="Sources (paths or package:NAME) in the converter's order, the folder to write, and "
            "its options by name, as in: easy_vqa package:easy-vqa data/easy split=train.",
        ),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Write no more than so many samples.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="Leave out the first so many.")] = 0,
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest shard, in MiB.")] = 256,
    shard_samples: Annotated[int, typer.Option(min=1, help="Most samples of a shard.")] = 10_000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace other shards there.")] = False,
) -> None:
    """Convert a dataset to shards; done before, it is not done again."""
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
        overwrite=overwrite,
        progress=sys.stderr.isatty(),
    )
    size = f"{len(done['shards'])} shard(s), {done['bytes'] / 1e6:.1f} MB"
    print(f"{output}: {done['samples']:,} samples in {size}")
    print_refused(done)


@shards.command("inspect")
def shards_inspect(
    pattern: Annotated[str, typer.Argument(metavar="SHARDS", help="A .tar, a folder, or a-{000..031}.tar.")],
    output: Annotated[Path | None, typer.Option(help="Also draw samples into this PNG.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many are drawn.")] = 24,
    seed: Annotated[int, typer.Option(help="Which ones are drawn.")] = 0,
) -> None:
    """Count what lies in shards, name what is wrong, and draw some samples."""
    from vlm_adapt.data.inspect import contact_sheet, summary
    from vlm_adapt.data.shards import ShardSet

    found = ShardSet(pattern)
    figures = summary(found)
    for key, value in figures.items():
        if key not in ("refused", "examples") and value not in (None, {}, 0):
            text = (
                "  ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"
            )
            print(f"{key.replace('_', ' '):18} {text}")
    print_refused(figures)
    if output is not None:
        print(f"picture: {contact_sheet(found, output, count, seed)}")
