"""Where a part's weights come from (`hub:`, `file:`, `random:`), and files of tensors, read as data alone.

Knows sources and files; knows nothing about any architecture, nor how a `package:` is fetched (the caller
turns that into a folder or a `file:`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


def parse_source(weights: str, whose: str) -> Source:
    """`hub:TAG`, `file:PATH` or `random:SEED` as a Source.

    Args:
        whose: what the weights are of, for messages.

    Raises:
        UserError: another kind, a file that is not there, or a seed that is not a number.
    """
    kind, colon, value = weights.partition(":")
    if not colon or kind not in ("hub", "file", "random"):
        raise UserError(
            f"unknown weight source '{weights}' for a {whose}: "
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
            f"'{path}' is no readable weight file ({first_line(error)}): fetch it again"
        ) from error
    except Exception as error:  # pickle.UnpicklingError and what it wraps: never load such a file in full
        raise UserError(
            f"'{path}' holds more than plain tensors and is not loaded: convert it to safetensors"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"'{path}' is no dictionary of tensors: save the model's state_dict as safetensors")
    return state


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, on one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".:")
