"""Where a tower's weights come from, and strict loading of a file into a module.

Knows `hub:`, `file:` and `random:` and safetensors; knows nothing about any architecture, nor how a
`package:` is fetched (the caller turns that into a `file:`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vlm_adapt.errors import UserError


@dataclass(frozen=True)
class Source:
    """A parsed weight source: `kind` is hub, file or random; `value` is what followed the colon."""

    kind: str
    value: str = ""

    @property
    def path(self) -> Path:
        """The file or folder of a `file:` source."""
        return Path(self.value).expanduser()


def parse_source(weights: str) -> Source:
    """`hub:TAG`, `file:PATH` or `random:SEED` as a Source.

    Raises:
        UserError: another kind, a file that is not there, or a seed that is not a number.
    """
    kind, colon, value = weights.partition(":")
    if not colon or kind not in ("hub", "file", "random"):
        raise UserError(
            f"unknown weight source '{weights}' for a vision tower: "
            f"say hub:, hub:TAG, file:PATH, random: or random:SEED"
        )
    source = Source(kind, value)
    if kind == "file" and not (value and source.path.exists()):
        raise UserError(f"the weight file '{value}' does not exist: check the path after 'file:'")
    if kind == "random" and value and not value.isdigit():
        raise UserError(f"'{weights}' needs a whole number after 'random:', or nothing")
    return source


@contextlib.contextmanager
def seeded(source: Source) -> Iterator[None]:
    """Draw from the seed of `random:SEED` inside, and leave the caller's generator untouched."""
    if source.kind != "random" or not source.value:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(source.value))
        yield


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of the one weight file in a folder.

    Raises:
        UserError: no weight file, several of them, or one that cannot be read as plain tensors.
    """
    if path.is_dir():
        found = sorted(path.glob("*.safetensors")) or sorted([*path.glob("*.bin"), *path.glob("*.pt")])
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise UserError(f"the folder '{path}' should hold one weight file and has {names}: name the file")
        path = found[0]
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, ImportError) as error:
        raise UserError(
            f"'{path}' is no readable weight file ({_first_line(error)}): fetch it again"
        ) from error
    except Exception as error:  # pickle.UnpicklingError and what it wraps: never load such a file in full
        raise UserError(
            f"'{path}' holds more than plain tensors and is not loaded: convert it to safetensors"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"'{path}' is no dictionary of tensors: save the model's state_dict as safetensors")
    return state


def load_strictly(
    module: nn.Module, state: dict[str, Tensor], where: str, heads: Iterable[str] = ()
) -> list[str]:
    """Load every tensor of `module` from `state`; return the names left out because they are heads.

    Args:
        where: the file, for messages.
        heads: prefixes of names that features never use (a classifier, a pooler).
    Raises:
        UserError: names missing or not expected, or shapes that differ, all listed.
    """
    heads = tuple(heads)
    left_out = sorted(name for name in state if name.startswith(heads)) if heads else []
    own = module.state_dict()
    left_out = [name for name in left_out if name not in own]
    given = {name: value for name, value in state.items() if name not in set(left_out)}
    shapes = [
        f"{name} is {tuple(given[name].shape)} where {tuple(own[name].shape)} is needed"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    complain(where, sorted(set(own) - set(given)), sorted(set(given) - set(own)), shapes)
    module.load_state_dict(given, strict=True)
    return left_out


def complain(
    where: str, missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str] = ()
) -> None:
    """Raise UserError if any list holds a name."""
    parts = [
        f"{len(names)} {what} ({_some(names)})"
        for what, names in (
            ("missing", list(missing)),
            ("unexpected", list(unexpected)),
            ("of another shape", list(shapes)),
        )
        if names
    ]
    if parts:
        raise UserError(
            f"the weights in '{where}' do not fit the tower: {'; '.join(parts)}; "
            f"give the weights of this very architecture and image size"
        )


def unreachable(model: str, error: BaseException) -> UserError:
    """What to say when a library could not get `model` from its hub."""
    return UserError(
        f"cannot get the weights of '{model}' ({_first_line(error)}): check the name and the connection, "
        f"or give weights: file:PATH, a local folder as the model, or weights: random: for a test"
    )


def note_left_out(where: str, names: list[str]) -> list[str]:
    """A note on weights that were not used, by the first part of their names, for `Tower.notes`."""
    if not names:
        return []
    parts = Counter(name.removeprefix("vision_model.").partition(".")[0] for name in names)
    shown = ", ".join(f"{part} ({count})" for part, count in sorted(parts.items()))
    return [f"{len(names)} tensors of '{where}' are not part of the tower and were left out: {shown}"]


def _some(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".:")
