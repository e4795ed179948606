"""Rows of texts of given lengths, and tiny languages that read them; for tests of attention."""

from __future__ import annotations

import tiny_languages
import torch
from torch import Tensor

from vlm_adapt import attention
from vlm_adapt.language.causal import CausalLanguage
from vlm_adapt.language.language import LanguageInput
from vlm_adapt.language.layout import Layout


def layout(kind: str, rows: list[list[int]], length: int = 0, device: str = "cpu") -> Layout:
    """Rows of texts of these lengths: causal, with a two-way prefix, or with two branches after one."""
    length = max(length, *(sum(row) for row in rows))
    grids = torch.zeros(4, len(rows), length, dtype=torch.long)
    for row, texts in enumerate(rows):
        start = 0
        for number, size in enumerate(texts, 1):
            places, prefix = torch.arange(size), size // 3
            blocks, branches = places + 1, torch.zeros(size, dtype=torch.long)
            if kind == "two-way":
                blocks = (blocks - prefix).clamp_min(0)
            if kind == "branches":
                half = (size - prefix) // 2
                branches[prefix:], branches[prefix + half :] = 1, 2
                places[prefix + half :] -= half
            made = torch.stack([torch.full((size,), number), blocks, branches, places])
            grids[:, row, start : start + size] = made
            start += size
    documents, blocks, branches, places = grids.to(device)
    return Layout(documents, blocks, branches, places, plain=False)


def seen(of: Layout, window: int) -> Tensor:
    """The mask of all tokens one after another, from the rows' own tables."""
    count = len(of.places_N)
    length = of.documents_BT.shape[1]
    whole = torch.zeros(of.documents_BT.numel(), of.documents_BT.numel(), dtype=torch.bool)
    for row, allow_TT in enumerate(of.allow_BTT):
        back_TT = of.positions_BT[row, :, None] - of.positions_BT[row, None]
        place = slice(row * length, (row + 1) * length)
        whole[place, place] = allow_TT & (back_TT < (window or length))
    return whole[of.places_N][:, of.places_N].view(1, 1, count, count)


def language(family: str, name: str) -> CausalLanguage:
    """A tiny model with an attention that its loading would have chosen."""
    attention.register()
    made = CausalLanguage(tiny_languages.model(family)).eval()
    made.config._attn_implementation = name
    return made


def packed(of: Layout, model: CausalLanguage, seed: int = 0) -> LanguageInput:
    ids_BT = torch.randint(
        3, tiny_languages.VOCABULARY, of.documents_BT.shape, generator=torch.Generator().manual_seed(seed)
    )
    embeds_BTD = model.embed(ids_BT.to(of.documents_BT.device)).detach()
    return LanguageInput(embeds_BTD, of.documents_BT > 0, positions_BT=of.positions_BT, layout=of)
