"""What of a run on masks can be told to be wrong before anything heavy is imported or loaded.

Knows the tables of heads and text encoders; the rest is in check.py.
"""

from __future__ import annotations

from vlm_adapt.config.schema import Promptable, Run, Segmenter, TextEncoder
from vlm_adapt.errors import UserError
from vlm_adapt.heads import HEADS
from vlm_adapt.models.check import check_package, check_settings
from vlm_adapt.text import library_of


def check_segmenter(run: Run, train: bool) -> None:
    """Head, depths and text encoder of a segmenter."""
    model = run.model
    assert isinstance(model, Segmenter)
    if len(model.vision.layers) != 4:
        raise UserError(
            f"model.vision.layers has {len(model.vision.layers)} depth(s), and a dense head reads four: give "
            "four, shallow ones first, as in [2, 5, 8, 11]"
        )
    check_settings(HEADS, model.head.name, model.head.options, "model.head")
    _check_text(model.text)
    _check_words(run)


def check_promptable(run: Run, train: bool) -> None:
    """Decoder and text encoder of a promptable model."""
    model = run.model
    assert isinstance(model, Promptable)
    check_package(model.decoder.weights)
    if model.text is not None:
        _check_text(model.text)
    _check_words(run)


def _check_text(text: TextEncoder) -> None:
    check_package(text.model)
    check_package(text.weights)
    if not text.model.startswith("package:"):
        library_of(text.model)
    for template in text.templates:
        if "{}" not in template:
            raise UserError(
                f"model.text.templates: '{template}' has no {{}} where the name goes: write it as in "
                "'a photo of a {}.'"
            )


def _check_words(run: Run) -> None:
    """What only models that answer in words have."""
    for _, stage in run.stage_runs():
        if stage.train.objective != "language" or stage.train.teacher is not None:
            raise UserError(
                f"train.objective and train.teacher are for models that answer in words, and model.kind is "
                f"'{run.model.kind}', which has one loss of its own: leave them out"
            )
    if run.evaluate.blind:
        raise UserError(
            f"evaluate.blind is for models that answer in words, and model.kind is '{run.model.kind}': leave "
            "it out"
        )
