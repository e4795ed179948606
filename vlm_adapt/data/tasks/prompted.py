"""What a promptable model learns from: which masks of a sample, and how many prompts of which kind.

Knows settings; knows nothing about pixels, files or models. Used by SAM (Kirillov et al. 2023, arXiv
2304.02643, appendix A): points and boxes drawn from the masks, as often the one as the other.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from vlm_adapt.choices import Choices, nearest
from vlm_adapt.config import schema
from vlm_adapt.data.tasks import MASK_TASKS, TASKS
from vlm_adapt.data.tasks.task import SETTINGS, from_settings
from vlm_adapt.errors import UserError

PROMPT_TASKS = Choices("task of prompts", {"prompts": "vlm_adapt.data.tasks.prompted:Prompts"})
# In the order in which a model runs them. `point`: one inside; `points`: three, the first inside; `mask`: a
# coarse mask and a point where it is wrong; `text`: a label, or an expression that refers to an object.
KINDS = ("point", "points", "box", "mask", "text")


@dataclass(frozen=True, config=SETTINGS)
class Prompts:
    """Masks of a sample, each with a prompt.

    Attributes:
        masks_per_image: the most masks that are drawn from a sample an epoch.
        kinds: how often each kind of prompt comes, as shares of any sum.
        masks: `objects` are binary masks of objects and referring expressions, `components` the connected
            regions of each label of a semantic mask, `labels` its labels' whole regions; `auto` takes objects
            where a sample has some, else components.
        smallest: share of the image that a mask covers at least; smaller ones are left out.
        box_noise: deviation of a box's sides from the mask's, as a share of its width and height.
        box_noise_pixels: the most a side is moved, in pixels of the square that the model sees.
    """

    masks_per_image: Annotated[int, Field(gt=0)] = 8
    kinds: dict[str, float] = Field(
        default_factory=lambda: {"point": 2.0, "points": 1.0, "box": 2.0, "mask": 1.0}
    )
    masks: Literal["auto", "objects", "components", "labels"] = "auto"
    smallest: Annotated[float, Field(ge=0, lt=1)] = 0.0005
    box_noise: Annotated[float, Field(ge=0)] = 0.1
    box_noise_pixels: Annotated[float, Field(ge=0)] = 20.0

    name: ClassVar[str] = "prompts"

    def __post_init__(self) -> None:
        for kind, share in self.kinds.items():
            if kind not in KINDS:
                raise UserError(
                    f"task 'prompts' knows no kind '{kind}'{nearest(kind, KINDS) or ':'} known are "
                    f"{', '.join(KINDS)}"
                )
            if not (math.isfinite(share) and share >= 0):
                raise UserError(
                    f"the share of kind '{kind}' of task 'prompts' is a number from 0, not {share}"
                )
        if not sum(self.kinds.values()):
            raise UserError("task 'prompts' draws no prompt: give one of its kinds a share above 0")


def make_prompts(settings: schema.Task | None) -> Prompts:
    """The task of a promptable model's source; without one the default prompts are drawn.

    Raises:
        UserError: another task, an unknown setting (the nearest is named), or a value that does not fit.
    """
    if settings is None:
        return Prompts()
    if settings.name in TASKS or settings.name in MASK_TASKS:
        raise UserError(
            f"task '{settings.name}' is for models of another kind, and a promptable model learns from masks "
            "with prompts: its task is 'prompts'"
        )
    made: Prompts = from_settings(settings, PROMPT_TASKS)
    return made
