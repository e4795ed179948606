"""Hugging Face `datasets` folders: parquet files, and the arrow files of `save_to_disk`. A row is a sample,
options say which column is which. huggingface.co/docs/datasets; parquet.apache.org. Needs pyarrow.

A column of images holds `{"bytes": ..., "path": ...}`, or lists of these. Rows are read by the writers, a
few at a time, so that a row group of any size costs little memory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vlm_adapt.data.convert.columns import Columns
from vlm_adapt.data.convert.common import LOST, Conversion, ImageFolders, Recipe, existing, several
from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

_BATCH = 64  # rows read at once
_SPLIT = re.compile(r"(train|validation|valid|val|test|dev)\w*", re.IGNORECASE)


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError("the parquet converter needs pyarrow: pip install 'vlm-adapt[parquet]'") from error
    return pyarrow


class _Table:
    """One file, read from front to back and, for a row that was passed, again from its group's start."""

    def __init__(self, path: str, columns: tuple[str, ...]):
        arrow = _pyarrow()
        self.path, self.columns = path, list(columns)
        self.group, self.start, self.batch, self.rest = -1, 0, None, iter(())
        try:
            if path.endswith(".parquet"):
                self.file: Any = arrow.parquet.ParquetFile(path, pre_buffer=False)
                self.schema = self.file.schema_arrow
                metadata = self.file.metadata
                self.sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            else:
                self.file = list(_arrow_batches(arrow, path))  # mapped, so they take no memory
                self.schema = self.file[0].schema if self.file else arrow.schema([])
                self.sizes = [batch.num_rows for batch in self.file]
        except (OSError, arrow.ArrowException) as error:
            raise UserError(f"{path} is not a readable parquet or arrow file: {error}") from error
        self.names = _class_names(self.schema)

    def _batches(self, group: int) -> Iterator[Any]:
        if isinstance(self.file, list):
            yield self.file[group].select(self.columns)
        else:
            yield from self.file.iter_batches(
                batch_size=_BATCH, row_groups=[group], columns=self.columns, use_threads=False
            )

    def row(self, group: int, place: int) -> dict[str, Any]:
        """A row as plain values. UserError if the file is damaged."""
        try:
            if group != self.group or place < self.start or self.batch is None:
                self.group, self.start, self.rest = group, 0, self._batches(group)
                self.batch = next(self.rest)
            while place >= self.start + self.batch.num_rows:
                self.start += self.batch.num_rows
                self.batch = next(self.rest)
            row = self.batch.slice(place - self.start, 1).to_pylist()[0]
        except (OSError, StopIteration, _pyarrow().ArrowException) as error:
            self.batch = None
            raise UserError(f"{self.path} cannot be read in row group {group}: {error}") from error
        for column, names in self.names.items():
            if isinstance(row.get(column), int) and 0 <= row[column] < len(names):
                row[column] = names[row[column]]
        return row


def _arrow_batches(arrow: Any, path: str) -> Iterator[Any]:
    """Record batches of a file of `save_to_disk` (a stream) or of an arrow file."""
    source = arrow.memory_map(path)
    try:
        yield from arrow.ipc.open_stream(source)
    except arrow.ArrowInvalid:
        source.seek(0)
        opened = arrow.ipc.open_file(source)
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` notes about the columns."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes whose numbers a column holds."""
    features = _features(schema)
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _image_column(schema: Any) -> str:
    """The first column that holds images, whatever it is called; "" if none does."""
    arrow = _pyarrow()
    for field in schema:
        kind = field.type
        if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
            kind = kind.value_type
        if arrow.types.is_struct(kind) and {"bytes", "path"} <= {
            kind.field(i).name for i in range(kind.num_fields)
        }:
            return field.name
    return ""


@lru_cache(maxsize=2)  # of a writer: its tasks go through the files in order
def _table(path: str, columns: tuple[str, ...]) -> _Table:
    return _Table(path, columns)


def _row(
    path: str, group: int, place: int, columns: Columns, name: str, folders: tuple[str, ...]
) -> dict[str, Any]:
    """A row's sample. A recipe."""
    wanted = tuple(dict.fromkeys(columns.places.values()))
    return columns.sample(_table(path, wanted).row(group, place), name, folders)


def _split_of(path: Path, root: Path) -> str:
    """`train` for `data/train-00000-of-00004.parquet`, `default/train/0000.parquet`, `train/data-0.arrow`."""
    parts = [re.split(r"[-.]", path.name)[0], *reversed(path.relative_to(root).parts[:-1])]
    return next((part for part in parts if _SPLIT.fullmatch(part)), "")


def _files(source: str, split: str) -> list[Path]:
    """The files of a source and a split, in order."""
    files: list[Path] = []
    for name in several(source):
        path = existing(name, "datasets folder")
        if path.is_file():
            files.append(path)
            continue
        found = sorted(path.rglob("*.parquet")) or [
            file for file in sorted(path.rglob("*.arrow")) if not file.name.startswith("cache-")
        ]
        if not found:
            raise UserError(f"{name} is not a datasets folder: it holds no .parquet or .arrow files")
        splits = {file: _split_of(file, path) for file in found}
        known = ", ".join(sorted({each or "(unnamed)" for each in splits.values()}))
        if split:
            found = [file for file in found if splits[file] == split]
            if not found:
                raise UserError(f"{name} has no split '{split}': it has {known}")
        elif len(set(splits.values())) > 1:
            raise UserError(f"{name} holds several splits ({known}): say which, as in split=train")
        files += found
    return files


def convert(
    conversion: Conversion,
    *,
    source: str,
    split: str = "",
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
) -> Iterator[Recipe | dict[str, Any]]:
    """Samples of whatever the rows have, in the order of the files.

    Args:
        source: a folder with parquet files at any depth, one that `save_to_disk` wrote, a file, or several
            joined by `::`.
        split: which of the folder's splits; needed if it has more than one.
        images: the folder of images that are named and not contained, or several joined by `::`.
        image, caption, captions, question, answer, answers, messages, text, kind, lang, id: as for
            csv_jsonl; a column of images is found whatever it is called. Numbers of classes become
            their names.
        separator: as for csv_jsonl.
    """
    given: Mapping[str, str] = {
        "image": image, "caption": caption, "captions": captions, "question": question, "answer": answer,
        "answers": answers, "messages": messages, "text": text, "kind": kind, "lang": lang, "id": id,
    }  # fmt: skip
    named = tuple(str(folder) for folder in ImageFolders(images).folders) if images else ()
    tables = []
    for path in _files(source, split):
        table = _Table(os.fspath(path.absolute()), ())
        columns = dict(given)
        if not image and "image" not in Columns.of(given, table.schema.names, str(path), strict=False).places:
            columns["image"] = _image_column(table.schema)
        places = Columns.of(columns, table.schema.names, str(path), separator)
        tables.append((table.path, table.sizes, places))
    conversion.total = sum(sum(sizes) for _, sizes, _ in tables)
    count = 0
    for file, sizes, places in tables:
        for group, size in enumerate(sizes):
            for place in range(size):
                key = f"{count:08d}"
                count += 1
                recipe = Recipe(key, _row, (file, group, place, places, key, named))
                if conversion.shuffled:  # a row far from the last one would cost its whole group
                    yield from _now(recipe, conversion)
                else:
                    yield recipe


def _now(recipe: Recipe, conversion: Conversion) -> Iterator[dict[str, Any]]:
    """The sample itself, read here and now."""
    try:
        members = dict(recipe.function(*recipe.arguments))
    except BadSample as error:
        conversion.lose(recipe.key, error)
        return
    for part, reason in members.pop(LOST, []):
        conversion.lose(f"{recipe.key} ({part})", reason)
    yield {"__key__": recipe.key, **members}
