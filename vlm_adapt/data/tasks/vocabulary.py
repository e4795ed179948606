"""Names of objects, and those of them that an image does not show.

Knows lists of names and files of them; knows nothing about images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlm_adapt.data.problems import BadSample
from vlm_adapt.errors import UserError

Vocabulary = str | tuple[str, ...] | None


@lru_cache(maxsize=16)
def names_of(vocabulary: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of a vocabulary, each once, whatever its capitals.

    Args:
        vocabulary: names, or a text file with one a line.

    Raises:
        UserError: the file cannot be read, or there are no names.
    """
    if isinstance(vocabulary, str):
        try:
            lines = Path(vocabulary).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"vocabulary '{vocabulary}' is no text file with a name a line") from error
    else:
        lines = list(vocabulary)
    names = _unique(lines)
    if not names:
        raise UserError("vocabulary has no names in it")
    return names


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple({name.strip().casefold(): name.strip() for name in names if name.strip()}.values())


def vocabulary_of(vocabulary: Vocabulary, record: dict[str, Any]) -> tuple[str, ...]:
    """The names that a sample's objects could have: the setting's, else the sample's own `labels`.

    Raises:
        BadSample: there are neither.
    """
    if vocabulary is not None:
        return names_of(vocabulary)
    if "labels" not in record:
        raise BadSample("no names to draw absent objects from: give the task a vocabulary, or samples labels")
    return _unique(record["labels"])


def absent(
    names: Sequence[str], present: Iterable[str], count: int, generator: np.random.Generator
) -> list[str]:
    """Draw names that are not present; fewer than `count` where there are no more."""
    taken = {name.casefold() for name in present}
    # Of so many different names at most len(taken) are present: the rest is enough, and a uniform draw.
    drawn = generator.choice(len(names), min(len(names), count + len(taken)), replace=False)
    return [names[place] for place in drawn.tolist() if names[place].casefold() not in taken][:count]


def labels_in(record: dict[str, Any]) -> list[str]:
    """The different labels of a record's objects, in order of their first one."""
    return list(dict.fromkeys(entry["label"] for entry in record["objects"]))
