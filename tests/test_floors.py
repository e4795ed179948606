"""The law of the house: a room imports only from floors below, never sideways, never in a circle."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "vlm_adapt"
MOST_LINES = 300
FLOORS = [
    set("__init__ attention errors exits quiet choices sentence template image_spec dist config".split())
    | {"folders", "tensor_files"},
    set("vision language text connectors heads adapt data metrics weights".split()),
    {"models"},
    set("train evaluate chat export report segment".split()),
    {"cli", "__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(HOUSE.rglob("*.py"))
}


def room_of(module: str) -> str:
    """`vlm_adapt.data.encode` is in the room data."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(module: str, path: Path) -> set[str]:
    """Modules of the house that a module imports, anywhere in it, and those its Choices tables name."""
    found: set[str] = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from vlm_adapt import weights` imports a module, `from x.y import name` usually does not
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.partition(":")[0])  # "vlm_adapt.vision.timm:build"
    return {name for name in found if name in MODULES and name != module}


IMPORTS = {module: imports_of(module, path) for module, path in MODULES.items()}


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} <= set(FLOOR_OF)


def test_imports_go_down() -> None:
    """Neighbours of floor 1 do not know each other; on other floors they may, in one direction."""
    wrong, rooms = [], set()
    for module, imported in IMPORTS.items():
        for other in imported:
            here, there = room_of(module), room_of(other)
            if here == there or there == "__init__":
                continue
            rooms.add((here, there))
            beside = FLOOR_OF[here] == FLOOR_OF[there] != 1
            if FLOOR_OF[there] >= FLOOR_OF[here] and not beside:
                wrong.append(f"{module} imports {other}")
    assert not wrong
    assert not [f"{here} and {there} import each other" for here, there in rooms if (there, here) in rooms]


def test_no_circles() -> None:
    """Between modules, those named in tables aside: a table is read when it is asked."""
    state: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> None:
        if state.get(module) == 2:
            return
        assert state.get(module) != 1, " -> ".join([*path, module])
        state[module] = 1
        for other in IMPORTS[module]:
            if not (MODULES[module].name == "__init__.py" and other.startswith(module + ".")):
                visit(other, [*path, module])
        state[module] = 2

    for module in MODULES:
        visit(module, [])


@pytest.mark.parametrize("folder", ["vlm_adapt", "tests", "scripts"])
def test_files_are_short(folder: str) -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


def test_files_say_what_they_are() -> None:
    assert not [module for module, path in MODULES.items() if not _docstring(path)]


def _docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


TABLES = ("adapt", "connectors", "language", "metrics", "vision", "weights")
LIGHT = ("cli", "config.load", "dist", "template", *TABLES)


def test_the_command_line_imports_no_torch() -> None:
    """`--help` and a mistake in the configuration are answered at once."""
    names = ", ".join(f"vlm_adapt.{name}" for name in LIGHT)
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, {names}; print(*({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
