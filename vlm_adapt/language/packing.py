"""A model is tried before several texts share a row: does any of them reach another?

Knows how to call a language with two small texts; knows nothing about attention. A mask that is handed over
is no proof that an architecture keeps to it at every place, or counts positions as it is told.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_adapt.errors import UserError

LENGTHS = (5, 7)  # tokens of the two texts


def check_packing(language: Any) -> None:
    """Run two texts in one row, and again with one of them changed: the other's states must stay the same.

    A model whose parameters are spread over processes (ZeRO-3) is not tried: they would have to be gathered
    by all of them together, and a rank without a share of the batch does not come here.

    Raises:
        UserError: a text reached another, or read other positions than alone.
    """
    weights = next(iter(language.parameters()))
    if hasattr(weights, "ds_id"):
        return
    states = [(module, module.training) for module in language.modules()]
    language.eval()
    try:
        with torch.no_grad():
            _try(language, weights.device)
    finally:
        for module, training in states:
            module.training = training


def _try(language: Any, device: torch.device) -> None:
    from vlm_adapt.language.language import LanguageInput
    from vlm_adapt.language.layout import Layout

    positions_BT = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(device)
    documents_BT = torch.tensor([1] * LENGTHS[0] + [2] * LENGTHS[1], device=device)[None]
    vocabulary = language.model.get_input_embeddings().num_embeddings
    ids_BT = (torch.arange(sum(LENGTHS), device=device)[None] * 37 + 11) % vocabulary
    embeds_BTD = language.embed(ids_BT)

    def states(embeds_BTD: Tensor, which: slice) -> Tensor:
        grids = (documents_BT, positions_BT + 1, torch.zeros_like(documents_BT), positions_BT)
        parts = [grid[:, which].contiguous() for grid in grids]
        whole = which == slice(None)
        inputs = LanguageInput(
            embeds_BTD[:, which],
            parts[0] > 0,
            positions_BT=parts[3] if whole else None,
            layout=Layout(parts[0], parts[1], parts[2], parts[3], plain=not whole),
        )
        return language.hidden(inputs)[0].float()

    texts = (slice(0, LENGTHS[0]), slice(LENGTHS[0], None))
    together = states(embeds_BTD, slice(None))
    for mine, other in (texts, texts[::-1]):
        changed_BTD = embeds_BTD.clone()
        changed_BTD[:, other] = -2 * changed_BTD[:, other].flip(1)
        same = states(changed_BTD, slice(None))[mine]
        alone = states(embeds_BTD, mine)
        spread = float(alone.std())
        # Changed and unchanged rows have one shape, so only what reaches across can differ; alone, sums are
        # added in another order, which bf16 rounds to some hundredths.
        leaks = float((same - together[mine]).abs().max()) > 1e-3 * spread
        differs = float((alone - together[mine]).abs().mean()) > 0.05 * spread
        if leaks or differs:
            reason = "a text reaches another" if leaks else "a text is read otherwise than alone"
            raise UserError(
                f"the language model ({language.config.model_type}) cannot read several texts a row: "
                f"{reason}; switch packing off"
            )
