"""Writing token by token: greedy or nucleus sampling, many rows at once, with streaming.

Knows logits and stop tokens; knows nothing about the model behind them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlm_adapt import dist
from vlm_adapt.language.language import Generation


def decode(
    logits_BV: Tensor, step: Callable[[Tensor], Tensor], settings: Generation, stop_ids: set[int]
) -> list[list[int]]:
    """Write until every row has stopped.

    Args:
        logits_BV: logits of the first new token.
        step: ids_B -> logits_BV of the token after them.

    Returns:
        ids of each row, without the stop token; a row that never stops has `max_new_tokens`.
    """
    rows: list[list[int]] = [[] for _ in range(len(logits_BV))]
    finished = [False] * len(rows)
    generator = None
    if settings.temperature > 0 and settings.seed is not None:
        generator = torch.Generator(logits_BV.device).manual_seed(settings.seed)
    for number in range(settings.max_new_tokens):
        ids_B = _choose(logits_BV.float(), settings, generator)
        written: list[int | None] = []
        for row, token in enumerate(ids_B.tolist()):
            finished[row] = finished[row] or token in stop_ids
            written.append(None if finished[row] else token)
            if not finished[row]:
                rows[row].append(token)
        if settings.on_token:
            settings.on_token(written)
        busy = 0.0 if all(finished) else 1.0
        if settings.synced:
            busy = dist.total([busy])[0]
        if not busy:
            break
        if number == settings.max_new_tokens - 1:
            if settings.on_states:
                step(ids_B)  # the last token is read, too, for its state
            break
        logits_BV = step(ids_B)
    return rows


def _choose(logits_BV: Tensor, settings: Generation, generator: torch.Generator | None) -> Tensor:
    if settings.temperature <= 0:
        return logits_BV.argmax(-1)
    probabilities = torch.softmax(logits_BV / settings.temperature, -1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        # A word stays while the words before it do not yet make up top_p: the likeliest always stays.
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= settings.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
