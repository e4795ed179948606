"""The teacher of a distilled model: another checkpoint, or the base itself, kept outside the engine.

Knows how to load it, and whether a student can learn from it; the formulas are in
objectives/distillation.py. A teacher is in evaluation mode, has no gradients and is whole on every rank,
whatever the student's ZeRO stage.

    a checkpoint    reads images and words by its own tower, connector and language
    base            each part beside its dense self, as `model` of the run names it: the tower reads the same
                    images, the language reads the student's own image tokens (its connector has learned
                    nothing). For bases made smaller, as by PELA.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_adapt.config.schema import Run, Train
from vlm_adapt.errors import UserError
from vlm_adapt.models.locate import find_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_adapt.data.collate import Batch
    from vlm_adapt.models.build import Assembled
    from vlm_adapt.models.vlm import VisionLanguageModel

BASE = "base"


@dataclass
class Teacher:
    """A model to learn from, and how much of it counts. No module: nobody counts, moves or shards it.

    Attributes:
        model: frozen, in evaluation mode.
        settings: weights and temperature.
        compares: whose features: `connector`, `vision`, or "" for none.
        own_tokens: whether it reads images by its own tower and connector, or the student's image tokens.
        notes: what a user should know of it.
    """

    model: VisionLanguageModel
    settings: Train
    compares: str
    own_tokens: bool
    notes: list[str] = field(default_factory=list)

    def sees(self, batch: Batch, tokens: Tensor) -> tuple[Any, Tensor]:
        """(features to compare with the student's, or None; the image tokens that its language reads).

        Args:
            tokens: the student's.
        """
        features = None
        if self.own_tokens or self.compares == "vision":
            features = self.model.seen(batch.images)
        if self.own_tokens:
            tokens = self.model.connector(features)
        compared = {"vision": features, "connector": tokens, "": None}[self.compares]
        return compared, tokens.detach()


def check_teacher(train: Train, look: bool = True) -> None:
    """Whether a stage's teacher is named where one is wanted, and there.

    Args:
        look: whether its checkpoint must be there.

    Raises:
        UserError: it is not.
    """
    if train.objective != "distillation":
        if train.teacher is not None:
            raise UserError(
                f"train.teacher is for train.objective 'distillation', and this one is '{train.objective}'"
            )
        return
    if train.teacher is None:
        raise UserError(
            "train.objective 'distillation' needs train.teacher: a checkpoint, a run's output_dir, or 'base'"
        )
    if train.distill_weight == 0 and train.feature_weight == 0:
        raise UserError(
            "train.objective 'distillation' takes nothing from its teacher: distill_weight and "
            "feature_weight are both 0"
        )
    if train.teacher == BASE and train.distill_features == "connector":
        raise UserError("train.teacher 'base' has no trained connector: set distill_features to 'vision'")
    if look and train.teacher != BASE:
        find_checkpoint(train.teacher)


def make_teacher(assembled: Assembled, run: Run) -> Teacher | None:
    """The teacher of a stage, on the CPU; None where the stage has none.

    Args:
        assembled: the student, adapted.
        run: the stage's.

    Raises:
        UserError: no such checkpoint, or it reads other words or images than the student.
    """
    train = run.train
    check_teacher(train)
    if train.teacher is None:
        return None
    from vlm_adapt.models.build import build
    from vlm_adapt.models.feature_cache import FeatureCache
    from vlm_adapt.models.restore import restore

    own = train.teacher != BASE
    made = (
        restore(train.teacher, assembled.dtype)[0]
        if own
        else build(run.language_model, assembled.dtype, run.seed)
    )
    model = made.model.requires_grad_(False).eval()
    if train.cache_features:
        model.feature_cache = FeatureCache(train.cache_features)
    _check_fits(assembled, made, train, own)
    wanted = train.distill_features or ("connector" if own else "vision")
    notes = []
    reason = "feature_weight is 0" if not train.feature_weight else _differ(assembled, made, wanted)
    if reason:
        notes.append(f"features are not compared: {reason}")
        if not train.distill_weight:
            raise UserError(
                f"train.teacher '{train.teacher}' teaches nothing: {reason}, and distill_weight is 0"
            )
    what = [f"logits at temperature {train.temperature:g}"] if train.distill_weight else []
    what += [] if reason else [f"features of '{wanted}'"]
    notes.insert(0, f"teacher {train.teacher}: {' and '.join(what)}")
    return Teacher(model, train, "" if reason else wanted, own, notes)


def _check_fits(student: Assembled, teacher: Assembled, train: Train, own: bool) -> None:
    """Raise UserError unless the teacher can read the student's batches."""
    ours, its = student.model.vision.image_spec, teacher.model.vision.image_spec
    pairs: list[tuple[str, Any, Any]] = [("images of this size", ours.size, its.size)]
    if train.distill_weight:
        mine, theirs = student.encoder.prompt_tokens, teacher.encoder.prompt_tokens
        pairs.append(("places for prompts in every text", mine, theirs))
    if (ours.native is None) != (its.native is None) or ours.native != its.native and train.distill_weight:
        pairs.append(("images of native sizes", ours.native, its.native))
    if train.distill_weight and own:
        pairs += [
            ("tokens an image", student.encoder.tokens_per_image, teacher.encoder.tokens_per_image),
            ("numbers in a state vector", student.config.state_size, teacher.config.state_size),
            ("encoder-decoder", student.encoder.seq2seq, teacher.encoder.seq2seq),
        ]
    if train.distill_weight and not own and student.config.state_size:
        raise UserError(
            "train.teacher 'base' cannot read state vectors: its projector has learned nothing; give a "
            "checkpoint as teacher, or set distill_weight to 0"
        )
    for what, mine, theirs in pairs:
        if mine != theirs:
            raise UserError(
                f"train.teacher '{train.teacher}' cannot teach this model: {what} differ, {theirs} there and "
                f"{mine} here"
            )
    if train.distill_weight and student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise UserError(
            f"train.teacher '{train.teacher}' cannot teach this model: its tokenizer has other words "
            f"({len(teacher.tokenizer):,}, here {len(student.tokenizer):,}); choose one of the same family, "
            "or set distill_weight to 0"
        )


def _differ(student: Assembled, teacher: Assembled, wanted: str) -> str:
    """Why features cannot be compared, or would teach nothing; "" where they can."""
    ours, its = student.model, teacher.model
    parts = [ours.vision, *([ours.connector] if wanted == "connector" else [])]
    if not any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        return f"nothing before '{wanted}' features trains"
    mine: Any
    theirs: Any
    if wanted == "connector":
        mine = (student.encoder.tokens_per_image, ours.language.width)
        theirs = (teacher.encoder.tokens_per_image, its.language.width)
    else:
        mine, theirs = (
            tuple(zip(model.vision.grids(model.layers), model.vision.widths(model.layers), strict=True))
            for model in (ours, its)
        )
    return "" if mine == theirs else f"the teacher's '{wanted}' features have shape {theirs} and ours {mine}"
