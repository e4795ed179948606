"""Loading the vision side of a transformers checkpoint, and reading what images it wants.

Knows transformers' configurations, files and loading reports; knows nothing about running a model.
"""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import MODEL_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import (
    CLIP_MEAN,
    CLIP_STD,
    HALF_MEAN,
    HALF_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageSpec,
)
from vlm_adapt.tensor_files import Source, read_state
from vlm_adapt.vision.loading import complain, note_left_out, unreachable

# Weights of a checkpoint that a tower of patch features has no use for.
LEFT_OUT = (
    *("text_", "logit_", "visual_projection", "head.", "pooler.", "classifier", "decoder.", "lm_head"),
    *("prompt_encoder.", "mask_decoder.", "shared_image_embedding."),  # of SAM
)
INTERPOLATIONS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
log = logging.getLogger(__name__)


def load_model(name: str, source: Source) -> tuple[Any, list[str]]:
    """The vision model of a hub name or folder in float32, and notes on weights left out.

    Raises:
        UserError: nothing there, no vision side, or weights that do not fit.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise unreachable(f"hf:{name}", error) from error
    config = getattr(config, "vision_config", config)
    if type(config) not in MODEL_MAPPING:
        raise UserError(f"'{name}' ({config.model_type}) has no vision model in transformers: choose another")
    model_class: Any = MODEL_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
    if getattr(model_class, "main_input_name", "") != "pixel_values":
        raise UserError(
            f"'{name}' is a {config.model_type} model, which sees no images: choose a vision model"
        )
    options: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(model_class.__init__).parameters:
        options["add_pooling_layer"] = False
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    if source.kind == "random":
        return model_class._from_config(config, dtype=torch.float32, **options), []
    path: str | None = name
    if source.kind == "file":
        path = str(source.path)
        if source.path.is_file():
            path, options["state_dict"] = None, read_state(source.path)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what was left out is told by the notes, in one line
    try:
        model, report = model_class.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            revision=(source.value or "main") if source.kind == "hub" else "main",
            **options,
        )
    except (SafetensorError, RuntimeError) as error:
        shown = str(error).strip().splitlines()[0][:300]
        raise UserError(f"the weights of '{path or source.path}' do not fit the tower: {shown}") from error
    except (OSError, ValueError) as error:
        raise unreachable(f"hf:{path or source.path}", error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    where = path or str(source.path)
    unexpected = sorted(report["unexpected_keys"])
    left_out = [key for key in unexpected if key.removeprefix("vision_model.").startswith(LEFT_OUT)]
    # A mask token is for pretraining only: features never read it.
    missing = [key for key in report["missing_keys"] if not key.endswith("mask_token")]
    shapes = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"]]
    complain(where, sorted(missing), sorted(set(unexpected) - set(left_out)), shapes)
    return model, note_left_out(where, left_out)


def image_spec_of(name: str, config: PretrainedConfig, offline: bool = False) -> ImageSpec:
    """What images a checkpoint wants, by its preprocessor_config.json or else by its family's habit.

    Args:
        offline: do not look for the file on the hub.
    """
    given = _preprocessor(name, offline)
    side = getattr(config, "image_size", None) or 224
    kind = config.model_type
    if "siglip" in kind:
        default = ImageSpec(_pair(side), HALF_MEAN, HALF_STD, "squash", "bicubic")
    elif "clip" in kind:
        default = ImageSpec(_pair(side), CLIP_MEAN, CLIP_STD, "crop", "bicubic")
    elif kind in ("vit", "beit", "deit"):
        default = ImageSpec(_pair(side), HALF_MEAN, HALF_STD, "squash", "bilinear")
    else:
        default = ImageSpec(_pair(side), IMAGENET_MEAN, IMAGENET_STD, "crop", "bicubic")
    if given is None:
        return default
    crop = bool(given.get("do_center_crop"))
    size = given.get("crop_size") if crop else given.get("size")
    size = size if size is not None else given.get("size")
    wanted = _size_of(size) or default.size
    if isinstance(given.get("size"), dict) and "shortest_edge" in given["size"]:
        crop = True  # the shortest side alone is named: the rest can only be cut
    return ImageSpec(
        wanted,
        given.get("image_mean") or default.mean,
        given.get("image_std") or default.std,
        "crop" if crop else "squash",
        INTERPOLATIONS.get(given.get("resample", -1), default.interpolation),
    )


def _preprocessor(name: str, offline: bool) -> dict[str, Any] | None:
    """The image processor's settings, or None where there are none."""
    path: str | Path | None
    for filename in ("preprocessor_config.json", "processor_config.json"):
        if Path(name).is_dir():
            path = Path(name) / filename if (Path(name) / filename).is_file() else None
        else:
            try:
                path = cached_file(
                    name, filename, local_files_only=offline, _raise_exceptions_for_missing_entries=False
                )
            except OSError as error:
                log.warning("no %s of '%s' (%s): the family's usual images are taken", filename, name, error)
                path = None
        if path is not None:
            try:
                settings = json.loads(Path(path).read_text())
            except ValueError as error:
                raise UserError(f"'{path}' is not JSON ({error}): fetch the model again") from error
            settings = settings.get("image_processor", settings)
            if "image_mean" in settings or "size" in settings:
                return settings
    return None


def _size_of(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict):
        if "height" in size:
            return int(size["height"]), int(size["width"])
        if "shortest_edge" in size:
            return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None


def _pair(side: Any) -> tuple[int, int]:
    return (int(side), int(side)) if isinstance(side, int) else (int(side[0]), int(side[1]))
