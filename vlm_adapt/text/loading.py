"""Where a text encoder's weights come from, and what is said when they do not fit.

Knows `hub:`, `file:` and `random:` and files of tensors; knows nothing about any architecture, nor how a
`package:` is fetched (the caller turns that into a folder or a `file:`).
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

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
    source = Source(kind, value)
    if not colon or kind not in ("hub", "file", "random"):
        raise UserError(
            f"unknown weight source '{weights}' for a text encoder: say hub:, hub:TAG, file:PATH, random: or "
            "random:SEED"
        )
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
    except pickle.UnpicklingError as error:  # never load such a file in full
        raise UserError(
            f"'{path}' holds more than plain tensors and is not loaded: convert it to safetensors"
        ) from error
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(
            f"'{path}' is no readable weight file ({first_line(error)}): fetch it again"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"'{path}' is no dictionary of tensors: save the model's state_dict as safetensors")
    return state


def complain(where: str, missing: Iterable[str], unexpected: Iterable[str], shapes: Iterable[str]) -> None:
    """Raise UserError if any list holds a name."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    parts = []
    for what, names in kinds:
        listed = sorted(names)
        if listed:
            more = f" and {len(listed) - 4} more" if len(listed) > 4 else ""
            parts.append(f"{len(listed)} {what} ({', '.join(listed[:4])}{more})")
    if parts:
        raise UserError(
            f"the weights in '{where}' do not fit the text encoder: {'; '.join(parts)}; give the weights of "
            "this very architecture"
        )


def unreachable(model: str, error: BaseException) -> UserError:
    """What to say when a library could not get `model` from a folder or its hub."""
    if Path(model.removeprefix("hf:").removeprefix("open_clip:local-dir:")).is_dir():
        return UserError(f"the folder '{model}' holds no usable text encoder: {first_line(error)}")
    return UserError(
        f"cannot get the text encoder '{model}' ({first_line(error)}): check the name and the connection, or "
        "give weights: file:PATH, a local folder, or 'package:NAME' (vlm-adapt weights list)"
    )


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, on one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".:")
