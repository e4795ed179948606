"""Tables of one's own as CSV, TSV or JSON lines: a row is a sample, options say which column is which.
RFC 4180 for CSV; the column names of `datasets`' imagefolder (`file_name`) are understood as well."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_adapt.data.convert.columns import Columns
from vlm_adapt.data.convert.common import Conversion, ImageFolders, Recipe, existing, read_json, several
from vlm_adapt.data.convert.conversations import json_lines
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

_LARGEST_CELL = 1 << 30  # csv's own limit is 128 KiB, and messages or images in base64 are longer


def _csv(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    """`(line number, row)`; BadSample for a row with too many or too few cells."""
    csv.field_size_limit(_LARGEST_CELL)
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            for cells in reader:
                number = reader.line_num
                if len(cells) == len(header):
                    yield number, dict(zip(header, cells, strict=True))
                elif cells:
                    detail = f"line {number} has {len(cells)}, the header {len(header)}"
                    yield number, BadSample("row with another number of cells than the header", detail)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"table {path} cannot be read after line {number}: {error}") from error


def _rows(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    if path.suffix in (".jsonl", ".ndjson"):
        return json_lines(path, "table")
    if path.suffix == ".json":
        content = read_json(str(path), "table")
        if not isinstance(content, list):
            raise UserError(f"{path} is not a table: it should hold a list of objects")
        return enumerate(content, 1)
    return _csv(path, delimiter or ("\t" if path.suffix in (".tsv", ".tab") else ","))


def convert(
    conversion: Conversion,
    *,
    source: str,
    images: str = "",
    image: str = "",
    caption: str = "",
    captions: str = "",
    question: str = "",
    answer: str = "",
    answers: str = "",
    messages: str = "",
    text: str = "",
    kind: str = "",
    lang: str = "",
    id: str = "",
    separator: str = "",
    delimiter: str = "",
) -> Iterator[Recipe]:
    """Samples of whatever the table has, in its order.

    Args:
        source: a `.csv`, `.tsv`, `.jsonl` or `.json` (a list) file, or several joined by `::`. The first
            line of CSV and TSV names the columns.
        images: the folder to which image names are relative, or several joined by `::`; the table's own
            folder if left out.
        image, caption, captions, question, answer, answers, messages, text, kind, lang, id: the column
            that holds it. One that is not named is looked for under its own name (images also as
            images, image_path, file_name, filename, path; messages also as conversations, texts); `-`
            leaves it out. Lists may be JSON in a cell.
        separator: what stands between several images, captions or answers in one cell, such as `|`.
        delimiter: between the cells of a CSV; a comma, in TSV a tab.
    """
    given = {
        "image": image, "caption": caption, "captions": captions, "question": question, "answer": answer,
        "answers": answers, "messages": messages, "text": text, "kind": kind, "lang": lang, "id": id,
    }  # fmt: skip
    if len(delimiter.replace("\\t", "\t")) > 1:
        raise UserError(f"delimiter is '{delimiter}': it must be one letter")
    named = [str(folder) for folder in ImageFolders(images).folders] if images else []
    count = 0
    for name in several(source):
        path = existing(name, "table")
        folders = named or [str(path.absolute().parent)]
        known: dict[tuple[str, ...], Columns] = {}  # lines of JSON differ in what they have
        for line, row in _rows(path, delimiter.replace("\\t", "\t")):
            key = f"{count:08d}"
            count += 1
            if isinstance(row, BadSample):
                conversion.lose(key, row)
                continue
            if not isinstance(row, dict):
                conversion.lose(key, BadSample("entry is not an object", f"number {line}"))
                continue
            header = tuple(row)
            if header not in known:
                known[header] = Columns.of(given, header, str(path), separator, strict=not known)
            yield Recipe(key, known[header].sample, (known[header].cut(row), key, folders))
