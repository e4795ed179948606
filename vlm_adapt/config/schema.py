"""What a run is, as frozen, validated words. Knows names, types and defaults; knows nothing of torch.

The words are the Hugging Face Trainer's wherever it has one. An unknown key is an error that names
the nearest known one; sections that carry a part's own settings (connector, adapt) are checked by
that part, against its own signature.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vlm_adapt.config.models import (
    AnyModel,
    Connector,
    Decoder,
    Head,
    Language,
    Masks,
    Model,
    OpenSection,
    Promptable,
    Section,
    Segmenter,
    TextEncoder,
    Vision,
)
from vlm_adapt.errors import UserError


class Adapt(OpenSection):
    """One line of the adaptation plan; further keys are the method's own settings."""

    method: str
    where: Literal["vision", "connector", "language", "masks"]
    blocks: int | str | tuple[int, ...] | None = Field(
        None, description='only these: a number, a list, or a slice such as "-4:"'
    )
    start: str | None = Field(None, description="a checkpoint whose module of this method it begins from")
    learning_rate: float | None = Field(None, gt=0)


class Task(OpenSection):
    """A transform of samples, from the table of tasks; further keys are the task's own settings."""

    name: str


class Keep(Section):
    """Which samples stay, by their scores: those between two quantiles."""

    scores: str = Field(description="the file that `vlm-adapt scores` wrote")
    by: str = Field("el2n", description="which of its scores")
    lowest: float = Field(0.0, ge=0, le=1, description="quantile below which samples are left out")
    highest: float = Field(1.0, ge=0, le=1, description="quantile above which samples are left out")

    @model_validator(mode="after")
    def _ordered(self) -> Keep:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest} must be below highest {self.highest}")
        return self


class Source(Section):
    """Shards, and how their samples are phrased."""

    shards: str | tuple[str, ...]
    name: str | None = Field(None, description="what the journal calls it")
    weight: float = Field(
        1.0, gt=0, description="how often each sample comes in an epoch, or the share (data.mixing)"
    )
    limit: int | None = Field(None, gt=0, description="only the first so many samples")
    task: Task | None = Field(None, description="what is made of each sample")
    keep: Keep | None = Field(None, description="only samples whose scores lie in a range")
    max_refused: float | None = Field(
        None, ge=0, le=1, description="share of this source's bad samples that stops the run"
    )
    prompt: str = Field("Describe the image.", description="asked of samples that hold captions")
    questions_per_image: int | None = Field(
        None, gt=0, description="of several questions on an image, how many are drawn an epoch"
    )
    questions_per_kind: dict[str, int] | None = Field(
        None, description="how many of each kind are drawn an epoch; kinds not named are not drawn"
    )


class Augment(Section):
    """How an image and its mask vary in training: scaled, cropped to the tower's size, mirrored."""

    scale: tuple[float, float] = Field((0.5, 2.0), description="drawn from this range, 1 is fitting")
    crop: bool = Field(True, description="a part of the tower's size; else squashed to it")
    flip: bool = True
    jitter: float = Field(0.0, ge=0, le=1, description="of brightness, contrast and colour, as a share")

    @field_validator("scale")
    @classmethod
    def _range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("it is [smallest, largest], both above 0")
        return value


class Data(Section):
    """What is trained on and what is held out."""

    train: tuple[Source, ...] = ()
    evaluate: tuple[Source, ...] = ()
    workers: int = Field(0, ge=0)
    lanes: int | None = Field(
        None, gt=0, description="parts that the order is made of; None is 64, fewer for small packed sets"
    )
    shuffle: bool = True
    shuffle_window: int | None = Field(
        None, gt=0, description="shuffle so many samples of a lane at a time; None: all, remote shards 4096"
    )
    mixing: Literal["size", "weight"] = Field(
        "size", description="a source's share: its size times its weight, or its weight alone"
    )
    epoch_ends: Literal["first", "last"] = Field(
        "last", description="with mixing by weight: when the first, or the last source was seen whole"
    )
    epoch_samples: int | None = Field(
        None, gt=0, description="an epoch has so many samples, in the same shares"
    )
    batching: Literal["padded", "bucketed", "packed"] = Field(
        "padded", description="a sample a row; rows of like length together; or several samples a row"
    )
    row_length: int | None = Field(None, gt=8, description="tokens of a packed row; None is max_length")
    max_pixels: int = Field(100_000_000, gt=0, description="larger images are refused")
    max_refused: float = Field(0.1, ge=0, le=1, description="share of bad samples that stops the run")
    max_refused_in_a_row: int = Field(
        200, gt=0, description="bad samples one after another, of a source and rank, that stop the run"
    )
    cache_dir: str | None = Field(None, description="keeps indexes, and what was read of remote shards")
    cache_gb: float = Field(50.0, ge=0, description="the most it may take; the least used goes first")

    augment: Augment | None = Field(
        Augment(), description="how images with masks vary in training; null: as in evaluation"
    )

    @field_validator("train", "evaluate", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str | dict) else value
        return [{"shards": item} if isinstance(item, str) else item for item in value or ()]


class Train(Section):
    """One stage's optimisation. Rates are per step of the optimizer."""

    objective: str = Field(
        "language", description="what is minimised: language; embedding to warm up; distillation of a teacher"
    )
    teacher: str | None = Field(None, description="to distil: a checkpoint, a run's output_dir, or `base`")
    temperature: float = Field(2.0, gt=0, description="of both logits in distillation")
    language_weight: float = Field(1.0, ge=0, description="in distillation: of the loss on the data's words")
    distill_weight: float = Field(1.0, ge=0, description="of T^2 KL(teacher || student)")
    feature_weight: float = Field(1.0, ge=0, description="of the mean square of the features' difference")
    distill_features: Literal["connector", "vision"] | None = Field(
        None, description="which features; None is the connector's, beside `base` the tower's"
    )
    cross_entropy_weight: float = Field(2.0, ge=0, description="of a mask's binary cross-entropy in chat")
    dice_weight: float = Field(0.5, ge=0, description="of a mask's dice loss in chat")
    cache_features: int = Field(0, ge=0, description="images whose features a frozen tower keeps in memory")
    per_device_train_batch_size: int = Field(8, gt=0, description="rows a process and microbatch")
    gradient_accumulation_steps: int = Field(1, gt=0)
    max_steps: int = Field(0, ge=0, description="0 leaves it to num_train_epochs")
    num_train_epochs: float = Field(1.0, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler_type: Literal["cosine", "linear", "polynomial", "constant"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    warmup_steps: int = Field(0, ge=0, description="takes precedence over warmup_ratio when above 0")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 does not clip")
    bf16: bool | Literal["auto"] = "auto"
    gradient_checkpointing: bool = False
    deepspeed: str = Field("zero2", description="zero0..zero3[_offload], or a JSON file")
    save_steps: int = Field(500, ge=0, description="0 saves at the end only")
    save_total_limit: int = Field(2, gt=0)
    eval_steps: int = Field(0, ge=0, description="0 evaluates at the end only")
    logging_steps: int = Field(1, gt=0)
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()


class Evaluate(Section):
    """Generation and scores on the held-out sources."""

    batch_size: int = Field(32, gt=0)
    max_new_tokens: int = Field(32, gt=0)
    metrics: tuple[str, ...] = ("exact_match",)
    loss: bool = Field(True, description="also the held-out loss of the references")
    blind: bool = Field(False, description="also score each sample with another sample's image")
    best_metric: str = Field("loss", description="the best checkpoint is kept by this; dots reach inside")
    greater_is_better: bool = False
    limit: int | None = Field(None, gt=0, description="samples used by evaluations inside training")
    unseen: tuple[str, ...] = Field((), description="labels whose scores are given apart (zero-shot)")
    handicap: float = Field(
        0.0, ge=0, description="taken off the logits of labels that are not unseen (calibrated stacking)"
    )
    window: Literal["sliding", "whole"] = Field("sliding", description="how large images are segmented")
    base_size: int | None = Field(None, gt=0, description="long side before windows; None: fits the tower")
    scales: tuple[Annotated[float, Field(ge=0.05, le=16, allow_inf_nan=False)], ...] = Field(
        (1.0,), min_length=1, description="sizes whose answers are averaged"
    )
    flip: bool = Field(False, description="also mirrored")

    @model_validator(mode="after")
    def _handicap_favours_some(self) -> Evaluate:
        if self.handicap and not self.unseen:
            raise ValueError("handicap favours unseen labels: name them in evaluate.unseen")
        return self


class Stage(Section):
    """What differs from the run in one stage; its methods add to those of the stages before."""

    name: str
    adapt: tuple[Adapt, ...] | None = None
    data: dict[str, Any] = {}
    train: dict[str, Any] = {}


class Run(Section):
    """Everything that determines a run; saved beside every checkpoint."""

    output_dir: str
    seed: int = 0
    model: AnyModel
    adapt: tuple[Adapt, ...] = (Adapt(method="full", where="connector"),)
    adapter: str | None = Field(
        None, description="an adapter or checkpoint to build on: lines that `adapt` repeats go on training"
    )
    data: Data = Data()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    stages: tuple[Stage, ...] = ()

    @model_validator(mode="after")
    def _stages_are_valid(self) -> Run:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stages need different names")
        self.stage_runs()
        return self

    @property
    def language_model(self) -> Model:
        """The model, where a verb is about words.

        Raises:
            UserError: it is of another kind.
        """
        if not isinstance(self.model, Model):
            raise UserError(
                f"this is for models that answer in words, and model.kind is '{self.model.kind}': choose a "
                "checkpoint of a vision-language model"
            )
        return self.model

    def stage_runs(self) -> list[tuple[str, Run]]:
        """The run of each stage, by name: this run with the stage's differences written in."""
        if not self.stages:
            return [("train", self)]
        runs = []
        for stage in self.stages:
            merged = self.model_dump(exclude={"stages"})
            merged["data"] |= stage.data
            merged["train"] |= stage.train
            if stage.adapt is not None:
                merged["adapt"] = [line.model_dump() for line in stage.adapt]
            try:
                runs.append((stage.name, Run.model_validate(merged)))
            except ValueError as error:
                raise StageError(stage.name, error) from error
        return runs


class StageError(ValueError):
    """A stage's differences do not fit; carries pydantic's own error for the loader to word."""

    def __init__(self, name: str, error: ValueError):
        self.name, self.error = name, error
        super().__init__(f"stage '{name}': {error}")


__all__ = [
    "Adapt", "AnyModel", "Augment", "Connector", "Data", "Decoder", "Evaluate", "Head", "Keep", "Language",
    "Masks", "Model", "OpenSection", "Promptable", "Run", "Section", "Segmenter", "Source", "Stage",
    "StageError", "Task", "TextEncoder", "Train", "Vision",
]  # fmt: skip
