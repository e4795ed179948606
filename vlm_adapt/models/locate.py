"""Which checkpoint folder a path means. Knows names of files only; imports no torch."""

from __future__ import annotations

from pathlib import Path

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

LATEST = "latest"


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the `best`, else `latest`, of a run's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path).expanduser()
    if (path / "state.json").is_file():
        return path
    for pointer in ("best", LATEST):
        if (path / pointer).is_file():
            target = path / (path / pointer).read_text(encoding="utf-8").strip()
            if (target / "state.json").is_file():
                return target
            raise UserError(f"'{path / pointer}' names '{target.name}', which is not there or not complete")
    if not path.exists():
        beside = [str(path.parent / p.name) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"there is no checkpoint '{path}'{nearest(str(path), beside)}")
    raise UserError(f"'{path}' holds no checkpoint: give a run's output_dir or one of its checkpoint folders")
