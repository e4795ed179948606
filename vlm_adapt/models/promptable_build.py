"""From a configuration to a promptable model with everything that feeds it.

Knows which part comes from where; knows nothing about training or files of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlm_adapt import dist, weights
from vlm_adapt.choices import nearest
from vlm_adapt.config.models import Decoder
from vlm_adapt.config.models import Promptable as PromptableConfig
from vlm_adapt.config.schema import Adapt, Data, Run, Source
from vlm_adapt.errors import UserError
from vlm_adapt.heads import sam_weights
from vlm_adapt.heads.sam import SamDecoder, decoder_options
from vlm_adapt.heads.sam_neck import SamNeck
from vlm_adapt.heads.sam_words import WordPrompt
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.build import vision_tower
from vlm_adapt.models.fingerprint import marks, own_marks
from vlm_adapt.models.promptable import Promptable, PromptConnector
from vlm_adapt.models.texts import text_encoder
from vlm_adapt.quiet import quiet
from vlm_adapt.text.labels import LabelEmbeddings
from vlm_adapt.vision.tower import Tower


@dataclass(kw_only=True)
class AssembledPromptable(AssembledModel):
    """A promptable model with what reads samples for it."""

    model: Promptable
    config: PromptableConfig

    def _before_plan(self, stages: Sequence[Sequence[Adapt]]) -> None:
        if any(line.where == "language" for stage in stages for line in stage):
            self.model.train_text()

    def _after_plan(self) -> None:
        if self.model.labels is not None:
            self.model.labels.forget()  # the encoder may answer otherwise now

    def prepare(self, reader: Any, plan: Any, run: Run) -> None:
        """Put the text encoder, which no engine moves while it is frozen, where the model will be."""
        if self.model.labels is not None:
            self.model.labels.encoder.to(dist.device())
            self.model.labels.to(dist.device())

    def unused(self) -> dict[str, set[str]]:
        """Blocks behind the layer that the neck reads."""
        model = self.model
        unused = {"vision": set(model.vision.unused_modules(model.layers))}
        if model.labels is not None:
            unused["language"] = set(model.labels.encoder.unused_modules())
        return unused

    def reader(self, sources: Sequence[Source], seed: int, data: Data) -> Any:
        """Prompts drawn from samples' masks and objects, ready for this model."""
        from vlm_adapt.data.prompt_reader import PromptReader

        return PromptReader(sources, self.model.vision.image_spec, seed, data)

    @property
    def collate(self) -> Callable[..., Any]:
        """See AssembledModel."""
        from vlm_adapt.data.prompt_batch import collate_prompts

        return collate_prompts

    @property
    def collate_options(self) -> dict[str, Any]:
        """See AssembledModel."""
        return {"image_size": self.model.vision.image_spec.size}


@quiet()
def build(
    config: PromptableConfig,
    dtype: torch.dtype,
    seed: int = 0,
    tokenizer_folder: Path | None = None,
    empty: bool = False,
) -> AssembledPromptable:
    """Tower, neck and decoder, and what embeds words if the configuration names it.

    Args:
        dtype: of the tower and of the computation; neck and decoder are small and stay in float32.
        seed: of weights that no file gives.
        tokenizer_folder: not used: a text encoder brings its own.
        empty: shapes without values (torch's meta device): no weights are read or held.

    Raises:
        UserError: a part cannot be found or built.
    """
    place = torch.device("meta") if empty else nullcontext()
    labels = None
    if config.text is not None:
        labels = LabelEmbeddings(text_encoder(config.text, dtype, empty), config.text.templates)
    with place:
        tower = vision_tower(config.vision, dtype, empty)
    torch.manual_seed(seed)
    connector = build_connector(tower, config.vision.layers, config.decoder, labels, empty)
    model = Promptable(tower, connector, config.vision.layers, labels).eval()
    plain = {
        "layers": list(tower.resolve(config.vision.layers)),
        "options": config.decoder.options,
        "side": model.side,
    }
    base = {
        "vision": marks(tower, config.vision.model, config.vision.weights),
        "connector": own_marks(connector, f"SAM's decoder ({config.decoder.weights})", plain),
    }
    if config.text is not None and labels is not None:
        base["language"] = marks(labels.encoder, config.text.model, config.text.weights)
    return AssembledPromptable(model=model, config=config, dtype=dtype, base=base)


def build_connector(
    tower: Tower, layers: Sequence[int], decoder: Decoder, labels: Any = None, empty: bool = False
) -> PromptConnector:
    """Neck, prompt encoder and mask decoder for a tower, with their weights.

    Args:
        decoder: `weights` is package:NAME, file:PATH, hub:NAME (a SamModel of the hub) or random:SEED.
        labels: what embeds words; None for no projection of them.
        empty: shapes without values.

    Raises:
        UserError: several layers, images that are not square, weights that cannot be had or do not fit.
    """
    if len(layers) != 1:
        raise UserError(f"a promptable model reads one layer of the tower, not {len(layers)}: give one")
    if tower.image_spec.native is not None or len(set(tower.image_spec.size)) > 1:
        raise UserError("a promptable model sees squares: give model.vision.image_size as one number")
    (width,), (grid,) = tower.widths(layers), tower.grids(layers)
    options = dict(decoder.options)
    new_neck = options.pop("neck", "given") == "random"
    for name in options:
        if name not in decoder_options():
            known = ["neck", *decoder_options()]
            raise UserError(
                f"unknown setting '{name}' of model.decoder{nearest(name, known) or ':'} "
                f"known are {', '.join(known)}"
            )
    path = None if empty else _decoder_path(decoder.weights)
    tensors, told = ({}, {}) if path is None else sam_weights.read(path)
    source = weights.parse(decoder.weights)
    with torch.device("meta") if empty else nullcontext(), torch.random.fork_rng(devices=[]):
        if source.kind == "random" and source.value:
            torch.manual_seed(_number(source.value))
        sam = SamDecoder(tower.image_spec.size[0], grid[0], **(told | options))
        neck = SamNeck(width, grid, sam.width)
        words = None if labels is None else WordPrompt(labels.width, sam.width)
    if path is not None:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("neck.")}
        sam_weights.load(sam, own, "", str(path))
        if not new_neck:
            sam_weights.load(neck.layers, tensors, "neck.", f"{path} (neck: random leaves it out)")
    return PromptConnector(neck, sam, words).eval()


def _number(value: str) -> int:
    if not value.isdigit():
        raise UserError(f"'random:{value}' needs a whole number after 'random:', or nothing")
    return int(value)


def _decoder_path(named: str) -> Path | None:
    """The file or folder that holds a decoder's weights; None for random ones."""
    source = weights.parse(named)
    if source.kind != "hub":
        return weights.resolve(source)
    if not source.value:
        raise UserError("model.decoder.weights 'hub:' names nothing: write hub:facebook/sam-vit-base")
    from transformers.utils import cached_file

    try:
        found = [cached_file(source.value, name) for name in ("config.json", "model.safetensors")]
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0][:200].rstrip(".")
        raise UserError(
            f"cannot get SAM's decoder from '{source.value}' ({line}): check the name and the connection, or "
            "give package:mobile-sam-tinyvit or file:PATH"
        ) from error
    return Path(str(found[0])).parent
