"""From a YAML file and `key=value` overrides to a Run, or to one clear sentence.

Knows files, dotted keys and wording; knows nothing about what the values mean.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from vlm_adapt.choices import nearest
from vlm_adapt.config.models import KINDS
from vlm_adapt.config.schema import Run, StageError
from vlm_adapt.errors import UserError

BRANCHES = ("float", "int", "str")
HERE = "${folder}"  # of the file itself: a merged model names its parts by it, and may be moved


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read a run.

    Args:
        path: a YAML file.
        overrides: `a.b.c=value` with YAML values; list items by number (`adapt.0.r=8`).

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the nearest one is named), or a
            value does not fit.
    """
    tree = read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    return validate(tree, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, with `$VARIABLES` of the environment and its own `${folder}` filled in."""
    path = Path(path)
    if not path.is_file():
        near = nearest(
            path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        )
        raise UserError(f"there is no config file '{path}'{near}")
    try:
        text = path.read_text(encoding="utf-8").replace(HERE, str(path.parent.absolute()))
        tree = yaml.safe_load(os.path.expandvars(text))
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not a text file ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise UserError(f"'{path}' is not valid YAML{line}: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"'{path}' holds {type(tree).__name__}, and must hold keys and values")
    return tree


def validate(tree: dict[str, Any], where: str) -> Run:
    """A Run from plain values; `where` names their origin in messages."""
    try:
        return Run.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(error, Run)}") from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is not an override: write key=value, as in train.max_steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value of '{override}' is not valid YAML") from error
    if isinstance(value, dict) and not text.lstrip().startswith("{"):
        value = text  # `weights=random:` means the word, not a mapping
    node: Any = tree
    *parents, last = key.split(".")
    for name in parents:
        if isinstance(node, list):
            node = node[_position(node, name, key)]
        else:
            if not isinstance(node.get(name), dict | list):
                node[name] = {}
            node = node[name]
    if isinstance(node, list):
        node[_position(node, last, key)] = value
    else:
        node[last] = value


def _position(items: list[Any], name: str, key: str) -> int:
    if not name.isdigit() or int(name) >= len(items):
        raise UserError(f"'{key}': '{name}' must be a number below {len(items)}, the length of that list")
    return int(name)


def _sentence(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors(include_url=False)[0]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, StageError) and isinstance(inner.error, ValidationError):
        return f"stage '{inner.name}': {_sentence(inner.error, model)}"
    # Branches of a union are part of the place, and nothing that the user wrote.
    keys = [part for part in first["loc"] if not (isinstance(part, str) and "[" in part)]
    said = [part for place, part in enumerate(keys) if not (place and part in (*KINDS, *BRANCHES))]
    dotted = ".".join(str(part) for part in said)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"].startswith("union_tag"):
        tree = first["input"]
        given = str(tree.get("kind") if isinstance(tree, dict) else tree)
        return (
            f"'{dotted}.kind' is {given!r}{nearest(given, KINDS) or ':'} known are {', '.join(KINDS)}{more}"
        )
    if first["type"] == "extra_forbidden":
        known = _fields(model, keys[:-1])
        hint = nearest(str(keys[-1]), known) or ": known are " + ", ".join(known)
        return f"unknown key '{dotted}'{hint}{more}"
    if first["type"] == "missing":
        return f"'{dotted}' is missing{more}"
    given = "" if isinstance(first["input"], dict | list | tuple) else f" (it is {first['input']!r})"
    message = first["msg"].removeprefix("Value error, ")
    return f"'{dotted}': {message[0].lower() + message[1:]}{given}{more}" if dotted else message + more


def _fields(model: type[BaseModel], keys: Sequence[Any]) -> list[str]:
    """The names known at a place of the tree, following lists and optional values."""
    for key in keys:
        if key in KINDS:
            model = KINDS[key]
        if isinstance(key, int) or key not in model.model_fields:
            continue
        model = next(_models(model.model_fields[key].annotation), model)
    return list(model.model_fields)


def _models(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def dump(run: Run) -> str:
    """The run as YAML, every default written out."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


__all__ = ["Run", "dump", "load_run", "read_yaml", "validate"]
