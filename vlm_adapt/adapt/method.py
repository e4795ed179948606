"""What every adaptation method is: it attaches to a part, names what trains, and saves itself.

Knows parts by their `.blocks`, and parameters by their names; knows nothing about towers, languages
or engines.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

Gathered = Mapping[str, Tensor]


class Method:
    """One line of an adaptation plan, attached to one part.

    A subclass's constructor takes the method's own settings by keyword: its signature is what the
    configuration is checked against.

    Attributes:
        name: the method's name in the table.
        part: what it is attached to.
        parameters: file key -> parameter, filled by `attach`; what the method trains and saves.
    """

    name: str

    def __init__(self) -> None:
        self.part: nn.Module | None = None
        self.parameters: dict[str, nn.Parameter] = {}

    def attach(self, part: nn.Module, unused: set[str]) -> None:
        """Wrap or mark layers of `part`; fill `parameters`.

        Args:
            unused: dotted names of modules of the part whose output the model does not use: nothing
                there gets a gradient, so nothing there is adapted.
        """
        raise AttributeError("a method says how it attaches")

    def save(self, folder: Path, tensors: Gathered) -> None:
        """Write what was trained: `tensors` by the keys of `parameters`, on the CPU."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / self.file_name)

    file_name = "model.safetensors"

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The saved tensors, by the keys of `parameters`.

        Raises:
            UserError: the file is missing, is no safetensors file, or holds other keys or shapes.
        """
        return read_tensors(folder / self.file_name, self.parameters)


def read_tensors(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read a safetensors file that must hold exactly `expected`'s keys.

    Raises:
        UserError: missing file, another format, or other keys (the first few are named).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"there is no '{path}': the checkpoint is not complete")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"'{path}' is cut off or is no safetensors file ({error})") from error
    missing, extra = set(expected) - set(tensors), set(tensors) - set(expected)
    if missing or extra:
        some = ", ".join(sorted(missing or extra)[:3])
        raise UserError(
            f"'{path}' lacks {len(missing)} and has {len(extra)} unknown tensors ({some}): "
            "it belongs to another model or plan"
        )
    return tensors


def make_method(table: Any, name: str, options: dict[str, Any]) -> Method:
    """A method of the table with its own settings.

    Raises:
        UserError: unknown method, or a setting that its constructor does not take.
    """
    kind = table.load(name)
    known = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "settings")]
    known += list(getattr(kind, "extra_settings", lambda: [])())
    for key in options:
        if key not in known:
            raise UserError(
                f"adapt: method '{name}' has no setting '{key}'"
                f"{nearest(key, known) or ': known are ' + ', '.join(known)}"
            )
    return kind(**options)
