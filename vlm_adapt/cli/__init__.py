"""The verbs of `vlm-adapt`: each a thin call into a room.

Knows arguments, exit codes and wording; knows nothing of how anything is done. Rooms are imported
inside their verb, so that `--help` and every wrong argument or key answer without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from vlm_adapt import __version__, dist, exits
from vlm_adapt.cli.adapt import adapt
from vlm_adapt.cli.adapters import add_to, named_folders
from vlm_adapt.cli.common import STYLE, Checkpoint, Config, Overrides, checked_run, checkpoint_folder
from vlm_adapt.cli.probe import probe
from vlm_adapt.cli.scores import scores
from vlm_adapt.cli.segment import segment
from vlm_adapt.cli.shards import shards
from vlm_adapt.cli.weights import weights
from vlm_adapt.cli.zero_shot import zero_shot
from vlm_adapt.errors import UserError

app = typer.Typer(help="Adapt large vision-language models: train, evaluate, chat.", **STYLE)
add_to(adapt)
app.add_typer(adapt, name="adapt")
app.add_typer(shards, name="shards")
app.add_typer(weights, name="weights")


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
    run = checked_run(config, overrides)
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
    checked_run(checkpoint_folder(checkpoint) / "run.yaml", changes, train=False)
    from vlm_adapt.evaluate.checkpoint import evaluate_checkpoint

    evaluate_checkpoint(checkpoint, changes, limit=limit, output=output)


app.command()(scores)
app.command()(probe)
app.command()(zero_shot)
app.command()(segment)


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
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Also this adapter, for /adapter; the last one is in use."),
    ] = None,
    masks: Annotated[
        str, typer.Option(help="Of replies: show (also in the terminal), blocks, file or off.")
    ] = "show",
) -> None:
    """Talk to a trained model about images."""
    from vlm_adapt.chat.shown import check_mode

    check_mode(masks)
    checkpoint_folder(checkpoint)
    adapters = named_folders(adapter)
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
    generation = Generation(max_new_tokens, temperature, top_p, seed)
    session = Session.open(checkpoint, system, generation, adapters)
    if prompt is not None:
        answer_once(session, prompt, files, masks)
        return
    for file in files:
        session.load_image(file)
    terminal = Terminal(session, files)
    terminal.masks = masks
    terminal.run()


@app.command()
def config(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved run, every default written out."""
    run = checked_run(config, overrides, train=False, evaluate=False)
    from vlm_adapt.config.load import dump

    print(dump(run), end="")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output_dir.")]) -> None:
    """Write a run's curves, scores and samples as one HTML page."""
    from vlm_adapt.report.html import write_report

    print(write_report(run))


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
