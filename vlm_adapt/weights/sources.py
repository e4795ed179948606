"""Where a part's numbers come from: reads `kind:value` and leads it to a path.

Knows the four kinds of source; does not know which library will load the path, or how.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

KINDS = {
    "hub": "left to the library that knows the part (its own hub name or tag)",
    "package": "a package that `vlm-adapt weights list` shows, fetched with pip",
    "file": "a file or folder on this machine",
    "random": "random numbers: the configuration alone",
}
_NEEDS_VALUE = {"package": "weights list shows the names", "file": "write the path after the colon"}


@dataclass(frozen=True)
class Source:
    """A weight source: its kind (`hub`, `package`, `file`, `random`) and what follows the colon."""

    kind: str
    value: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"


def parse(source: str | Source) -> Source:
    """Read `kind:value`, such as `package:smollm2-135m-instruct`, `file:/models/vit` or `random:`.

    Raises:
        UserError: if the kind is unknown, or `package:` or `file:` is followed by nothing.
    """
    if isinstance(source, Source):
        return source
    kind, colon, value = str(source).strip().partition(":")
    if not colon or kind not in KINDS:
        raise UserError(
            f"weight source '{source}' is none of hub:, package:NAME, file:PATH, random:"
            f"{nearest(kind, KINDS) if colon else f'; a hub name is written hub:{kind}, a path file:{kind}'}"
        )
    if kind in _NEEDS_VALUE and not value.strip():
        raise UserError(f"weight source '{source}' names nothing: {_NEEDS_VALUE[kind]}")
    return Source(kind, value.strip())


def resolve(source: str | Source) -> Path | None:
    """The file or folder that a source stands for; None for `hub:` and `random:`.

    A `package:` is fetched and converted on first use (see `vlm_adapt.weights.fetch`) and gives its
    folder in the cache; a `file:` must exist.

    Raises:
        UserError: if the source cannot be read, is not there, or cannot be fetched.
    """
    parsed = parse(source)
    if parsed.kind == "package":
        from vlm_adapt.weights import fetch

        return fetch(parsed.value)
    if parsed.kind == "file":
        path = Path(parsed.value).expanduser()
        if not path.exists():
            raise UserError(f"weight source '{parsed}': there is no file or folder {path.absolute()}")
        return path
    return None


def tensors_file(path: Path) -> Path:
    """The safetensors file that a resolved path stands for: itself, or the one in the folder.

    Raises:
        UserError: if a folder holds no `model.safetensors` and not exactly one `*.safetensors`.
    """
    if not path.is_dir():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise UserError(f"{path} holds no model.safetensors and {len(found)} other safetensors files")
    return found[0]
