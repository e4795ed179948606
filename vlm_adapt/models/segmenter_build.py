"""From a configuration to a segmenter with everything that feeds it.

Knows which part comes from where; knows nothing about training or files of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_adapt import dist
from vlm_adapt.config import schema
from vlm_adapt.config.schema import Adapt, Data, Source
from vlm_adapt.data.mask_batch import MaskBatch, collate_masks
from vlm_adapt.data.mask_reader import MaskReader
from vlm_adapt.errors import UserError
from vlm_adapt.heads import build_head
from vlm_adapt.heads.regularisation import Regularisation
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.build import vision_tower
from vlm_adapt.models.fingerprint import marks, own_marks
from vlm_adapt.models.segmenter import Segmenter, SegmenterHead, Temperature
from vlm_adapt.models.texts import text_encoder
from vlm_adapt.quiet import quiet
from vlm_adapt.text.labels import LabelEmbeddings


@dataclass(kw_only=True)
class AssembledSegmenter(AssembledModel):
    """A segmenter and what turns samples into its input."""

    model: Segmenter
    config: schema.Segmenter

    def _before_plan(self, stages: Sequence[Sequence[Adapt]]) -> None:
        if any(line.where == "language" for stage in stages for line in stage):
            self.model.train_text()

    def _after_plan(self) -> None:
        self.model.labels.forget()  # the encoder may answer otherwise now

    def unused(self) -> dict[str, set[str]]:
        """Blocks behind the deepest layer that the head reads, and what the parts name themselves."""
        model = self.model
        return {
            "vision": set(model.vision.unused_modules(model.layers)),
            "connector": set(model.connector.unused_modules()),
            "language": set(model.labels.encoder.unused_modules()),
        }

    def reader(self, sources: Sequence[Source], seed: int, data: Data) -> MaskReader:
        """See AssembledModel."""
        return MaskReader(sources, self.model.image_spec, seed, data)

    @property
    def collate(self) -> Callable[..., MaskBatch]:
        """See AssembledModel."""
        return collate_masks

    @property
    def collate_options(self) -> dict[str, Any]:
        """See AssembledModel."""
        return {"image_size": self.model.image_spec.size}

    def prepare(self, reader: Any, plan: Any, run: schema.Run) -> None:
        """Put the text encoder, which no engine moves while it is frozen, where the model will be."""
        self.model.labels.encoder.to(dist.device())
        self.model.labels.to(dist.device())


@quiet()
def build(
    config: schema.Segmenter,
    dtype: torch.dtype,
    seed: int = 0,
    tokenizer_folder: Path | None = None,
    empty: bool = False,
) -> AssembledSegmenter:
    """Tower, dense head and text encoder; arguments as `models.build.build_vision_language`.

    Raises:
        UserError: a part cannot be found or built, or the tower's images are of native sizes.
    """
    place = torch.device("meta") if empty else nullcontext()
    with place:
        tower = vision_tower(config.vision, dtype, empty)
    if tower.image_spec.native is not None:
        raise UserError(
            "a segmenter needs images of one size: leave model.vision.options.native out, and large images "
            "are read in windows"
        )
    encoder = text_encoder(config.text, torch.float32, empty)  # runs once a label: nothing is saved by less
    torch.manual_seed(seed)
    layers = config.vision.layers
    with place:
        head = SegmenterHead(
            build_head(
                config.head.name,
                tower.widths(layers),
                tower.grids(layers),
                encoder.width,
                tower.has_class_token,
                **config.head.options,
            ),
            _regularisation(config.head),
            Temperature(config.temperature),
        )
    labels = LabelEmbeddings(encoder, config.text.templates)
    head.head.to(dtype)  # the rest is eleven numbers: a temperature in bfloat16 would begin at 14.24
    model = Segmenter(tower, head, labels, layers).eval()
    plain = {
        "name": config.head.name,
        "options": config.head.options,
        "layers": list(tower.resolve(layers)),
        "regularisation": config.head.regularisation,
        "temperature": config.temperature,
    }
    base = {
        "vision": marks(tower, config.vision.model, config.vision.weights),
        "connector": own_marks(head, config.head.name, plain),
        "language": marks(encoder, config.text.model, config.text.weights),
    }
    return AssembledSegmenter(model=model, config=config, dtype=dtype, base=base)


def _regularisation(head: schema.Head) -> Regularisation | None:
    if head.regularisation == "none":
        return None
    return Regularisation(head.regularisation, head.regularisation_depth, head.regularisation_activation)
