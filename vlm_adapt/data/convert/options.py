"""The options of converters: their names, types and defaults, and what a conversion is known by.

Knows the signature of a converter's function; knows nothing about what its options mean.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_adapt.choices import nearest
from vlm_adapt.data.convert import CONVERTERS
from vlm_adapt.errors import UserError

FORMAT = 2  # part of the fingerprint: raise it when a converter would write something else
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The options of a converter by name; a parameter without a default is required."""
    parameters = inspect.signature(CONVERTERS.load(name)).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their types and defaults; UserError for an unknown, missing or unusable one."""
    known = options_of(name)
    for option in given:
        if option not in known:
            raise UserError(
                f"converter '{name}' has no option '{option}'{nearest(option, known) or ':'} "
                f"it has {', '.join(known)}"
            )
    checked: dict[str, Any] = {}
    for option, parameter in known.items():
        if option not in given:
            if parameter.default is inspect.Parameter.empty:
                raise UserError(f"converter '{name}' needs the option '{option}': {option}=...")
            checked[option] = parameter.default
            continue
        value = given[option]
        if isinstance(parameter.default, bool) and not isinstance(value, bool):
            if str(value).lower() not in _WORDS:
                raise UserError(f"option '{option}' of converter '{name}' is '{value}': say true or false")
            checked[option] = _WORDS[str(value).lower()]
        else:
            checked[option] = value if isinstance(value, bool) else str(value)
    return checked


def fingerprint(name: str, options: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    """16 letters that differ when the shards would: converter, options, limits, state of the sources."""
    sources = {}
    for value in options.values():
        for part in str(value).split("::"):
            path = Path(part).expanduser()
            if part and path.exists():
                status = path.stat()
                sources[str(path.resolve())] = (status.st_size, status.st_mtime_ns)
    words = json.dumps([FORMAT, name, dict(options), dict(limits), sources], sort_keys=True)
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()
