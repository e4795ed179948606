"""Attention on the CPU by plain matrix products: text by text, or all at once under a mask.

Knows products and softmax; knows nothing about models. Torch's own fused attention is slow in bf16 on CPUs,
and transformers' eager one copies the scores to float32 and back and computes what the mask hides (figures in
docs/log.md).

    B rows, H heads, G key heads, T queries, K keys, N tokens of all texts, D width of a head
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_adapt.attention.texts import Piece, Text

# Tokens of a text whose probabilities are kept for the backward pass: they grow with its square. Those of
# longer ones are computed again there: one product more, of seven.
KEPT = 2048


class _ByText(torch.autograd.Function):
    """softmax(scale q k') v of every text, [H, N, D] each, to [N, H, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        q_HND: Tensor,
        k_GND: Tensor,
        v_GND: Tensor,
        texts: Sequence[Text],
        scale: float,
        dropout: float,
    ) -> Tensor:
        # Scores are rounded once either way; scaling the queries passes over less.
        q_HND, k_GND, v_GND = (q_HND * scale).contiguous(), k_GND.contiguous(), v_GND.contiguous()
        heads, count, _ = q_HND.shape
        out_NHD = q_HND.new_empty(count, heads, v_GND.shape[-1])
        kept = []
        for text, piece in ((whole, part) for whole in texts for part in whole.pieces):
            probabilities = _probabilities(q_HND, k_GND, piece)
            if _is_kept(text, dropout):
                kept.append(probabilities)
            if dropout:
                factors = torch.empty_like(probabilities).bernoulli_(1 - dropout).div_(1 - dropout)
                kept.append(factors)
                probabilities = probabilities * factors
            out = torch.bmm(probabilities, v_GND[:, piece.keys])
            out_NHD[piece.rows] = out.view(heads, -1, out.shape[-1]).transpose(0, 1)
        ctx.save_for_backward(q_HND, k_GND, v_GND, *kept)
        ctx.texts, ctx.scale, ctx.dropout = texts, scale, dropout
        return out_NHD

    @staticmethod
    def backward(ctx: Any, grad_NHD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_HND, k_GND, v_GND, *kept = ctx.saved_tensors
        heads = len(q_HND)
        # Laid out as the layers that follow backwards want them: token by token.
        dq_NHD = q_HND.new_empty(q_HND.shape[1], heads, q_HND.shape[2])
        dk_NGD, dv_NGD = (x.new_empty(x.shape[1], len(x), x.shape[2]) for x in (k_GND, v_GND))
        for text in reversed(ctx.texts):
            whole = False  # whether the gradients of this text's keys hold something yet
            for piece in reversed(text.pieces):
                rows, keys = piece.rows, piece.keys
                factors = kept.pop() if ctx.dropout else None
                again = not _is_kept(text, ctx.dropout)
                probabilities = _probabilities(q_HND, k_GND, piece) if again else kept.pop()
                grad = _folded(grad_NHD[rows].transpose(0, 1), k_GND)
                dp = torch.bmm(grad, v_GND[:, keys].transpose(1, 2))
                used = probabilities
                if factors is not None:
                    dp, used = dp.mul_(factors), probabilities * factors
                ds = torch._softmax_backward_data(dp, probabilities, -1, probabilities.dtype)
                dq = torch.bmm(ds, k_GND[:, keys]).mul_(ctx.scale)
                dq_NHD[rows] = dq.view(heads, -1, dq.shape[-1]).transpose(0, 1)
                dk = torch.bmm(ds.transpose(1, 2), _folded(q_HND[:, rows], k_GND)).transpose(0, 1)
                dv = torch.bmm(used.transpose(1, 2), grad).transpose(0, 1)
                if whole:
                    dk_NGD[keys] += dk
                    dv_NGD[keys] += dv
                    continue
                if keys != text.place:  # its last queries do not see all of it
                    dk_NGD[text.place], dv_NGD[text.place] = 0, 0
                dk_NGD[keys], dv_NGD[keys] = dk, dv
                whole = True
        return *(x.transpose(0, 1) for x in (dq_NHD, dk_NGD, dv_NGD)), None, None, None


def _is_kept(text: Text, dropout: float) -> bool:
    return dropout > 0 or text.place.stop - text.place.start <= KEPT


def _probabilities(q_HND: Tensor, k_GND: Tensor, piece: Piece) -> Tensor:
    """How much each query of a piece sees of each of its keys, [G, H/G * T, K]."""
    scores = torch.bmm(_folded(q_HND[:, piece.rows], k_GND), k_GND[:, piece.keys].transpose(1, 2))
    if piece.hidden is not None:
        by_head = scores.view(len(q_HND), -1, scores.shape[-1])
        by_head[:, :, piece.hidden_at].masked_fill_(piece.hidden, -math.inf)
    return torch._softmax(scores, -1, False)


def _folded(x_HTD: Tensor, k_GND: Tensor) -> Tensor:
    """The queries of all heads that share a key head one after another: [G, H/G * T, D]."""
    return x_HTD.reshape(len(k_GND), -1, x_HTD.shape[-1])


def by_text(
    query: Tensor, key: Tensor, value: Tensor, texts: Sequence[Text], scale: float, dropout: float = 0.0
) -> Tensor:
    """Attention of texts that lie one after another in all rows together.

    Args:
        query: [B, H, T, D]; key and value [B, G, T, D].
        texts: that make up the B*T tokens.

    Returns:
        [B, T, H, D]
    """
    flat = (tensor.transpose(0, 1).flatten(1, 2) for tensor in (query, key, value))
    return _ByText.apply(*flat, texts, scale, dropout).unflatten(0, (len(query), query.shape[2]))


def by_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of each row: query [B, H, T, D], key and value [B, G, K, D] to [B, T, H, D].

    Args:
        mask: [B or 1, 1 or H, T, K or more], boolean or added to the scores; None hides nothing.
    """
    batch, heads, queries, _ = query.shape
    groups = key.shape[1]
    folded = query.reshape(batch * groups, -1, query.shape[-1]) * scale
    scores = torch.bmm(folded, key.flatten(0, 1).transpose(1, 2)).view(batch, heads, queries, -1)
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask.to(scores.dtype)
    probabilities = scores.softmax(-1).view(batch * groups, -1, scores.shape[-1])
    out = torch.bmm(probabilities, value.flatten(0, 1)).view(batch, heads, queries, -1)
    return out.transpose(1, 2).contiguous()
