"""Strict loading of a file's tensors into a tower, and what is said when they do not fit.

Knows names and shapes; where the file comes from is tensor_files.py's. Knows nothing about any architecture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from vlm_adapt.errors import UserError
from vlm_adapt.tensor_files import first_line


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
        f"cannot get the weights of '{model}' ({first_line(error)}): check the name and the connection, "
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
