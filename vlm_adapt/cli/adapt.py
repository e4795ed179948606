"""The verbs of `vlm-adapt adapt`: which methods there are, and what a plan would train.

Knows arguments and wording; knows nothing of how anything is done (see cli/__init__.py).
"""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import Annotated

import typer

from vlm_adapt.adapt import METHODS
from vlm_adapt.cli.common import STYLE, Config, Overrides, checked_run

adapt = typer.Typer(help="Adaptation methods: list them, and see what a plan would train.", **STYLE)
Json = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]


@adapt.command("list")
def list_methods(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table for a page.")] = False,
) -> None:
    """Every method with its sides, one line, its paper, and its settings."""
    from vlm_adapt.models.about import constants_of, settings_of

    rows = []
    for name in METHODS:
        about = constants_of(METHODS[name])
        settings, more = settings_of(METHODS[name])
        rows.append(
            {
                "method": name,
                "where": list(about["sides"]),
                "summary": about["summary"],
                "paper": about["paper"],
                "settings": settings + (["more of the library's own"] if more else []),
                "merges": bool(about["mergeable"]),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if markdown:
        print("| method | on | what trains | paper | merges |\n|---|---|---|---|---|")
        for row in rows:
            cells = (f"`{row['method']}`", ", ".join(row["where"]), row["summary"], row["paper"])
            print(f"| {' | '.join(cells)} | {'yes' if row['merges'] else ''} |")
        return
    width = shutil.get_terminal_size((110, 24)).columns
    longest = max(len(row["method"]) for row in rows)
    for row in rows:
        sides = "".join(side[0].upper() if side in row["where"] else "-" for side in SIDES)
        head = f"{row['method']:<{longest}}  {sides}{' M' if row['merges'] else '  '}  "
        paper = f" ({row['paper']})" if row["paper"] else ""
        text = textwrap.wrap(row["summary"] + paper, max(40, width - len(head)))
        print(head + text[0])
        for line in text[1:]:
            print(" " * len(head) + line)
        if row["settings"]:
            listed = textwrap.wrap("settings: " + ", ".join(row["settings"]), max(40, width - len(head)))
            for line in listed:
                print(" " * len(head) + line)
    print("\nV vision, C connector, L language; M can be merged into the base's weights")


SIDES = ("vision", "connector", "language")


@adapt.command("show")
def show(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """What a run would train, by part: shapes, counts, share and bytes stored. Loads no weights."""
    run = checked_run(config, overrides, train=False, evaluate=False)
    import logging
    from dataclasses import asdict

    from vlm_adapt.models.outline import outline

    logging.disable(logging.WARNING)  # libraries warn of models without weights, which is what is asked for
    stages = outline(run)
    if as_json:
        print(json.dumps([asdict(stage) | {"total": stage.total} for stage in stages], indent=1))
        return
    for stage in stages:
        print(f"stage '{stage.name}'")
        for line in stage.lines:
            share = line.count / stage.total
            print(
                f"  {line.label:<28} {line.count:>14,} numbers  {share:>8.3%} of the model  "
                f"{_bytes(line.bytes_stored):>9} stored"
            )
            for one in line.tensors:
                shape = " x ".join(map(str, one.shape)) or "1"
                print(f"      {one.times:>4} x {shape:<16} {one.count:>12,}  {one.name}")
        for part, (trained, every) in stage.parts.items():
            share = trained / every if every else 0.0
            print(f"  {part:<10} trains {trained:>13,} of {every:>15,}  {share:>8.3%}")
        trained = sum(count for count, _ in stage.parts.values())
        stored = sum(line.bytes_stored for line in stage.lines)
        print(
            f"  {'all':<10} trains {trained:>13,} of {stage.total:>15,}  {trained / stage.total:>8.3%}  "
            f"{_bytes(stored)} stored"
        )


def _bytes(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
