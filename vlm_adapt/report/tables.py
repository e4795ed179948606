"""Tables of rows as Markdown (for a README) and as plain text (for a terminal). Knows nothing about runs."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_adapt.report.words import number


def _cells(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str] | None
) -> tuple[list[str], list[list[str]], list[bool]]:
    """Headings, the text of the cells, and which columns hold numbers only."""
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    titles = dict(columns) if isinstance(columns, Mapping) else {key: key for key in columns}
    values = [[row.get(key) for key in titles] for row in rows]
    text = [
        ["" if v is None else number(v) if isinstance(v, float) else str(v) for v in line] for line in values
    ]
    numeric = [
        bool(rows) and all(isinstance(line[i], int | float | None) and line[i] is not True for line in values)
        for i in range(len(titles))
    ]
    return list(titles.values()), text, numeric


def _width(text: str) -> int:
    """Columns a terminal gives to the text: two for East Asian wide characters, none for accents alone."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def markdown_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | Mapping[str, str] | None = None
) -> str:
    """A GitHub table, numbers to the right.

    Args:
        rows: one mapping a line; a missing or None value is an empty cell.
        columns: keys in order, or key -> heading; by default the keys in the order they appear.
    """
    titles, text, numeric = _cells(rows, columns)

    def line(cells: Sequence[str]) -> str:
        safe = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
        return "| " + " | ".join(safe) + " |"

    rule = "|" + "|".join("---:" if right else "---" for right in numeric) + "|"
    return "\n".join([line(titles), rule, *map(line, text)])


def plain_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | Mapping[str, str] | None = None,
    right: Sequence[str] = (),
) -> str:
    """The same for a terminal of fixed-width letters: headings, a rule, aligned columns.

    Args:
        right: headings of columns of ready text that go to the right.
    """
    titles, text, numeric = _cells(rows, columns)
    numeric = [one or title in right for one, title in zip(numeric, titles, strict=True)]
    text = [[" ".join(cell.split()) for cell in line] for line in text]
    widths = [max([_width(title), *(_width(line[i]) for line in text)]) for i, title in enumerate(titles)]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for cell, width, right in zip(cells, widths, numeric, strict=True):
            gap = " " * (width - _width(cell))
            padded.append(gap + cell if right else cell + gap)
        return "  ".join(padded).rstrip()

    return "\n".join([line(titles), "  ".join("─" * width for width in widths), *map(line, text)])
