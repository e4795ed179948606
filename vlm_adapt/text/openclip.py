"""Text encoders from open_clip: the text tower of its CLIP models, alone.

Knows open_clip; knows nothing about vision towers, labels or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import open_clip
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor

from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError
from vlm_adapt.tensor_files import Source, read_state
from vlm_adapt.text.encoder import TextEncoder, find_blocks
from vlm_adapt.text.loading import complain, unreachable

NOT_TEXT = ("visual.", "logit_scale", "logit_bias")


class OpenClipText(TextEncoder):
    """The text tower of an open_clip model, pooled and projected as `encode_text` has it.

    Args:
        text: open_clip's text tower.
        tokenizer: open_clip's tokenizer for the model.
    """

    def __init__(self, text: Any, tokenizer: Any):
        own = isinstance(text, TextTransformer)
        names = find_blocks(text)
        super().__init__(text, text.output_dim or getattr(text, "width", 0), names, tokenizer.context_length)
        self.tokenizer = tokenizer
        if own and not hasattr(text, "get_input_embeddings"):
            # As every model of transformers has; a bound method, so that a copy of the model has its own.
            text.get_input_embeddings = MethodType(_input_embeddings, text)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """As in TextEncoder."""
        library = getattr(self.tokenizer, "tokenizer", None)
        if library is not None and hasattr(self.tokenizer, "clean_fn"):  # a tokenizer of transformers
            return [
                len(ids) for ids in library([self.tokenizer.clean_fn(text) for text in texts])["input_ids"]
            ]
        return [len(self.tokenizer.encode(text)) + 2 for text in texts]

    def _vectors(self, texts: list[str]) -> Tensor:
        return self.model(self.tokenizer(texts).to(self.device))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """As in TextEncoder."""
        self.model.set_grad_checkpointing(enabled)


def _input_embeddings(text: Any) -> Any:
    return text.token_embedding


def build(name: str, source: Source) -> TextEncoder:
    """A text encoder by open_clip's model name, `hf-hub:ORG/NAME` or `local-dir:FOLDER`."""
    local = name.startswith(("hf-hub:", "local-dir:"))
    if not local and name not in open_clip.list_models():
        raise UserError(f"open_clip has no model '{name}'{nearest(name, open_clip.list_models()) or '.'}")
    hub = source.kind == "hub"
    if hub and not local:
        _check_tag(name, source.value)
    if hub and name.startswith("local-dir:"):
        folder = Path(name.partition(":")[2])
        if not any([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pt")]):
            raise UserError(f"'{folder}' holds no weights: say weights: random: to start from none")
    try:
        model: Any = open_clip.create_model(
            name,
            pretrained=source.value if hub and not local else None,
            load_weights=hub,
            require_pretrained=hub,
            pretrained_text=False,
            force_custom_text=True,
            device=torch.get_default_device(),
        )
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError, ValueError) as error:
        raise unreachable(f"open_clip:{name}", error) from error
    text = getattr(model, "text", None)
    if not isinstance(text, TextTransformer) and not hasattr(text, "output_dim"):
        raise UserError(
            f"open_clip's '{name}' has a {type(text).__name__} for text: choose a CLIP or a SigLIP"
        )
    if source.kind == "file":
        _load(text, source.path)
    return OpenClipText(text, tokenizer)


def _load(text: Any, path: Path) -> None:
    """Load the text side from a file of the whole model, or of the text side alone."""
    state = read_state(path)
    if any(key.startswith("text.") for key in state):
        state = {key.removeprefix("text."): value for key, value in state.items() if key.startswith("text.")}
    given = {key: value for key, value in state.items() if not key.startswith(NOT_TEXT)}
    given.pop("attn_mask", None)  # in old files, and always the same
    own = text.state_dict()
    shapes = [key for key in own if key in given and given[key].shape != own[key].shape]
    complain(str(path), set(own) - set(given), set(given) - set(own), shapes)
    text.load_state_dict(given, strict=True)


def _check_tag(name: str, tag: str) -> None:
    known = open_clip.list_pretrained_tags_by_model(name)
    if tag not in known:
        asked = f"has no weights '{tag}'" if tag else "needs the name of its weights"
        raise UserError(
            f"open_clip's '{name}' {asked}{nearest(tag, known) or ':'} "
            f"say weights: hub:TAG with one of {', '.join(known) or 'none'}"
        )
