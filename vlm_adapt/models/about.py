"""What a class of a family's table says of itself, read off its source without importing it.

Knows Python's syntax; knows nothing about what settings or constants mean. So a misspelt setting is told,
and a table is listed, before torch is imported.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

# Given by us, not by a configuration.
SUPPLIED = {"self", "widths", "grids", "width_out", "embedding_rms", "embedding_size", "class_token"}


def settings_of(entry: str) -> tuple[list[str], bool]:
    """The settings of a class `"module:Class"`, those of its parents included.

    Returns:
        (names in order, whether it takes others too and hands them to a library)
    """
    kind, parents = _class_of(entry)
    if kind is None:
        return [], False
    names: list[str] = []
    hands_on = False
    for node in kind.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [one.arg for one in arguments if one.arg not in SUPPLIED]
            hands_on = node.args.kwarg is not None
    inherited: list[str] = []
    passed_on = False
    for parent in parents:
        theirs, more = settings_of(parent)
        inherited, passed_on = inherited + theirs, passed_on or more
    own_init = any(isinstance(node, ast.FunctionDef) and node.name == "__init__" for node in kind.body)
    if own_init and not hands_on:
        return names, False
    # What `**more` takes goes to the parents where they have settings, else to a library.
    return list(dict.fromkeys(names + inherited)), passed_on or (hands_on and not inherited)


def constants_of(entry: str) -> dict[str, Any]:
    """The plain values that a class `"module:Class"` and its parents assign in their bodies."""
    kind, parents = _class_of(entry)
    found: dict[str, Any] = {}
    for parent in reversed(parents):
        found |= constants_of(parent)
    for node in kind.body if kind else ():
        if isinstance(node, ast.Assign):
            targets, value = node.targets, node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets, value = [node.target], node.value
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name):
                try:
                    found[target.id] = ast.literal_eval(value)
                except ValueError:
                    continue  # made of something else than literals
    return found


def _class_of(entry: str) -> tuple[ast.ClassDef | None, list[str]]:
    """A class's syntax, and its parents as `"module:Class"`; None for what is no class of the house."""
    module, _, name = entry.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None, []
    tree = _parsed(spec.origin)
    kind = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if kind is None:
        return None, []
    homes = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vlm_adapt.")
        for alias in node.names
    }
    bases = [base.id for base in kind.bases if isinstance(base, ast.Name)]
    return kind, [homes.get(base, f"{module}:{base}") for base in bases]


@functools.cache
def _parsed(path: str) -> ast.Module:
    """A source file's syntax: many classes of a table stand in one file, and share parents."""
    return ast.parse(Path(path).read_text(encoding="utf-8"))
