"""Rows of a table to samples: which column is which field, and what its cells may hold.

Knows rows as plain dicts, from CSV, JSON lines or parquet; knows nothing about files of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_adapt.choices import nearest
from vlm_adapt.data.convert.cells import cells_sample
from vlm_adapt.data.convert.common import LOST
from vlm_adapt.data.convert.conversations import conversation
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

# Where a field is looked for when nobody says in which column it is.
USUAL = {
    "image": ("image", "images", "image_path", "file_name", "filename", "path"),
    "messages": ("messages", "conversations", "texts"),
    **{
        name: (name,)
        for name in "caption captions question answer answers text kind lang id questions ocr".split()
    },
    **{name: (name,) for name in "labels objects referring state".split()},
}
SAID = ("messages", "caption", "captions", "question", "questions", "text", "objects", "referring", "labels")
_AS_THEY_ARE = ("questions", "ocr", "labels", "objects", "referring", "state")  # our schema, if there at all
_NONE = "-"


@dataclass(frozen=True)
class Columns:
    """Which column of a table holds which field.

    Attributes:
        places: field to column.
        separator: between several images, captions or answers in one text cell; "" for none.
    """

    places: dict[str, str]
    separator: str = ""

    @classmethod
    def of(
        cls,
        given: Mapping[str, str],
        header: Sequence[str],
        source: str,
        separator: str = "",
        strict: bool = True,
    ) -> Columns:
        """Columns as the options say, else under their usual names; `-` leaves a field out.

        Args:
            strict: what is missing is an error; else it is for each row to say (as lines of JSON differ).

        Raises:
            UserError: a column that is not there, or nothing that could be learned.
        """
        places = {}
        for field, names in USUAL.items():
            column = given.get(field, "")
            if column and column != _NONE:
                if strict and column not in header:
                    near = nearest(column, header)
                    raise UserError(
                        f"{source} has no column '{column}'{near or ':'} it has " + ", ".join(header)
                    )
                places[field] = column
            elif not column:
                found = next((name for name in names if name in header), None)
                if found is not None and found not in given.values():
                    places[field] = found
        if strict and not any(field in places for field in SAID):
            raise UserError(
                f"{source} is not a table of samples: none of its columns ({', '.join(header) or 'none'}) is "
                "called messages, caption, question or text; say which is which, as in caption=COLUMN"
            )
        return cls(places, separator)

    def cut(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The cells that are of use."""
        return {column: row[column] for column in self.places.values() if column in row}

    def sample(self, row: Mapping[str, Any], name: str, folders: Sequence[str]) -> dict[str, Any]:
        """The members of a row's sample. A recipe.

        Args:
            row: column to cell.
            name: its id, if no column has one.
            folders: where its images are.

        Raises:
            BadSample: nothing to learn, an empty caption, question or answer, an image that cannot be used.
        """
        record, cells, lost = self.record(row, name)
        members = cells_sample(cells, folders, record)
        return {**members, LOST: lost} if lost else members

    def record(
        self, row: Mapping[str, Any], name: str
    ) -> tuple[dict[str, Any], list[Any], list[tuple[str, str]]]:
        """The JSON record of a row, its images as `cells.read_cell` takes them, and what was left out."""
        found = {field: row.get(column) for field, column in self.places.items()}
        lost: list[tuple[str, str]] = []
        cells = self._list(found.get("image"))
        record: dict[str, Any] = {}
        if _filled(found.get("messages")):
            turns = _parsed(found["messages"])
            entry = {"texts" if _paired(turns) else "messages": turns, "images": cells}
            record["messages"], cells = conversation(entry, insert=True)
        for field, one in (("caption", "caption"), ("captions", "caption"), ("text", "text")):
            if field not in self.places or not _filled(found[field]):
                continue
            if field == "captions" or (field == "caption" and isinstance(found[field], list)):
                record["captions"] = self._texts(found[field], one, lost)
            else:
                record[field] = _text(found[field], one)
        if _filled(found.get("question")):
            record["question"] = _text(found["question"], "question")
            held = next((name for name in ("answers", "answer") if _filled(found.get(name))), None)
            if held is None:
                raise BadSample("question without an answer")
            record["answers"] = self._texts(found[held], "answer", lost)
        for field in _AS_THEY_ARE:
            if _filled(found.get(field)):
                record[field] = _parsed(found[field])
        if not any(field in record for field in SAID):
            empty = [self.places[field] for field in SAID if field in self.places]
            raise BadSample("row says nothing", f"empty: {', '.join(empty) or 'all of it'}")
        if not cells and "image" in self.places and ("caption" in record or "captions" in record):
            raise BadSample("caption without an image")
        for field in ("kind", "lang"):
            if _filled(found.get(field)):
                record[field] = str(found[field])
        record["id"] = str(found["id"]) if _filled(found.get("id")) else name
        return record, cells, lost

    def _list(self, cell: Any) -> list[Any]:
        """Several values of a cell: a list, a JSON list, text between separators, or the one that it is."""
        if not _filled(cell):
            return []
        if isinstance(cell, str):
            if cell.lstrip().startswith("["):
                try:
                    cell = json.loads(cell)
                except ValueError:
                    pass  # a text that begins with a bracket
            elif self.separator:
                return cell.split(self.separator)
        return list(cell) if isinstance(cell, list | tuple) else [cell]

    def _texts(self, cell: Any, what: str, lost: list[tuple[str, str]]) -> list[str]:
        """The texts of a cell; empty ones are noted, and BadSample if nothing is left."""
        texts = [one.get(what) if isinstance(one, Mapping) else one for one in self._list(cell)]
        good = [str(text).strip() for text in texts if _filled(text)]
        if not good:
            raise BadSample(f"empty {what}")
        article = "an" if what[0] in "aeiou" else "a"
        lost += [(f"{article} {what}", f"empty {what}")] * (len(texts) - len(good))
        return good


def _filled(cell: Any) -> bool:
    """Whether a cell holds anything."""
    if cell is None or cell == [] or cell == {}:
        return False
    return bool(cell.strip()) if isinstance(cell, str) else True


def _text(cell: Any, what: str) -> str:
    if isinstance(cell, list | Mapping | bytes):
        raise BadSample(f"{what} is not a text", f"it is a {type(cell).__name__}")
    return str(cell).strip()


def _parsed(cell: Any) -> Any:
    """A value that a text cell has as JSON."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        raise BadSample("a cell is not readable JSON", str(error)) from error


def _paired(turns: Any) -> bool:
    return isinstance(turns, list) and any(
        isinstance(turn, Mapping) and "assistant" in turn for turn in turns
    )
