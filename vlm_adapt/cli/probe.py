"""The verb `vlm-adapt probe`: what a frozen tower knows already, without fine-tuning.

Knows arguments, exit codes and wording; knows nothing of how anything is done (see cli/__init__.py).
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_adapt.choices import nearest
from vlm_adapt.cli.common import checked_run, checkpoint_folder, counting, print_refused
from vlm_adapt.errors import UserError

WAYS = ("knn", "linear", "retrieval")
FILE = "probe.json"


def probe(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG | CHECKPOINT [KEY=VALUE]...",
            help="A YAML file: its tower as it is. A checkpoint folder or a run's output_dir: as adapted.",
        ),
    ],
    test: Annotated[list[str], typer.Option(help="Shards to test on; may be repeated.")],
    train: Annotated[
        list[str] | None,
        typer.Option(help="Shards to learn from. Without, each test image is compared with the others."),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The label is this field of a sample's json, as in labels[0].")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="The label is the answer to the first question with these words.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="The label is the answer to the first question of this kind.")
    ] = None,
    by: Annotated[str, typer.Option(help="Which of knn, linear, retrieval.")] = "knn,linear",
    k: Annotated[str, typer.Option(help="Neighbours that vote; also of recall@k.")] = "1,5,20",
    layers: Annotated[
        str | None, typer.Option(help="Depths of the tower, as 0,2,-1 or all; else model.vision.layers.")
    ] = None,
    after: Annotated[
        str, typer.Option(help="Take features after the vision tower or the connector.")
    ] = "vision",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many samples of each.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    penalty: Annotated[
        float | None, typer.Option(min=0, help="Of the linear probe's weights; else chosen on a fifth.")
    ] = None,
    standardise: Annotated[
        bool, typer.Option("--standardise", help="Neighbours too see channels of mean 0 and deviation 1.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help=f"The file; else {FILE} in the checkpoint, or here.")
    ] = None,
) -> None:
    """Nearest neighbours, a linear probe and retrieval over frozen features of images."""
    overrides = [word for word in words if re.match(r"[\w.]+=", word) and not Path(word).exists()]
    models = [Path(word) for word in words if word not in overrides]
    if len(models) != 1:
        raise UserError("probe takes one model: a configuration, a checkpoint folder or a run's output_dir")
    ways, ks = _ways(by), _numbers(k)
    if sum(one is not None for one in (label, question, kind)) != 1 and (label or not (question and kind)):
        raise UserError("probe needs to know the label of an image: give --label, or --question, or --kind")
    if after not in ("vision", "connector"):
        raise UserError(f"--after '{after}' is not one of vision, connector")
    if layers is not None and (after == "connector" or not re.fullmatch(r"all|-?\d+(,-?\d+)*", layers)):
        raise UserError(
            f"--layers '{layers}' is not 'all' or numbers such as 0,2,-1"
            if after == "vision"
            else "--layers is for the vision tower, and the connector reads layers of its own"
        )
    if "linear" in ways and not train:
        raise UserError(
            "a linear probe learns from other images than it is tested on: give --train, or --by knn"
        )
    path = models[0].expanduser()
    if path.is_file():
        checked_run(path, overrides, train=False, evaluate=False)
    elif overrides:
        raise UserError(f"'{overrides[0]}' changes a configuration, and a checkpoint is as it was trained")
    else:
        path = checkpoint_folder(path)
    target = output or (Path(FILE) if path.is_file() else path / FILE)
    _check_target(target)
    from vlm_adapt.data.shards import ShardSet
    from vlm_adapt.evaluate.features import Label, open_pooled
    from vlm_adapt.evaluate.probe import probe

    sets = {name: ShardSet(some) for name, some in (("train", train), ("test", test)) if some}
    where = Label(label, question, kind)
    pooled, run = open_pooled(path, overrides, after, layers)
    found = {}
    for name, shards in sets.items():
        with counting(f"{name} features", min(len(shards), limit or len(shards)), "images") as tell:
            found[name] = pooled.of(shards, where, batch_size, limit, run.data.max_pixels, tell)
    with counting("probes", len(pooled.names) * len(ways), "probes") as tell:
        figures = probe(found.get("train"), found["test"], ways, ks, penalty, standardise, tell)
    figures = {"standardise": standardise} | figures
    figures = {"model": str(path), "shards": {"train": train, "test": test}, "label": str(where)} | figures
    figures["samples"] = {
        name: one.account.to_dict() | {"several_images": one.several} for name, one in found.items()
    }
    _print(figures)
    target.write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"written to {target}", file=sys.stderr)


def _ways(words: str) -> list[str]:
    ways = list(dict.fromkeys(words.split(",")))
    for way in ways:
        if way not in WAYS:
            raise UserError(f"--by '{way}' is not one of {', '.join(WAYS)}{nearest(way, WAYS)}")
    return ways


def _numbers(words: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", words):
        raise UserError(f"--k '{words}' is no list of whole numbers from 1, such as 1,5,20")
    return sorted({int(one) for one in words.split(",")})


def _check_target(target: Path) -> None:
    """Whether the file can be written, before anything is computed."""
    if target.is_dir():
        raise UserError(f"--output '{target}' is a folder: name a file")
    if not target.absolute().parent.is_dir():
        raise UserError(f"--output '{target}' cannot be written: there is no folder '{target.parent}'")
    if not os.access(target if target.exists() else target.absolute().parent, os.W_OK):
        raise UserError(f"--output '{target}' cannot be written: there is no permission")


def _print(figures: dict[str, Any]) -> None:
    used = {name: one["used"] for name, one in figures["samples"].items()}
    tested = used["test"]
    learned = f"{used['train']:,} images to learn from, " if "train" in used else "each left out in turn, "
    print(f"{learned}{tested:,} to test; {len(figures['classes']):,} classes by {figures['label']}")
    print(f"always the most common class: {_percent(figures['majority'], tested)}")
    if figures["unseen"]:
        print(f"{figures['unseen']:,} test images of classes that are not learned from count as wrong")
    rows = [("features", "size", "by", "score")]
    for one in figures["results"]:
        about = (one["features"], f"{one['size']:,}")
        if one["by"] == "retrieval":
            rows += [
                (*about, f"retrieval {name}", _percent(value, one["queries"] if name != "mAP" else None))
                for name, value in one.items()
                if name.startswith("recall@") or name == "mAP"
            ]
            continue
        way = f"knn k={one['k']}" if one["by"] == "knn" else f"linear, {one['parameters']:,} parameters"
        rows.append((*about, way, _percent(one["accuracy"], tested)))
    _table(rows)
    for name, one in figures["samples"].items():
        if one["several_images"]:
            print(f"{name}: {one['several_images']:,} samples hold several images; the first was read")
        print_refused(one)


def _percent(value: float, count: int | None) -> str:
    """A share, with its standard error over so many images where it is one of them."""
    if count is None:
        return f"{100 * value:5.1f} %"
    error = (value * (1 - value) / count) ** 0.5
    return f"{100 * value:5.1f} % +- {100 * error:.1f}"


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if place == 1 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
