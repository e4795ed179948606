"""A vision tower in its own library's format, so that the library and a configuration can load it.

Knows where each library keeps weights that a tower leaves out; knows nothing about adapters. What is written
is built again and compared: a tower that cannot be had back exactly is not written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vlm_adapt import weights
from vlm_adapt.config.schema import Vision
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.tensor_files import Source, parse_source, read_state
from vlm_adapt.vision import build_tower, library_of
from vlm_adapt.vision.tower import Tower

FILE = "model.safetensors"
PIL_NUMBERS = {"lanczos": 1, "bilinear": 2, "bicubic": 3}


def save_tower(tower: Tower, config: Vision, folder: Path, dtype: torch.dtype) -> dict[str, str] | None:
    """Write a tower whose weights have changed.

    Returns:
        `model` and `weights` for model.vision; None where the library's format cannot hold this tower
        (positions fitted to another image size, images of native size, a norm taken off).
    """
    library, name = library_of(config.model)
    if library not in SAVERS or config.options.get("native") or config.weights.startswith("random:"):
        return None
    folder.mkdir(parents=True)
    try:
        words = SAVERS[library](tower, config, name, _source(config), folder, dtype)
        if words is not None and _comes_back(tower, config, words, dtype):
            return words
    except UserError:
        pass  # the library cannot read it: it is kept another way
    shutil.rmtree(folder)
    return None


def _source(config: Vision) -> Source:
    if config.weights.startswith(("package:", "file:")):
        return Source("file", str(weights.resolve(config.weights)))
    return parse_source(config.weights, "vision tower")


def _hf(
    tower: Any, config: Vision, name: str, source: Source, folder: Path, dtype: torch.dtype
) -> dict[str, str] | None:
    from vlm_adapt.vision.hf_load import load_model

    whole, _ = load_model(name, source)  # with the norms and heads that a tower takes off
    if not _fill(whole.state_dict(), tower.model.state_dict()):
        return None
    whole.to(dtype).save_pretrained(folder)
    _write_image_spec(tower.image_spec, folder / "preprocessor_config.json")
    return {"model": str(folder), "weights": "hub:"}


def _timm(
    tower: Any, config: Vision, name: str, source: Source, folder: Path, dtype: torch.dtype
) -> dict[str, str] | None:
    _save(dict(tower.trunk.state_dict()), folder, dtype)
    return {"model": config.model, "weights": f"file:{folder / FILE}"}


def _open_clip(
    tower: Any, config: Vision, name: str, source: Source, folder: Path, dtype: torch.dtype
) -> dict[str, str] | None:
    if not hasattr(tower, "visual"):
        return None
    if source.kind == "file":
        whole = read_state(weights.tensors_file(source.path))
        seen = {name: value for name, value in whole.items() if name.startswith("visual.")} or whole
        whole = {name.removeprefix("visual."): value for name, value in seen.items()}
    else:
        import open_clip

        made: Any = open_clip.create_model(name, pretrained=source.value or None, pretrained_text=False)
        whole = dict(made.visual.state_dict())
    if not _fill(whole, tower.visual.state_dict()):
        return None
    _save(whole, folder, dtype)
    return {"model": config.model, "weights": f"file:{folder / FILE}"}


SAVERS: dict[str, Callable[[Any, Vision, str, Source, Path, torch.dtype], dict[str, str] | None]] = {
    "hf": _hf,
    "timm": _timm,
    "open_clip": _open_clip,
}


@torch.no_grad()
def _fill(whole: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Copy a tower's tensors over a whole model's; False where names or shapes differ."""
    if any(key not in whole or whole[key].shape != value.shape for key, value in own.items()):
        return False
    for key, value in own.items():
        whole[key].copy_(value)
    return True


def _save(tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype) -> None:
    # Norms and biases are small, and batch norms stay in float32 wherever they are loaded.
    plain = {k: v.to(dtype) if v.is_floating_point() and v.ndim > 1 else v for k, v in tensors.items()}
    save_file({key: value.cpu().contiguous().clone() for key, value in plain.items()}, folder / FILE)


def _write_image_spec(spec: ImageSpec, path: Path) -> None:
    size = {"height": spec.size[0], "width": spec.size[1]}
    words: dict[str, Any] = {
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": PIL_NUMBERS[spec.interpolation],
        "do_center_crop": spec.resize == "crop",
        "size": size,
    }
    words |= {"crop_size": size} if spec.resize == "crop" else {}
    path.write_text(json.dumps(words, indent=1), encoding="utf-8")


@torch.no_grad()
def _comes_back(tower: Tower, config: Vision, words: dict[str, str], dtype: torch.dtype) -> bool:
    """Whether what was written gives this very tower."""
    path = Path(words["weights"].removeprefix("file:")) if words["weights"] != "hub:" else None
    again = build_tower(words["model"], words["weights"], config.image_size, None, path, config.options)
    ours, theirs = tower.state_dict(), again.state_dict()
    same = again.image_spec == tower.image_spec and ours.keys() == theirs.keys()
    return same and all(
        torch.equal(value.float(), theirs[key].float())
        or torch.equal(value.to(dtype).float(), theirs[key].float())
        for key, value in ours.items()
        if value.is_floating_point()
    )
