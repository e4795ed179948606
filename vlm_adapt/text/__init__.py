"""Text encoders by name: `open_clip:NAME`, `hf:NAME`, or a local folder: texts to vectors of length 1.

Knows which library a name belongs to; knows nothing about images, masks or how a package is fetched.
Importing this imports no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_adapt.choices import Choices, nearest
from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    import torch

    from vlm_adapt.text.encoder import TextEncoder

TEXTS = Choices(
    "text library",
    {
        "open_clip": "vlm_adapt.text.openclip:build",
        "hf": "vlm_adapt.text.hf:build",
    },
)


def library_of(model: str) -> tuple[str, str]:
    """(library, name) of a text encoder's name; a folder's library is read off its configuration file.

    Raises:
        UserError: no library in front, an unknown one, or a folder that no library can read.
    """
    library, colon, name = model.partition(":")
    if colon and library in TEXTS and name:
        return library, name
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "open_clip_config.json").is_file():
            return "open_clip", f"local-dir:{folder}"
        if not (folder / "config.json").is_file():
            raise UserError(
                f"the folder '{model}' has no config.json and no open_clip_config.json: it is no text encoder"
            )
        return "hf", str(folder)
    if colon and name and "/" not in library:
        TEXTS.check(library)
    raise UserError(f"unknown text encoder '{model}': say open_clip:NAME or hf:NAME, or give a folder")


def build_text(
    model: str,
    weights: str = "hub:",
    dtype: torch.dtype | None = None,
    local_weights: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> TextEncoder:
    """A text encoder in evaluation mode.

    Args:
        model: `open_clip:ViT-B-32`, `hf:sentence-transformers/all-mpnet-base-v2`, or a local folder (the
            formats of transformers and open_clip; a fetched package is a folder).
        weights: `hub:` (the library's own download, or the folder's own weights), `hub:TAG` (open_clip's tag
            or a revision), `file:PATH` (safetensors, or plain tensors in .pt or .bin; a folder for hf),
            `random:` or `random:SEED` (architecture only).
        dtype: of all weights; default float32. What comes out is float32 always.
        local_weights: a file or folder that stands for whatever `weights` names.
        options: `pooling` (hf only): mean, cls, eos or last; default is the family's own.
    Raises:
        UserError: unknown names or options, weights that cannot be had or do not fit, no text model.
    """
    library, name = library_of(model)
    if local_weights is not None:
        weights = f"file:{local_weights}"
    build = TEXTS.load(library)
    from vlm_adapt.tensor_files import parse_source, seeded  # these bring torch, so only now

    source = parse_source(weights, "text encoder")
    known = list(inspect.signature(build).parameters)[2:]
    options = dict(options or {})
    for option in options:
        if option not in known:
            some = f"known: {', '.join(known)}" if known else "it has none"
            raise UserError(f"unknown option '{option}' of '{model}'{nearest(option, known) or f': {some}'}")
    with seeded(source):
        encoder: TextEncoder = build(name, source, **options)
    encoder.name = model
    return (encoder.to(dtype) if dtype is not None else encoder.float()).eval()
