"""What is asked for masks: a trained checkpoint, or a model as its packages bring it, without any run.

Knows names of the second kind (`package:mobile-sam`, a configuration file); checkpoints are
models/restore.py's. The functions that only look import no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

UNTRAINED: dict[str, dict[str, Any]] = {
    "package:mobile-sam": {
        "kind": "promptable",
        "vision": {
            "model": "timm:tiny_vit_5m_224",
            "weights": "package:mobile-sam-tinyvit",
            "image_size": 1024,
            "options": {"last_stride": 1},
        },
        "decoder": {"weights": "package:mobile-sam-tinyvit"},
    }
}


class Opened(NamedTuple):
    """A model ready to be asked."""

    assembled: Any
    max_pixels: int | None


def locate(checkpoint: str | Path) -> str | Path:
    """The checkpoint folder that a path means, or the path itself where it names an untrained model.

    Raises:
        UserError: neither.
    """
    name = str(checkpoint)
    if name in UNTRAINED or _is_file(name):
        return name
    if name.startswith("package:"):
        raise UserError(
            f"'{name}' is no model{nearest(name, UNTRAINED) or ':'} known are {', '.join(UNTRAINED)}, a "
            "checkpoint folder, or a configuration file"
        )
    from vlm_adapt.models.locate import find_checkpoint

    return find_checkpoint(checkpoint)


def config_of(checkpoint: str | Path) -> Any:
    """The section `model` of a checkpoint, of a configuration file or of an untrained model.

    Raises:
        UserError: it cannot be read, or has no such section.
    """
    from pydantic import TypeAdapter

    from vlm_adapt.config.models import AnyModel

    name = str(checkpoint)
    if name in UNTRAINED:
        return TypeAdapter(AnyModel).validate_python(UNTRAINED[name])
    if _is_file(name):
        return _run(name).model
    from vlm_adapt.models.restore import read_checkpoint

    run, _ = read_checkpoint(Path(checkpoint))
    return run.model


def load(checkpoint: str | Path) -> Opened:
    """The model, frozen and in evaluation mode.

    Raises:
        UserError: a part of it cannot be had.
    """
    name = str(checkpoint)
    if name in UNTRAINED or _is_file(name):
        from vlm_adapt.models.build import build, compute_dtype

        told = None if name in UNTRAINED else _run(name)
        bf16, seed = ("auto", 0) if told is None else (told.train.bf16, told.seed)
        assembled = build(config_of(name), compute_dtype(bf16), seed)
        assembled.model.requires_grad_(False).eval()
        return Opened(assembled, None if told is None else told.data.max_pixels)
    from vlm_adapt.models.restore import restore_any

    assembled, run, _ = restore_any(checkpoint)
    return Opened(assembled, run.data.max_pixels)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _run(name: str) -> Any:
    """The run that a configuration file describes."""
    from vlm_adapt.config.load import read_yaml, validate

    return validate(read_yaml(Path(name).expanduser()), name)
