"""What is said when a text encoder's weights cannot be had or do not fit.

Knows names and wording; where files come from is tensor_files.py's. Knows nothing about any architecture.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlm_adapt.errors import UserError
from vlm_adapt.tensor_files import first_line


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
