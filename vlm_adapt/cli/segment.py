"""The verb `vlm-adapt segment`: masks and pictures of images, from any words, points or boxes.

Knows arguments, exit codes and wording; knows nothing of how anything is done (see cli/__init__.py).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_adapt.cli.common import Checkpoint, checkpoint_folder, print_refused
from vlm_adapt.errors import UserError
from vlm_adapt.exits import USER

EVERY = 5.0  # seconds between lines of progress
ROWS = 40  # labels in the table of an image
LISTED = 5  # labels in a line of one of many images


def segment(
    checkpoint: Checkpoint,
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image, a folder, an animation (GIF, WebP) or a video; may be repeated."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help='What to find, as in "cat, grass, other" or "car|automobile, road".')
    ] = None,
    labels_file: Annotated[Path | None, typer.Option(help="A text file with a label a line.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("."),
    window: Annotated[
        str, typer.Option(help="sliding over the image, or whole: squashed to the tower's size.")
    ] = "sliding",
    scales: Annotated[str, typer.Option(help="Sizes whose answers are averaged, as in 0.75,1,1.25.")] = "1",
    base_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of the long side at scale 1; else as small as fits.")
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")] = False,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Of the colours in the picture.")] = 0.55,
    scores: Annotated[
        bool, typer.Option("--scores", help="Also every label's chance in every pixel (safetensors).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object an image.")] = False,
    point: Annotated[
        list[str] | None, typer.Option(metavar="X,Y[,0]", help="What lies here; with ,0 what does not.")
    ] = None,
    box: Annotated[list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help="What is in this box.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A mask file as a prompt.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="All masks that there are.")] = False,
    name_with: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="A segmenter that names masks by --labels.")
    ] = None,
    grid: Annotated[int, typer.Option(help="Points a side, for --everything.")] = 32,
    crops: Annotated[int, typer.Option(help="Further rounds on 4, 16, ... parts, for --everything.")] = 0,
    min_area: Annotated[int, typer.Option(help="Pixels of the smallest mask, for --everything.")] = 0,
) -> int:
    """Find what the words, points or boxes mean in images; write masks and pictures."""
    from vlm_adapt.segment.opened import locate

    folder = locate(checkpoint)
    if not image:
        raise UserError("segment needs to know what to look at: give --image FILE")
    from vlm_adapt.segment.ask import Ask
    from vlm_adapt.segment.inputs import find

    prompted = bool(point or box or mask)
    ask = Ask(
        labels=_labels(labels, labels_file),
        points=tuple(_point(one) for one in point or []),
        boxes=tuple(_box(one) for one in box or []),
        mask=_existing(mask),
        everything=everything,
        name_with=None if name_with is None else checkpoint_folder(name_with),
        window=window,
        scales=_scales(scales),
        flip=flip,
        base_size=base_size,
        scores=scores,
        grid=grid,
        crops=crops,
        min_area=min_area,
    )
    if output.exists() and not output.is_dir():
        raise UserError(f"--output '{output}' is a file: name a folder")
    found = find(image, output)
    if prompted and len(found.inputs) > 1:
        raise UserError("--point, --box and --mask are places of one image: give one --image")
    if scores and any(one.kind != "image" for one in found.inputs):
        raise UserError("--scores of a film would be thousands of large files: leave it out, or give frames")
    for why, count in found.left_out.items():
        print(f"left out {count:,} files: {why}", file=sys.stderr)
    from transformers.utils.logging import disable_progress_bar

    from vlm_adapt.segment.run import Finder, Segment

    disable_progress_bar()
    finder = Finder(folder, ask)
    told = _Told(len(found.inputs) == 1 and found.inputs[0].kind == "image")
    work = Segment(
        finder, output, opacity, told, scores, finder.max_pixels, points=ask.points, boxes=ask.boxes
    )
    for done in work.run(found.inputs):
        told.clear()
        if as_json:
            print(json.dumps(done.to_dict(), ensure_ascii=False), flush=True)
        else:
            _print(done, alone=len(found.inputs) == 1)
    told.clear()
    account = work.account
    if len(found.inputs) > 1:
        print(f"{account.used:,} of {account.read:,} done, in {output}", file=sys.stderr)
    if not account.refused:
        return 0
    if len(found.inputs) == 1:
        reason, examples = next(iter(account.examples.items()))
        raise UserError(f"cannot be segmented: {reason}: {examples[0]}")
    if as_json:
        print(json.dumps({"refused": account.refused, "examples": account.examples}, ensure_ascii=False))
    else:
        print_refused({"refused": account.refused, "examples": account.examples})
    return USER


def _labels(text: str | None, file: Path | None) -> tuple[str, ...]:
    if text is None and file is None:
        return ()
    from vlm_adapt.text.labels import read_labels

    if file is None:
        return read_labels(text or "")
    if text is not None:
        raise UserError("--labels and --labels-file are two ways to say the same: give one of them")
    try:
        lines = file.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"there is no file of labels '{file}'") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the file of labels '{file}' cannot be read: {error}") from error
    try:
        return read_labels([line for line in lines if line.strip()])
    except UserError as error:
        raise UserError(f"'{file}': {error}") from error


def _numbers(text: str, option: str, example: str) -> list[float]:
    try:
        found = [float(one) for one in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise UserError(f"{option} '{text}' is not numbers with commas between, such as {example}")
    return found


def _scales(text: str) -> tuple[float, ...]:
    return tuple(_numbers(text, "--scales", "0.75,1,1.25"))


def _point(text: str) -> tuple[float, float, int]:
    found = _numbers(text, "--point", "120,80 or 120,80,0")
    if len(found) not in (2, 3) or (len(found) == 3 and found[2] not in (0, 1)):
        raise UserError(f"--point '{text}' is not x,y (inside), or x,y,0 (outside), as in 120,80,0")
    return found[0], found[1], int(found[2]) if len(found) == 3 else 1


def _box(text: str) -> tuple[float, float, float, float]:
    found = _numbers(text, "--box", "40,30,200,180")
    if len(found) != 4 or found[0] >= found[2] or found[1] >= found[3]:
        raise UserError(f"--box '{text}' is not left,top,right,bottom, as in 40,30,200,180")
    return found[0], found[1], found[2], found[3]


def _existing(file: Path | None) -> Path | None:
    if file is not None and not file.expanduser().is_file():
        raise UserError(f"there is no mask '{file}'")
    return None if file is None else file.expanduser()


class _Told:
    """Frames done, rate and time left, on standard error now and then."""

    def __init__(self, silent: bool):
        self.silent, self.started, self.drawn = silent, time.monotonic(), False
        self.printed = self.started
        self.terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if self.silent or now - self.printed < (0.5 if self.terminal else EVERY):
            return
        self.printed, rate = now, done / (now - self.started)
        text = f"segmented {done:,}" + (f" of {total:,}" if total else "") + f"  {_rate(rate)}"
        if total and done <= total:
            text += f"  {(total - done) / rate:.0f} s left"
        start, end = ("\r\x1b[K", "") if self.terminal else ("", "\n")
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
        self.drawn = self.terminal

    def clear(self) -> None:
        """Take the line of progress away, for others to be printed."""
        if self.drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self.drawn = False


def _rate(rate: float) -> str:
    return f"{rate:.2g} a second" if rate >= 0.1 else f"{60 * rate:.2g} a minute"


def _print(done: Any, alone: bool) -> None:
    """A table of one image, a line of one among many."""
    shown = [row for row in done.rows if row["share"] > 0]
    missing = [row["label"] for row in done.rows if not row["share"]]
    for note in done.figures.get("notes", []):
        print(f"{done.source.path}: {note}", file=sys.stderr)
    if not alone:
        parts = [f"{row['label']} {_percent(row['share'])}" for row in shown[:LISTED]]
        parts += [f"{len(shown) - LISTED} more"] if len(shown) > LISTED else []
        print(f"{done.source.path}: {', '.join(parts) or 'nothing found'}", flush=True)
        return
    width, height = done.size
    frames = "" if done.source.kind == "image" else f", {done.frames:,} frames"
    print(f"{done.source.path}: {width} x {height}{frames}, {done.seconds:.1f} s")
    rows: list[tuple[str, str, str]] = [("label", "share", "score")]
    for row in shown[:ROWS]:
        score = "" if row["score"] is None else f"{row['score']:.2f}"
        rows.append((row["label"], _percent(row["share"]), score))
    _table(rows)
    if len(shown) > ROWS:
        print(f"and {len(shown) - ROWS:,} more (--json prints all)")
    if missing:
        more = f" and {len(missing) - ROWS:,} more" if len(missing) > ROWS else ""
        print(f"not found: {', '.join(missing[:ROWS])}{more}")
    for what, file in done.files.items():
        print(f"{what}: {file}")


def _percent(share: float) -> str:
    from vlm_adapt.report.regions import share_text

    return share_text(share)


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
