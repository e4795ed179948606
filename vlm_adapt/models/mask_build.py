"""From `model.masks` to a token that asks for masks, the decoder that draws them, and their own tower.

Knows which part comes from where; knows nothing about training or samples.

The token is added to the tokenizer if it is not there. Its two rows lie beside the language's tables, also
where a table has a row of that number: so the tables stay as they are. They begin as the mean of the rows of
the pieces of the word "mask", whose size and direction the language knows.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from vlm_adapt.config.schema import Model
from vlm_adapt.data.token_masks import MaskSpec
from vlm_adapt.errors import UserError
from vlm_adapt.language.language import Language
from vlm_adapt.language.token_row import TokenRow
from vlm_adapt.models.build import vision_tower
from vlm_adapt.models.mask_token import MaskToken
from vlm_adapt.models.promptable_build import build_connector
from vlm_adapt.models.vlm import VisionLanguageModel

WORD = " mask"


def attach_masks(
    model: VisionLanguageModel, tokenizer: Any, config: Model, dtype: torch.dtype, seed: int, empty: bool
) -> MaskSpec:
    """Give a model the token and what draws its masks; see models/build.py for the arguments.

    Raises:
        UserError: an encoder-decoder, images that are not square, a token that is no token, or a part that
            cannot be had.
    """
    assert config.masks is not None
    settings, language = config.masks, model.language
    for name in settings.options:
        raise UserError(f"unknown setting '{name}' of model.masks: known are token, vision and decoder")
    if language.seq2seq:
        raise UserError(
            "model.masks needs a causal language: an encoder-decoder's answers are not read where its "
            "prompt is; choose another model.language.model"
        )
    token = _number_of(settings.token, tokenizer)
    own = settings.vision is not None
    with torch.device("meta") if empty else nullcontext():
        tower = model.vision if settings.vision is None else vision_tower(settings.vision, dtype, empty)
    layers = config.vision.layers[-1:] if settings.vision is None else settings.vision.layers
    if tower.image_spec.native is not None:
        raise UserError(
            "model.masks cannot be drawn on images of native size: give model.masks.vision, a tower whose "
            "images have one size"
        )
    if own:
        # Nothing of an image may be cropped away where a mask is asked of all of it.
        tower.image_spec = replace(tower.image_spec, resize="squash")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = build_connector(tower, layers, settings.decoder, None, empty)
        with torch.device("meta") if empty else nullcontext():
            row = TokenRow(token, language.width)
            masks = MaskToken(row, language.width, sam.neck, sam.decoder).eval()
    if not empty:
        _begin(row, language, tokenizer)
    language.rows = [row]
    model.masks, model.mask_layers = masks, tuple(layers)
    if own:
        model.mask_vision = tower.to(dtype).eval().requires_grad_(False)
    return MaskSpec(token, masks.size, tower.image_spec, own)


def _number_of(token: str, tokenizer: Any) -> int:
    """The token's number, added if it is not there."""
    from tokenizers import AddedToken

    if token.split() != [token]:
        raise UserError(f"model.masks.token {token!r} is no token: write it without spaces, as <seg>")
    if token not in tokenizer.get_vocab():
        # Not a special token: answers show it, and where it stands says what the mask is of.
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(f"model.masks.token '{token}' is {len(ids)} tokens of this tokenizer: take another")
    return int(ids[0])


@torch.no_grad()
def _begin(row: TokenRow, language: Language, tokenizer: Any) -> None:
    ids = torch.tensor(tokenizer.encode(WORD, add_special_tokens=False))
    table = language.model.get_output_embeddings().weight
    row.begin(language.embed(ids).float().mean(0), table[ids].float().mean(0))
