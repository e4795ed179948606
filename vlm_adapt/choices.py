"""Tables of named choices that are imported only when chosen.

Knows how to turn a name into an object and a misspelt name into a suggestion; knows nothing about
what is being chosen. Listing a table imports none of its entries, so `--help` stays fast.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vlm_adapt.errors import UserError


def nearest(name: str, known: Iterable[str]) -> str:
    """`", did you mean 'x'?"` for the closest known name, or an empty string if none is close."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


class Choices(Mapping[str, str]):
    """A family's table: name -> `"package.module:attribute"`.

    Args:
        family: what is being chosen, for messages ("connector", "task").
        table: the entries; a new member of a family is one new line here and one new file.
    """

    def __init__(self, family: str, table: dict[str, str]):
        self.family, self.table = family, table

    def __getitem__(self, name: str) -> str:
        return self.table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def check(self, name: str) -> str:
        """Return `name`, or raise UserError naming the family, the nearest name and all names."""
        if name not in self.table:
            raise UserError(
                f"unknown {self.family} '{name}'{nearest(name, self.table) or ':'} "
                f"known are {', '.join(sorted(self.table))}"
            )
        return name

    def load(self, name: str) -> Any:
        """Import and return what `name` stands for."""
        module, _, attribute = self.table[self.check(name)].partition(":")
        return getattr(importlib.import_module(module), attribute)
