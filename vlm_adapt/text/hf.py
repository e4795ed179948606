"""Text encoders from transformers: BERT, MPNet, T5's encoder, the text sides of CLIP and SigLIP, and others.

Knows transformers and how each family makes one vector of a text; knows nothing about labels or training.
Sentence encoders: mean over tokens (Reimers and Gurevych 2019, arXiv 1908.10084), or what the folder's own
`1_Pooling/config.json` says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING, AutoConfig, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from vlm_adapt.errors import UserError
from vlm_adapt.tensor_files import Source, read_state
from vlm_adapt.text.encoder import TextEncoder, find_blocks
from vlm_adapt.text.loading import complain, unreachable

POOLINGS = ("mean", "cls", "eos", "last")
OWN = "own"  # what the library's get_text_features gives: projected (CLIP), pooled (SigLIP)
OWN_FAMILIES = ("clip_text_model", "siglip_text_model", "siglip2_text_model")
LEFT_OUT = (
    "vision_", "visual_", "logit_", "decoder.", "lm_head", "cls.", "pooler.", "qa_", "classifier",
    "embeddings.position_ids", "text_projection", "lm_predictions", "discriminator_", "mask_predictions",
)  # fmt: skip
ENDLESS = 1_000_000  # what tokenizers say who know no limit


class TransformersText(TextEncoder):
    """A text model of transformers.

    Args:
        model: it; what it gives has `last_hidden_state`.
        tokenizer: its tokenizer.
        pooling: mean, cls, eos, last, or `own`: the family's projected or pooled output.
    """

    def __init__(self, model: Any, tokenizer: Any, pooling: str):
        config = model.config
        width: int = config.hidden_size
        projection = getattr(model, "text_projection", None) if pooling == OWN else None
        head = getattr(model, "head", None) if pooling == OWN else None
        last = projection if projection is not None else head
        if isinstance(last, nn.Linear):
            width = last.out_features
        super().__init__(model, width, find_blocks(model), _limit(model, tokenizer))
        self.pooling, self.tokenizer = pooling, tokenizer
        # SigLIP was trained on texts filled up to one length, and sees what fills them.
        self.filled = str(config.model_type).startswith("siglip")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.padding_side = "right"

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.model.config

    def unused_modules(self) -> list[str]:
        """Projections and heads that another pooling goes past."""
        names = ("pooler",) if self.pooling == OWN else ("pooler", "head", "text_projection")
        return [f"model.{name}" for name, _ in self.model.named_modules() if name.split(".")[-1] in names]

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """As in TextEncoder."""
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # a text that is too long is told by the caller
        try:
            return [len(ids) for ids in self.tokenizer(list(texts))["input_ids"]]
        finally:
            transformers_logging.set_verbosity(verbosity)

    def _vectors(self, texts: list[str]) -> Tensor:
        length: dict[str, Any] = {"padding": True}
        if self.filled:
            length = {"padding": "max_length", "max_length": self.limit}
        batch = self.tokenizer(texts, return_tensors="pt", return_attention_mask=True, **length)
        ids_NT, mask_NT = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        output = self.model(input_ids=ids_NT, attention_mask=None if self.filled else mask_NT)
        if self.pooling == OWN:
            projected = getattr(output, "text_embeds", None)
            return output.pooler_output if projected is None else projected
        hidden_NTD = output.last_hidden_state.float()
        if self.pooling == "mean":
            mask_NT1 = mask_NT[..., None].to(hidden_NTD.dtype)
            return (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1)
        return hidden_NTD[torch.arange(len(texts), device=self.device), self._places(texts, ids_NT, mask_NT)]

    def _places(self, texts: list[str], ids_NT: Tensor, mask_NT: Tensor) -> Tensor:
        """The token of each text whose state stands for the whole."""
        if self.pooling == "cls":
            return torch.zeros(len(ids_NT), dtype=torch.int64, device=ids_NT.device)
        if self.pooling == "last":
            return mask_NT.sum(1) - 1
        ends_NT = ((ids_NT == self.tokenizer.eos_token_id) & mask_NT.bool()).int()
        without = (ends_NT.sum(1) == 0).nonzero().flatten().tolist()
        if self.tokenizer.eos_token_id is None or without:
            raise UserError(
                f"pooling 'eos' of '{self.name}': its tokenizer puts no end token after "
                f"'{texts[without[0] if without else 0]}': choose mean or last"
            )
        return ends_NT.argmax(1)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in TextEncoder."""
        if enabled:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()


def build(name: str, source: Source, pooling: str | None = None) -> TextEncoder:
    """A text encoder by hub name or folder."""
    if pooling is not None and pooling not in POOLINGS:
        raise UserError(f"pooling of '{name}' is one of {', '.join(POOLINGS)}, not '{pooling}'")
    revision = (source.value or "main") if source.kind == "hub" else "main"
    try:
        whole = AutoConfig.from_pretrained(name, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise unreachable(f"hf:{name}", error) from error
    config, kind = _text_class(name, whole)
    notes: list[str] = []
    if pooling is None:
        pooling = _family_pooling(name, revision, whole, config, notes)
    model = _load(name, source, revision, config, kind)
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    encoder = TransformersText(model, tokenizer, pooling)
    encoder.notes += notes
    return encoder


def _text_class(name: str, whole: Any) -> tuple[Any, Any]:
    """The configuration of the text side, and the class that reads it.

    Raises:
        UserError: transformers has no text model for it.
    """
    config = getattr(whole, "text_config", None)
    config = whole if config is None or isinstance(config, dict) else config
    kind: Any = None
    for mapping in (MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING):
        if kind is None and type(config) in mapping:
            kind = mapping[type(config)]
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    if kind is None:  # SigLIP's text side is in neither list
        kind = getattr(transformers, type(config).__name__.replace("TextConfig", "TextModel"), None)
    if kind is None or getattr(kind, "main_input_name", "") != "input_ids":
        raise UserError(
            f"'{name}' is a {config.model_type} model, which reads no text: choose a text encoder "
            "(BERT, MPNet, T5, the text side of a CLIP)"
        )
    projected = getattr(transformers, f"{kind.__name__}WithProjection", None)
    if projected is not None and kind.__name__ not in (getattr(whole, "architectures", None) or ()):
        kind = projected
        if config is not whole:  # CLIP's text side alone is told by its other half how wide the output is
            config.projection_dim = whole.projection_dim
    return config, kind


def _family_pooling(name: str, revision: str, whole: Any, config: Any, notes: list[str]) -> str:
    """How the family makes one vector of a text.

    Raises:
        UserError: a model of images and texts whose way is not known.
    """
    if config.model_type in OWN_FAMILIES:
        return OWN
    if config is not whole:
        raise UserError(
            f"how '{name}' ({whole.model_type}) makes one vector of a text is not known here: set `pooling` "
            f"to {', '.join(POOLINGS)}, or take a CLIP or a SigLIP"
        )
    modules = _read_json(name, revision, "modules.json")
    if any("Dense" in str(module.get("type")) for module in modules or ()):
        notes.append(f"'{name}' has dense layers after its pooling, which are not applied")
    said = _read_json(name, revision, "1_Pooling/config.json") or {}
    if said.get("pooling_mode_cls_token"):
        return "cls"
    if said.get("pooling_mode_lasttoken"):
        return "last"
    return "mean"


def _read_json(name: str, revision: str, file: str) -> Any:
    """A small file of a folder or a hub name; None where there is none."""
    path: str | Path | None = Path(name) / file
    if not Path(name).is_dir():
        try:
            path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError:
            return None  # offline: the family's habit is taken
    if path is None or not Path(path).is_file():
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON ({error}): fetch the model again") from error


def _load(name: str, source: Source, revision: str, config: Any, kind: Any) -> Any:
    """The model in float32.

    Raises:
        UserError: nothing there, or weights that do not fit.
    """
    options: dict[str, Any] = {}
    if "add_pooling_layer" in kind.__init__.__code__.co_varnames:
        options["add_pooling_layer"] = False
    if source.kind == "random":
        return kind._from_config(config, dtype=torch.float32, **options)
    path: str | None = name
    if source.kind == "file":
        path = str(source.path)
        if source.path.is_file():
            path, options["state_dict"] = None, read_state(source.path)
    where = path or str(source.path)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what does not fit is told in one sentence
    try:
        model, report = kind.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            revision=revision,
            **options,
        )
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise unreachable(f"hf:{where}", error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    unexpected = [key for key in report["unexpected_keys"] if not _left_out(key)]
    shapes = [str(entry[0] if isinstance(entry, tuple) else entry) for entry in report["mismatched_keys"]]
    complain(where, set(report["missing_keys"]) - set(shapes), unexpected, shapes)
    return model


def _left_out(key: str) -> bool:
    """Whether a tensor belongs to a part that a text's vector does not need."""
    return any(key.startswith(part) or f".{part}" in key for part in LEFT_OUT)


def _limit(model: Any, tokenizer: Any) -> int | None:
    """The most tokens that both tokenizer and positions take."""
    limits = [tokenizer.model_max_length] if tokenizer.model_max_length < ENDLESS else []
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:
        tables = (m for n, m in model.named_modules() if n.endswith("position_embeddings"))
        padding = next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)
        limits.append(positions - (0 if padding is None else padding + 1))  # RoBERTa, MPNet count from there
    return min(limits) if limits else None
