"""Vision towers by name: `open_clip:NAME`, `timm:NAME`, `hf:NAME`, `navit:SIZE`, or a local folder.

Knows which library a name belongs to; knows nothing about any architecture. Importing this imports
no torch.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_adapt.choices import Choices, nearest
from vlm_adapt.errors import UserError

if TYPE_CHECKING:
    import torch

    from vlm_adapt.vision.tower import Tower

TOWERS = Choices(
    "vision library",
    {
        "open_clip": "vlm_adapt.vision.openclip:build",
        "timm": "vlm_adapt.vision.timm:build",
        "hf": "vlm_adapt.vision.hf:build",
        "navit": "vlm_adapt.vision.navit:build",
    },
)


def library_of(model: str) -> tuple[str, str]:
    """(library, name) of a tower's name; a folder's library is read off its configuration file.

    Raises:
        UserError: no library in front, an unknown one, or a folder that no library can read.
    """
    library, colon, name = model.partition(":")
    if colon and library in TOWERS and name:
        return library, name
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "open_clip_config.json").is_file():
            return "open_clip", f"local-dir:{folder}"
        try:
            config = json.loads((folder / "config.json").read_text())
        except FileNotFoundError:
            raise UserError(
                f"the folder '{model}' has no config.json and no open_clip_config.json: it is no vision tower"
            ) from None
        except (OSError, ValueError) as error:
            where = folder / "config.json"
            raise UserError(f"'{where}' cannot be read ({error}): save the model again") from error
        return ("timm", f"local-dir:{folder}") if "architecture" in config else ("hf", str(folder))
    if colon and name and "/" not in library:
        TOWERS.check(library)
    raise UserError(
        f"unknown vision tower '{model}': say open_clip:NAME, timm:NAME, hf:NAME or navit:SIZE, "
        "or give a folder"
    )


def build_tower(
    model: str,
    weights: str = "hub:",
    image_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    local_weights: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Tower:
    """A vision tower in evaluation mode.

    Args:
        model: `open_clip:ViT-B-16`, `timm:tiny_vit_5m_224`, `hf:google/siglip-base-patch16-224`, or a
            local folder (the formats of transformers, open_clip and timm).
        weights: `hub:` (the library's own download, or the folder's own weights), `hub:TAG` (the tag
            of open_clip or timm), `file:PATH` (safetensors, or plain tensors in .pt or .bin; a folder
            for hf), `random:` or `random:SEED` (architecture only).
        image_size: side in pixels if not the pretrained one; position embeddings are interpolated.
        dtype: of all weights; default float32.
        local_weights: a file that stands for whatever `weights` names (a package already fetched).
        options: `final_norm` (bool): whether the last layer's features pass the encoder's final norm;
            default as in the library's own output. `fit_windows` (bool, TinyViT only): no padding in the
            attention windows of small images. `last_stride` (1 or 2, TinyViT only): of the last
            downsampling, 1 as MobileSAM has it. `native` (mapping): images keep their own aspect ratio and
            resolution, packed (docs/native_resolution.md). `navit:` has options of its own.
    Raises:
        UserError: unknown names, weights that cannot be had or do not fit, a size of no whole patches.
    """
    library, name = library_of(model)
    if local_weights is not None:
        weights = f"file:{local_weights}"
    build = TOWERS.load(library)
    from vlm_adapt.tensor_files import parse_source, seeded  # these bring torch, so only now
    from vlm_adapt.vision.tower import silence

    source = parse_source(weights, "vision tower")
    known = list(inspect.signature(build).parameters)[3:]
    options = dict(options or {})
    native = None if "native" in known else options.pop("native", None)
    for option in options:
        if option not in known:
            raise UserError(
                f"unknown option '{option}' of '{model}'{nearest(option, known) or ':'} "
                f"known are {', '.join(dict.fromkeys([*known, 'native']))}"
            )
    with seeded(source):
        tower = build(name, source, image_size, **options)
    if native is not None and native is not False:
        from vlm_adapt.vision.navit_hf import make_native

        tower = make_native(tower, native, model, image_size)
    silence(tower)
    return tower.to(dtype).eval() if dtype is not None else tower.float().eval()
