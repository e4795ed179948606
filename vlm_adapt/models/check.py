"""What of a run can be told to be wrong before anything heavy is imported or loaded.

Knows the families' tables, and the settings of an entry by its source (about.py); knows nothing about
what the settings mean. A misspelt name is thus answered at once, not after a model
has been loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlm_adapt import weights
from vlm_adapt.adapt import METHODS
from vlm_adapt.choices import Choices, nearest
from vlm_adapt.config.schema import Run, Vision
from vlm_adapt.connectors import CONNECTORS
from vlm_adapt.data.shards import expand
from vlm_adapt.errors import UserError
from vlm_adapt.metrics import METRICS
from vlm_adapt.models import CHECKS
from vlm_adapt.models.about import settings_of
from vlm_adapt.models.locate import LATEST, find_checkpoint
from vlm_adapt.models.objectives import OBJECTIVES
from vlm_adapt.models.start import check_starts
from vlm_adapt.models.teacher import check_teacher
from vlm_adapt.vision import library_of

# What each kind of model makes of a sample.
TASKS_OF = Choices(
    "kind of model",
    {
        "vision_language": "vlm_adapt.data.tasks.task:make_task",
        "segmenter": "vlm_adapt.data.tasks.masks:make_masks",
        "promptable": "vlm_adapt.data.tasks.prompted:make_prompts",
    },
)


def check_run(run: Run, train: bool = True, evaluate: bool = True) -> None:
    """Check names and settings of every stage, and whether its shards are there.

    Args:
        train, evaluate: whether the shards that are trained on, and those held out, must be there.

    Raises:
        UserError: an unknown name or setting (the nearest is named), or shards, an adapter or a start that
            are not there.
    """
    check_vision(run.model.vision)
    CHECKS.load(run.model.kind)(run, train)
    stages = run.stage_runs()
    for _, stage in stages:
        for number, line in enumerate(stage.adapt):
            check_settings(METHODS, line.method, line.options, f"adapt.{number}")
        wanted = (*(stage.data.train if train else ()), *(stage.data.evaluate if evaluate else ()))
        for source in wanted:
            TASKS_OF.load(run.model.kind)(source.task)  # reads no more than its vocabulary
            expand(source.shards)
            if source.keep is not None and not Path(source.keep.scores).expanduser().is_file():
                raise UserError(
                    f"keep: there is no file '{source.keep.scores}'; `vlm-adapt scores CHECKPOINT` writes it"
                )
    if train and not (Path(run.output_dir) / LATEST).is_file():  # a run that goes on needs no start
        if run.adapter is not None:
            find_checkpoint(run.adapter)
        check_starts([stage.adapt for _, stage in stages])


def check_vision_language(run: Run, train: bool) -> None:
    """What only models that answer in words have."""
    model = run.language_model
    check_package(model.language.weights)
    check_package(model.language.model)
    check_settings(CONNECTORS, model.connector.name, model.connector.options, "model.connector")
    if model.masks is not None:
        check_package(model.masks.decoder.weights)
        if model.masks.vision is not None:
            check_vision(model.masks.vision)
    for _, stage in run.stage_runs():
        OBJECTIVES.check(stage.train.objective)
        if stage.train.objective == "masks" and model.masks is None:
            raise UserError("train.objective 'masks' needs a model that draws them: give model.masks")
        check_teacher(stage.train, look=train)
        for name in stage.evaluate.metrics:
            METRICS.check(name)


def check_vision(vision: Vision) -> None:
    """A tower's name, and the package of its weights."""
    library_of(vision.model)
    check_package(vision.weights)


def check_package(named: str) -> None:
    """If this names a package, whether there is such a one."""
    if named.startswith("package:"):
        weights.PACKAGES.check(named.removeprefix("package:"))


def check_settings(table: Choices, name: str, given: Iterable[str], where: str) -> None:
    """Whether an entry of a table takes these settings, by its source alone."""
    known, is_open = settings_of(table[table.check(name)])
    for key in given:
        if key not in known and not is_open:
            raise UserError(
                f"{where}: {table.family} '{name}' has no setting '{key}'"
                f"{nearest(key, known) or ':'} known are {', '.join(known)}"
            )
        if key not in known:
            from vlm_adapt.adapt.method import make_method  # asks the library behind it: slow, and rare

            make_method(table, name, {key: None})
