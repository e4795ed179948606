"""A model with everything that feeds it, of whatever kind: what training, evaluation, checkpoints ask of it.

Knows plans and what differs between kinds by name; each kind's own file knows how. Knows nothing about
engines, optimizers or files of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_adapt.adapt.plan import Plan, apply_plan
from vlm_adapt.config.schema import Adapt, AnyModel, Data, Run, Source
from vlm_adapt.errors import UserError
from vlm_adapt.models.fingerprint import Fingerprint


@dataclass
class AssembledModel:
    """A model and what turns samples into its input.

    The model is an `nn.Module` that maps a batch to (sum of losses, losses of the targets), with `parts()`,
    `vision`, `penalties`, and `set_activation_checkpointing`.

    Attributes:
        dtype: of frozen weights and of the computation.
        plan: what of it trains; None before `adapt`.
        base: marks of the parts as they were before anything was attached.
        stages: the plan's lines, stage by stage, as `adapt` was given them.
    """

    model: Any
    config: AnyModel
    dtype: torch.dtype
    plan: Plan | None = None
    base: Fingerprint | None = None
    stages: Sequence[Sequence[Adapt]] = ()

    def adapt(self, stages: Sequence[Sequence[Adapt]], apart: bool = False) -> Plan:
        """Apply the plan of the stages so far; the last one's methods train.

        Args:
            apart: equal lines of two stages are two methods (stacked adapters), not one that goes on.

        Raises:
            UserError: a method is unknown or does not fit, or names a part that the model does not have.
        """
        self.stages = stages
        self._before_plan(stages)
        parts = self.model.parts()
        for line in (line for stage in stages for line in stage):
            if line.where not in parts:
                raise UserError(
                    f"adapt: this model has no '{line.where}' to put '{line.method}' on: its parts are "
                    f"{', '.join(parts)}"
                )
        self.plan = apply_plan(parts, stages, self.unused(), apart)
        self.model.penalties = [item.method.penalty for item in self.plan.attached if item.trains]
        self._after_plan()
        return self.plan

    def _before_plan(self, stages: Sequence[Sequence[Adapt]]) -> None:
        """What a kind does before the plan's methods are attached."""

    def _after_plan(self) -> None:
        """What a kind does once they are."""

    def unused(self) -> dict[str, set[str]]:
        """By part, dotted names of modules whose parameters get no gradient."""
        return {}

    def reader(self, sources: Sequence[Source], seed: int, data: Data) -> Any:
        """Samples of these sources, ready for this model (see data/samples.py)."""
        raise TypeError(f"{type(self).__name__} does not say how samples are read")

    @property
    def collate(self) -> Callable[..., Any]:
        """The function that puts rows together to a batch; `collate_options` are its further arguments."""
        raise TypeError(f"{type(self).__name__} does not say how rows are put together")

    @property
    def collate_options(self) -> dict[str, Any]:
        """What `collate` needs to know of this model."""
        return {}

    @property
    def longest(self) -> int:
        """Tokens that a text may have; 0 where there are no texts, and so no rows to pack."""
        return 0

    @property
    def objectives(self) -> bool:
        """Whether `train.objective` chooses what is minimised; else the model has one loss of its own."""
        return False

    def prepare(self, reader: Any, plan: Any, run: Run) -> None:
        """What is done once before a stage's first step; every rank does the same."""

    def statistics(self) -> dict[str, Tensor]:
        """What was measured and not trained, by name below `statistics_part`; saved with checkpoints."""
        trained = dict(self.statistics_part.named_parameters())
        return {
            name: value for name, value in self.statistics_part.state_dict().items() if name not in trained
        }

    @property
    def statistics_part(self) -> Any:
        """The module whose buffers are measured: the connector."""
        return self.model.connector

    @property
    def notes(self) -> list[str]:
        """What a user should know of how the parts were made: weights left out, layers not applied."""
        parts = [*self.model.parts().values(), getattr(self.model, "mask_vision", None)]
        return [note for part in parts for note in getattr(part, "notes", ())]

    @property
    def thumbnails(self) -> bool:
        """Whether an evaluation keeps small pictures of the samples beside its predictions."""
        return False

    def save_words(self, folder: Path) -> None:
        """Save what turns words into numbers (a tokenizer), where the kind has one of its own."""
