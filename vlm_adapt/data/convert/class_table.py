"""Tables of classes: names with the index or the colour that they have in a mask.

Knows the files in which such tables come (text, CSV, JSON, YAML); knows nothing about masks' files.

    text    a line each: `name index`, `index name`, `name r g b`, `r g b name` or `name` alone, whose
            index is its line; spaces, tabs, commas and a colon part them; `#` begins a comment
    CSV     the same columns, or a header that names them: name, index, or name, r, g, b
    JSON, YAML   names in a list; {name: index}, {index: name} or {name: [r, g, b]}; a list of
            {"name", "index" or "id"} or {"name", "color"}; each also under "classes", "names" or "labels"
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_adapt.choices import nearest
from vlm_adapt.data.convert.common import existing
from vlm_adapt.errors import UserError

IGNORED = -1
Colour = tuple[int, int, int]
Value = int | Colour
_NAMES = ("name", "label", "class", "class_name")
_VALUES = (("r", "g", "b"), ("red", "green", "blue"), ("index",), ("id",), ("value",), ("class_id",))
_HEADER = {*_NAMES, *(word for words in _VALUES for word in words)}


@dataclass(frozen=True)
class ClassTable:
    """What the values or colours of a mask mean.

    Attributes:
        labels: index = value in our mask, "" where there is none.
        lookup: index or colour in the source's mask -> value in ours, or IGNORED.
        coloured: whether the source's masks hold colours.
    """

    labels: list[str]
    lookup: dict[Value, int]
    coloured: bool


def _value(numbers: Any) -> Value:
    """An index, or a colour of three."""
    found = [int(number) for number in (numbers if isinstance(numbers, list | tuple) else [numbers])]
    if len(found) == 1 and 0 <= found[0] < 65535:
        return found[0]
    if len(found) == 3 and all(0 <= number < 256 for number in found):
        return found[0], found[1], found[2]
    raise ValueError(f"{numbers} is neither an index nor a colour")


def _from_words(words: list[str], line: int) -> tuple[str, Value]:
    """A name with the numbers that stand before or after it."""
    count = len(words)
    before = next((place for place, word in enumerate(words) if not word.isdigit()), count)
    after = next((place for place, word in enumerate(reversed(words)) if not word.isdigit()), count)
    if before == count or (before and after):
        raise ValueError(f"'{' '.join(words)}' is not one name and its numbers: write CSV with a header")
    name = " ".join(words[before : count - after])
    numbers = words[:before] or words[count - after :]
    return name, _value(numbers) if numbers else line


def _from_rows(rows: list[list[str]]) -> list[tuple[str, Value]]:
    header = [word.lower() for word in rows[0]]
    name = next((header.index(word) for word in _NAMES if word in header), None)
    columns = next((words for words in _VALUES if set(words) <= set(header)), None)
    if name is None or (columns is None and len(header) > 1):
        return [_from_words([word for word in row if word], place) for place, row in enumerate(rows)]
    entries: list[tuple[str, Value]] = []
    for place, row in enumerate(rows[1:]):
        value = place if columns is None else _value([row[header.index(word)] for word in columns])
        entries.append((row[name], value))
    return entries


def _from_data(content: Any) -> list[tuple[str, Value]]:
    if isinstance(content, Mapping):
        inner = next((content[key] for key in ("classes", "names", "labels") if key in content), None)
        if isinstance(inner, list | Mapping):
            return _from_data(inner)
        pairs = content.items()
        if all(isinstance(value, str) for value in content.values()):
            return [(name, _value(number)) for number, name in pairs]
        return [(str(name), _value(value)) for name, value in pairs]
    entries: list[tuple[str, Value]] = []
    for place, entry in enumerate(content):
        if isinstance(entry, str):
            entries.append((entry, place))
        else:
            numbers = next(entry[key] for key in ("color", "colour", "index", "id") if key in entry)
            entries.append((str(entry["name"]), _value(numbers)))
    return entries


def _entries(path: Path) -> list[tuple[str, Value]]:
    text = path.read_text(encoding="utf-8-sig")
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _from_data(json.loads(text))
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return _from_data(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    if suffix == ".csv":
        part = max(",;\t", key=text.split("\n", 1)[0].count)
        rows = csv.reader(text.splitlines(), delimiter=part)
        return _from_rows([[word.strip() for word in row] for row in rows if any(row)])
    lines = (line.split("#")[0] for line in text.splitlines())
    split = [words for line in lines if (words := [word for word in re.split(r"[\s,:]+", line) if word])]
    if split and len(split[0]) > 1 and {word.lower() for word in split[0]} <= _HEADER:
        del split[0]
    return [_from_words(words, place) for place, words in enumerate(split)]


def _ignored(words: Iterable[str], entries: list[tuple[str, Value]], coloured: bool) -> set[Value]:
    """The values that names, numbers or colours mean."""
    found: set[Value] = set()
    names = {name for name, _ in entries}
    for word in filter(None, map(str.strip, words)):
        if word in names:
            found |= {value for name, value in entries if name == word}
            continue
        try:
            value = _value(re.split(r"[\s,]+", word))
        except ValueError:
            value = None
        if value is None or isinstance(value, tuple) != coloured:
            wanted = "a colour like 0,0,0" if coloured else "an index"
            raise UserError(f"ignore '{word}' is neither a class nor {wanted}{nearest(word, names)}")
        found.add(value)
    return found


def read_table(path: str, ignore: str = "") -> ClassTable:
    """Read a table of classes.

    Names that stand several times are one class, the first. Indexes are kept as they are, gaps have no
    label; only where 255 or more is an index of fewer than 255 classes (0 and 255, say) are they
    numbered anew, in the order of the table, so that masks stay at 8 bits.

    Args:
        path: the file.
        ignore: names, indexes or colours (`0,0,0`) to ignore, joined by `::`.

    Raises:
        UserError: no such file, or what is wrong in it.
    """
    file = existing(path, "class table")
    try:
        entries = _entries(file)
        if not entries or not all(name for name, _ in entries):
            raise ValueError("it has no classes, or one without a name")
        coloured = isinstance(entries[0][1], tuple)
        if any(isinstance(value, tuple) != coloured for _, value in entries):
            raise ValueError("some classes have an index, some a colour")
        meant: dict[Value, str] = {}
        for name, value in entries:
            if meant.setdefault(value, name) != name:
                raise ValueError(f"{value} is both '{meant[value]}' and '{name}'")
    except (OSError, KeyError, TypeError, AttributeError, IndexError, StopIteration, ValueError) as error:
        raise UserError(f"class table {path} cannot be used: {error}") from error
    ignored = _ignored(ignore.split("::"), entries, coloured)
    kept = {value: name for value, name in meant.items() if value not in ignored}
    if not kept:
        raise UserError(f"class table {path} has no class that is not ignored")
    lookup: dict[Value, int] = dict.fromkeys(ignored, IGNORED)
    indexes = [value for value in kept if isinstance(value, int)]
    if coloured or (max(indexes) >= 255 and len(kept) < 255):
        labels = list(dict.fromkeys(kept.values()))
        lookup |= {value: labels.index(name) for value, name in kept.items()}
        return ClassTable(labels, lookup, coloured)
    first: dict[str, int] = {}
    lookup |= {value: first.setdefault(kept[value], value) for value in indexes}
    labels = [""] * (max(first.values()) + 1)
    for name, index in first.items():
        labels[index] = name
    return ClassTable(labels, lookup, False)
