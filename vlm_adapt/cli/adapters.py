"""Verbs of `vlm-adapt adapt` on what was trained: save it alone, merge it, average it, choose among several.

Knows arguments and wording; knows nothing of how anything is done (see cli/__init__.py).
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from vlm_adapt.cli.common import Checkpoint, checked_run, checkpoint_folder, counting
from vlm_adapt.errors import UserError

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that is not there yet.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]
Checkpoints = Annotated[
    list[str],
    typer.Argument(metavar="CHECKPOINT...", help="Checkpoint folders, adapters, or runs' output_dirs."),
]


def add_to(group: typer.Typer) -> None:
    """Give a group of verbs these."""
    for verb in (save, merge, soup, choose):
        group.command()(verb)


def named_folders(words: list[str] | None) -> dict[str, Path]:
    """`NAME=FOLDER` of several adapters, each folder found.

    Raises:
        UserError: other words, a name twice, or a folder that is no adapter.
    """
    found: dict[str, Path] = {}
    for word in words or ():
        name, equals, folder = word.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--adapter '{word}' is not NAME=FOLDER, as in --adapter style=runs/style")
        if name in found:
            raise UserError(f"--adapter names '{name}' twice: choose another name")
        found[name] = checkpoint_folder(Path(folder))
    return found


def save(checkpoint: Checkpoint, folder: Folder, as_json: Json = False) -> None:
    """Write what was trained as an adapter: a small folder that chat, evaluate and train take."""
    checkpoint_folder(checkpoint)
    from vlm_adapt.export.adapter import save_adapter

    told = save_adapter(checkpoint, folder)
    if as_json:
        print(json.dumps(told, indent=1))
        return
    for label, counts in told["methods"].items():
        print(f"{label:<28} {counts['numbers']:>12,} numbers  {counts['bytes'] / 1e6:>9.2f} MB")
    print(f"{folder}: {told['bytes'] / 1e6:.2f} MB in all")


def merge(
    checkpoint: Checkpoint,
    folder: Folder,
    dtype: Annotated[
        str | None, typer.Option(help="Of what is written: float32, bfloat16, float16; else the run's.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest difference allowed, as a share of the largest logit.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fold adapters into the base's weights, and prove by the logits that nothing else changed."""
    checkpoint_folder(checkpoint)
    from dataclasses import asdict

    from vlm_adapt.export.merge import merge_checkpoint

    receipt = merge_checkpoint(checkpoint, folder, dtype, tolerance)
    if as_json:
        print(json.dumps(asdict(receipt), indent=1))
        return
    print(f"folded: {', '.join(receipt.folded)}")
    if receipt.kept:
        print(f"kept on top: {', '.join(receipt.kept)}")
    for part, what in receipt.parts.items():
        print(f"{part}: {what}")
    print(
        f"largest difference of a logit in {receipt.dtype}: {receipt.largest_difference:.3g} (the largest is "
        f"{receipt.largest_logit:.3g}, {receipt.tolerance:.3g} is allowed)"
    )
    print(
        f"the dtype alone: {receipt.rounding:.3g}; folding in float32: {receipt.folding_difference:.2g}; "
        f"over {receipt.tokens} tokens ({receipt.samples})"
    )
    print(f"likeliest word changed: {receipt.argmax_differs} of {receipt.tokens} tokens")
    print(f"largest effect of the adapter: {receipt.effect:.3g}")


def soup(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT... [KEY=VALUE]...",
            help="Checkpoint folders, adapters, or runs' output_dirs; for --greedy also overrides, as in "
            "data.evaluate=test.tar evaluate.best_metric=exact_match.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder of the new adapter.")],
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Keep only what makes the held-out score strictly better.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Score on so many samples.")] = None,
    as_json: Json = False,
) -> None:
    """Average adapters of one plan and base into one; updates of LoRA as the products they are."""
    overrides = [word for word in words if re.match(r"[\w.]+=", word) and not Path(word).exists()]
    folders = [checkpoint_folder(Path(word)) for word in words if word not in overrides]
    if overrides and not greedy:
        raise UserError(f"'{overrides[0]}' is for the scores of --greedy: a uniform soup needs none")
    score, greater = None, True
    if greedy:
        run = checked_run(folders[0] / "run.yaml", overrides, train=False)
        settings = run.stage_runs()[-1][1].evaluate
        metric, greater = settings.best_metric, settings.greater_is_better
        if not run.stage_runs()[-1][1].data.evaluate:
            raise UserError("a greedy soup needs held-out samples: give data.evaluate=SHARDS")

        def score(folder: Path) -> float:
            from vlm_adapt.evaluate.checkpoint import score

            value = score(folder, overrides, limit)[0].value(metric)
            print(f"{metric} {value}", file=sys.stderr, flush=True)
            return math.nan if value is None else float(value)

    from vlm_adapt.export.soup import soup

    told = soup(folders, output, score, greater)
    if as_json:
        print(json.dumps(told, indent=1))
        return
    for row in told.get("scores", ()):
        what = " + ".join(_short(Path(one)) for one in row["adapters"])
        print(f"{row['score']:>10.4f}  {'kept' if row['kept'] else '    '}  {what}")
    print(f"{output}: {told['kind']}, {len(told['kept'])} of {len(told['ingredients'])} adapters")


def choose(
    checkpoints: Checkpoints,
    shards: Annotated[list[str], typer.Option(help="Images of the new task; may be repeated.")],
    label: Annotated[str, typer.Option(help="The field of a sample's json to tell apart, as in labels[0].")],
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many samples, spread evenly.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    as_json: Json = False,
) -> None:
    """Rank checkpoints for a new task by leave-one-out nearest neighbours over their vision features."""
    folders = [checkpoint_folder(Path(one)) for one in checkpoints]
    from dataclasses import asdict

    from vlm_adapt.evaluate.choose import choose

    ranked = choose(folders, shards, label, k, limit, batch_size, counting)
    if as_json:
        print(json.dumps([asdict(one) for one in ranked], indent=1))
        return
    for one in ranked:
        print(f"{one.accuracy:>7.1%}  {_short(Path(one.checkpoint))}")
    first = ranked[0]
    print(f"{first.images:,} images of {first.classes} classes, {k} neighbour(s)")
    for reason, times in first.refused.items():
        print(f"refused {times:,} x {reason}")


def _short(path: Path) -> str:
    """The last two pieces of a path."""
    return "/".join(path.parts[-2:])
