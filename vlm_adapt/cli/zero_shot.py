"""The verb `vlm-adapt zero-shot`: PASCAL-5i, COCO-20i and FSS-1000 by their published protocols.

Knows arguments and wording; knows nothing of how anything is done (see cli/__init__.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_adapt.cli.common import checkpoint_folder, counting, print_refused
from vlm_adapt.errors import UserError


def zero_shot(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT PROTOCOL FOLDER",
            help="A segmenter's checkpoint or run; pascal5i, coco20i or fss1000; the data set's folder.",
        ),
    ],
    fold: Annotated[int, typer.Option(help="Of the protocol, from 0.")] = 0,
    lists: Annotated[
        Path | None,
        typer.Option(help="Folder of the protocols' lists (HSNet's data/splits); else splits in FOLDER."),
    ] = None,
    names: Annotated[
        str, typer.Option(help="Spelling of classes: published (pottedplant), or plain (potted plant).")
    ] = "published",
    full: Annotated[
        bool, typer.Option("--full", help="At the images' own size, in place of the published square of 480.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many episodes.")] = None,
    list_classes: Annotated[
        bool,
        typer.Option("--list-classes", help="Only print which classes a fold leaves out: PROTOCOL alone."),
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for zero_shot.json.")] = None,
) -> None:
    """Score a segmenter on classes that its training left out."""
    from vlm_adapt.data.episodes import PROTOCOLS

    if list_classes:
        named = [word for word in words if word in PROTOCOLS] or words[:1]
        protocol = PROTOCOLS.load(named[0])(fold, names)
        if lists is not None:
            protocol.read_list(lists)
        _print_classes(protocol)
        return
    if len(words) != 3:
        raise UserError(
            f"zero-shot takes a checkpoint, a protocol ({', '.join(PROTOCOLS)}) and the data set's folder, "
            f"not {len(words)} word{'s' if len(words) > 1 else ''}"
        )
    PROTOCOLS.check(words[1])
    checkpoint_folder(Path(words[0]))
    protocol = PROTOCOLS.load(words[1])(fold, names)
    protocol.open(words[2], lists)
    from vlm_adapt.evaluate.zero_shot import SIDE, zero_shot_checkpoint

    def shown(what: str, total: int) -> Any:
        return counting(what, total, "episodes")

    found, file = zero_shot_checkpoint(Path(words[0]), protocol, limit, None if full else SIDE, output, shown)
    from vlm_adapt import dist

    if not dist.is_main():
        return
    print(found.table())
    print_refused(found.metrics["account"])
    if not found.metrics["as_published"]:
        print(f"these are not the published episodes: {_why(found.metrics)}")
    print(f"written to {file}", file=sys.stderr)


def _why(metrics: dict[str, Any]) -> str:
    if metrics["side"] is None:
        return "they were judged at the images' own size"
    if metrics["account"]["refused"]:
        return "some could not be used"
    if metrics["episodes"] < metrics["episodes_in_all"]:
        return f"{metrics['episodes']:,} of {metrics['episodes_in_all']:,}"
    return f"the list {metrics['list']} is another"


def _print_classes(protocol: Any) -> None:
    unseen, seen = protocol.unseen(), protocol.seen()
    if not unseen:
        raise UserError(f"the classes of {protocol.title} are in its lists: name their folder with --lists")
    print(f"{protocol.title}, fold {protocol.fold}" if protocol.folds > 1 else protocol.title)
    for what, some in (("seen", seen), ("unseen", unseen)):
        print(f"\n{what}, {len(some)}:")
        print("  " + ", ".join(some) if some else "  (their lists, trn.txt and val.txt, are not there)")
    print("\nto leave the unseen ones out of training, give the source this task:")
    quoted = ", ".join(_yaml(name) for name in unseen)
    print(f"  task: {{name: masks, leave_out: [{quoted}]}}")


def _yaml(name: str) -> str:
    return name if name.replace("_", "").replace(" ", "").isalnum() else '"' + name + '"'
