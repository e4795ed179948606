"""From a configuration to a model with everything that feeds it: the whole assembly on one screen.

Knows which part comes from where; knows nothing about training or files of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch

from vlm_adapt import weights
from vlm_adapt.adapt import METHODS
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.plan import flatten, make_line
from vlm_adapt.config.schema import Adapt, AnyModel, Data, Model, Run, Source, Vision
from vlm_adapt.connectors import build_connector
from vlm_adapt.data.collate import Batch, collate
from vlm_adapt.data.encode import Encoder
from vlm_adapt.data.reader import Reader
from vlm_adapt.data.token_masks import MaskSpec
from vlm_adapt.errors import UserError
from vlm_adapt.language.load import choose_template, load_language, load_tokenizer
from vlm_adapt.models import KINDS, MASKS
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.calibrate import calibrate
from vlm_adapt.models.fingerprint import fingerprint
from vlm_adapt.models.mask_token import UNUSED
from vlm_adapt.models.vlm import VisionLanguageModel
from vlm_adapt.quiet import quiet
from vlm_adapt.template import Template
from vlm_adapt.vision import build_tower
from vlm_adapt.vision.tower import Tower


@dataclass(kw_only=True)
class Assembled(AssembledModel):
    """A vision-language model with its tokenizer, template and encoder.

    Attributes:
        stop_ids: tokens at which an answer ends.
    """

    model: VisionLanguageModel
    config: Model
    tokenizer: Any
    template: Template
    encoder: Encoder
    stop_ids: set[int]
    masks: MaskSpec | None = None

    def unused(self) -> dict[str, set[str]]:
        """Blocks behind the deepest layer that the connector reads; what masks leave out of their decoder."""
        return {"vision": set(self.model.vision.unused_modules(self.model.layers)), "masks": set(UNUSED)}

    def _after_plan(self) -> None:
        assert self.plan is not None
        for item in self.plan.attached:
            item.method.resized = self.resize
        self.resize()

    def expect(self, stages: Sequence[Sequence[Adapt]]) -> None:
        """Encode texts as long as under a plan that is not applied, where no weight is there to adapt."""
        self._resize([make_line(line) for line in flatten(stages) if METHODS.load(line.method).adds_tokens])

    def resize(self) -> None:
        """Encode texts as long as the active methods make them."""
        self._resize([item.method for item in self.plan.attached if item.method.active] if self.plan else [])

    def _resize(self, methods: Sequence[Method]) -> None:
        encoder, image = self.encoder, self.model.connector.tokens_per_image
        encoder.tokens_per_image = image + sum(method.image_tokens for method in methods)
        encoder.prompt_tokens = sum(method.virtual_tokens for method in methods)
        if encoder.prompt_tokens >= encoder.max_length:
            raise UserError(
                f"adapt: prompts take {encoder.prompt_tokens} places in every text, of "
                f"{encoder.max_length} tokens at most: raise model.language.max_length or take fewer"
            )
        for method in methods:
            method.check_length(encoder.max_length)

    def reader(self, sources: Sequence[Source], seed: int, data: Data) -> Reader:
        """Samples of these sources, ready for this model."""
        spec = self.model.vision.image_spec
        system = self.config.language.system
        return Reader(sources, self.encoder, self.template, system, spec, seed, data, self.masks)

    @property
    def collate(self) -> Callable[..., Batch]:
        """See AssembledModel."""
        return collate

    @property
    def longest(self) -> int:
        """See AssembledModel."""
        return self.encoder.max_length

    @property
    def objectives(self) -> bool:
        """See AssembledModel."""
        return True

    @property
    def thumbnails(self) -> bool:
        """See AssembledModel."""
        return True

    def prepare(self, reader: Any, plan: Any, run: Run) -> None:
        """Give a connector with `normalise: data` its statistics, and masks their weights in the loss."""
        calibrate(self, reader, plan)
        self.model.mask_weights = (run.train.cross_entropy_weight, run.train.dice_weight)

    def save_words(self, folder: Path) -> None:
        """The tokenizer."""
        self.tokenizer.save_pretrained(folder / "tokenizer")

    @property
    def collate_options(self) -> dict[str, Any]:
        """What `collate` needs to know of this model."""
        return {
            "image_size": self.model.vision.image_spec.size,
            "tokens_per_image": self.encoder.tokens_per_image,
            "state_size": self.config.state_size,
            "seq2seq": self.encoder.seq2seq,
            "native": self.model.vision.image_spec.native,
            "masks": self.masks,
        }


@overload
def build(
    config: Model,
    dtype: torch.dtype,
    seed: int = 0,
    tokenizer_folder: Path | None = None,
    empty: bool = False,
) -> Assembled: ...


@overload
def build(
    config: AnyModel,
    dtype: torch.dtype,
    seed: int = 0,
    tokenizer_folder: Path | None = None,
    empty: bool = False,
) -> Any: ...


def build(
    config: AnyModel,
    dtype: torch.dtype,
    seed: int = 0,
    tokenizer_folder: Path | None = None,
    empty: bool = False,
) -> Any:
    """The model of a configuration, of whatever kind, with what feeds it; see `build_vision_language`."""
    return KINDS.load(config.kind)(config, dtype, seed, tokenizer_folder, empty)


@quiet()
def build_vision_language(
    config: Model,
    dtype: torch.dtype,
    seed: int = 0,
    tokenizer_folder: Path | None = None,
    empty: bool = False,
) -> Assembled:
    """Tower, connector and language, with tokenizer, template and encoder.

    Args:
        dtype: of every weight and of the computation; what trains is raised to float32 by the plan.
        seed: of the connector's initial weights (and of adapters attached right after).
        tokenizer_folder: a checkpoint's own tokenizer.
        empty: shapes without values (torch's meta device): no weights are read or held.

    Raises:
        UserError: a part cannot be found or built.
    """
    language_path = _folder(config.language.model)
    tokenizer = load_tokenizer(tokenizer_folder or language_path)
    language_weights = "random:" if empty else config.language.weights
    if language_weights.startswith(("package:", "file:")):
        language_weights = f"file:{weights.resolve(language_weights)}"
    place = torch.device("meta") if empty else nullcontext()
    with place:
        language = load_language(language_path, language_weights, config.language.attention, dtype)

    vision = config.vision
    with place:
        tower = vision_tower(vision, dtype, empty)

    torch.manual_seed(seed)
    with place:
        connector = build_connector(
            config.connector.name,
            tower.widths(vision.layers),
            tower.grids(vision.layers),
            language.width,
            embedding_rms=language.embedding_rms(),
            **config.connector.options,
        ).to(dtype)
    native = tower.image_spec.native
    if native is not None:
        connector.check_varied(native.drops, native.pooled)
        native = replace(native, multiple=connector.multiple, tokens=connector.token_count)
        tower.image_spec = replace(tower.image_spec, native=native)
    with place:
        model = VisionLanguageModel(tower, connector, language, vision.layers, config.state_size)
    model = model.to(dtype).eval()
    masks: MaskSpec | None = None
    if config.masks is not None:
        masks = MASKS.load("sam")(model, tokenizer, config, dtype, seed, empty)

    prefix_lm = config.language.prefix_lm
    template = choose_template(config.language.template, tokenizer, language.seq2seq, prefix_lm)
    encoder = Encoder(
        tokenizer,
        connector.tokens_per_image,
        config.language.max_length,
        seq2seq=language.seq2seq,
        start_id=getattr(language, "start_id", 0),
        state_size=config.state_size,
        mask_token=None if masks is None else masks.token,
    )
    language.tokenizer = tokenizer
    stop_ids = _stop_ids(tokenizer, template, language.model)
    model.stop_ids = stop_ids
    base = fingerprint(model, config)
    return Assembled(
        model=model,
        config=config,
        dtype=dtype,
        base=base,
        tokenizer=tokenizer,
        template=template,
        encoder=encoder,
        stop_ids=stop_ids,
        masks=masks,
    )


def vision_tower(vision: Vision, dtype: torch.dtype, empty: bool = False) -> Tower:
    """The tower alone; the arguments and errors are those of `build`."""
    named, local = "random:" if empty else vision.weights, None
    if named.startswith(("package:", "file:")):
        resolved = weights.resolve(named)
        assert resolved is not None
        local = resolved if vision.model.startswith("hf:") else weights.tensors_file(resolved)
    return build_tower(vision.model, named, vision.image_size, dtype, local, vision.options)


def _folder(model: str) -> str | Path:
    """A package's folder in the cache; any other name stays as it is."""
    if model.startswith("package:"):
        folder = weights.resolve(model)
        assert folder is not None
        return folder
    return model.removeprefix("hf:")


def _stop_ids(tokenizer: Any, template: Template, model: Any) -> set[int]:
    """The end of a turn, and whatever the model itself ends with."""
    stops = {tokenizer.eos_token_id}
    ends = model.generation_config.eos_token_id if model.generation_config else None
    stops |= set(ends) if isinstance(ends, list) else {ends}
    end = tokenizer.encode(template.end, add_special_tokens=False) if template.end else []
    if len(end) == 1:
        stops.add(end[0])
    return {stop for stop in stops if stop is not None}


def compute_dtype(bf16: bool | str) -> torch.dtype:
    """bfloat16 where it is asked for, or where `auto` finds hardware that is fast with it."""
    if bf16 == "auto":
        bf16 = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else _cpu_has_bf16()
    return torch.bfloat16 if bf16 else torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; without, it is slower than float32."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
