"""Prompts with fields in braces: checked at the start, filled for each sample.

Knows how fields are written; knows nothing about what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from string import Formatter
from typing import Any

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError


def check_prompt(setting: str, prompt: str, known: Sequence[str], required: Sequence[str] = ()) -> None:
    """Check a prompt's fields.

    Args:
        setting: the prompt's name, for messages.
        known: the fields that it may have; `{{` and `}}` are braces themselves.
        required: the fields that it must have.

    Raises:
        UserError: an unknown field (the nearest is named), a missing one, or braces that do not pair.
    """
    try:
        pieces = list(Formatter().parse(prompt))
    except ValueError as error:
        raise UserError(f"{setting} '{prompt}' cannot be read: {error} (braces are written {{{{)") from error
    for _, field, form, conversion in pieces:
        if field is None:
            continue
        if field not in known or form or conversion:
            raise UserError(
                f"{setting} '{prompt}' has no field '{{{field}}}'"
                f"{nearest(field, known) or ': known are ' + ', '.join(known)}"
            )
    for field in required:
        if field not in fields_of(prompt):
            raise UserError(f"{setting} '{prompt}' lacks the field '{{{field}}}'")


@lru_cache(maxsize=1024)
def fields_of(prompt: str) -> frozenset[str]:
    """The names of a prompt's fields."""
    return frozenset(field for _, field, _, _ in Formatter().parse(prompt) if field is not None)


def fill(prompt: str, values: Mapping[str, Any]) -> str:
    """A prompt with its fields' values; braces in values stay as they are."""
    return prompt.format_map(values).strip()
