"""Attention on the CPU by plain matrix products, for any model of transformers that lets it be chosen.

Knows transformers' attention interface; knows nothing about towers or languages. Torch's own fused
attention is slow in bf16 on CPUs, and transformers' eager one copies the scores to float32 and back and
computes the half of them that causality hides (figures in docs/log.md).

    B rows, H heads, G key heads, T queries, K keys, D width of a head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAME = "vlm_adapt_cpu"
MORE = ("position_bias", "softcap", "s_aux", "cache")  # what only transformers' own functions can judge
QUERIES_AT_ONCE = 128  # queries of one product: the keys after its last one are never touched


class _Attention(torch.autograd.Function):
    """softmax(scale q k' + mask) v, [N, T, D] each with heads in N; keeps the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q_NTD: Tensor, k_NKD: Tensor, v_NKD: Tensor, mask: Tensor | None, causal: bool, scale: float
    ) -> Tensor:
        out_NTD = torch.empty(*q_NTD.shape[:2], v_NKD.shape[-1], dtype=q_NTD.dtype)
        kept = []
        for rows, keys in _pieces(q_NTD.shape[1], k_NKD.shape[1], causal):
            scores = torch.bmm(q_NTD[:, rows], k_NKD[:, keys].transpose(1, 2)).mul_(scale)
            if causal:
                corner = scores[:, :, rows.start - rows.stop :]  # earlier keys are seen by all of these rows
                size = rows.stop - rows.start
                corner.masked_fill_(torch.ones(size, size, dtype=torch.bool).triu_(1), float("-inf"))
            elif mask is not None:
                # [B or 1, 1 or H, T, K] over [B, H, T, K]
                scores.view(-1, *_heads(mask, scores)).add_(mask)
            probabilities = torch._softmax(scores, -1, False)
            out_NTD[:, rows] = torch.bmm(probabilities, v_NKD[:, keys])
            kept.append(probabilities)
        ctx.save_for_backward(q_NTD, k_NKD, v_NKD, *kept)
        ctx.causal, ctx.scale = causal, scale
        return out_NTD

    @staticmethod
    def backward(ctx: Any, grad_NTD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_NTD, k_NKD, v_NKD, *kept = ctx.saved_tensors
        grad_NTD = grad_NTD.contiguous()
        dq_NTD, dk_NKD, dv_NKD = torch.empty_like(q_NTD), None, None
        pieces = _pieces(q_NTD.shape[1], k_NKD.shape[1], ctx.causal)
        # From the last piece, which reaches every key, so that the sums begin whole.
        for (rows, keys), probabilities in zip(reversed(pieces), reversed(kept), strict=True):
            grad = grad_NTD[:, rows]
            dp = torch.bmm(grad, v_NKD[:, keys].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, probabilities, -1, probabilities.dtype).mul_(ctx.scale)
            dq_NTD[:, rows] = torch.bmm(ds, k_NKD[:, keys])
            if dk_NKD is None or dv_NKD is None:
                dk_NKD = torch.bmm(ds.transpose(1, 2), q_NTD[:, rows])
                dv_NKD = torch.bmm(probabilities.transpose(1, 2), grad)
            else:
                dk_NKD[:, keys] += torch.bmm(ds.transpose(1, 2), q_NTD[:, rows])
                dv_NKD[:, keys] += torch.bmm(probabilities.transpose(1, 2), grad)
        return dq_NTD, dk_NKD, dv_NKD, None, None, None


def _pieces(queries: int, keys: int, causal: bool) -> list[tuple[slice, slice]]:
    """(queries, keys they may see), in order; all at once when any query may see any key."""
    if not causal:
        return [(slice(0, queries), slice(0, keys))]
    starts = range(0, queries, QUERIES_AT_ONCE)
    ends = [min(queries, start + QUERIES_AT_ONCE) for start in starts]
    return [(slice(start, end), slice(0, end)) for start, end in zip(starts, ends, strict=True)]


def _heads(mask: Tensor, scores: Tensor) -> tuple[int, int, int]:
    """(heads, T, K) that turn scores [B*H, T, K] into what a mask [B, 1, T, K] broadcasts over."""
    return len(scores) // len(mask), *scores.shape[1:]


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, T, D], key and value [B, G, K, D].

    Returns:
        [B, T, H, D], and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    batch, heads, queries, width = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and queries > 1 and attention_mask is None
    odd = dropout > 0 or (causal and queries != key.shape[2]) or any(more.get(n) is not None for n in MORE)
    if odd or (attention_mask is not None and attention_mask.shape[1] != 1) or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **more
        )
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if heads != key.shape[1]:
        repeats = heads // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if attention_mask is not None:
        attention_mask = attention_mask.expand(batch, -1, -1, -1)[..., : key.shape[2]]
        if attention_mask.dtype == torch.bool:
            lowest = torch.finfo(query.dtype).min
            attention_mask = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill_(
                ~attention_mask, lowest
            )
    scale = width**-0.5 if scaling is None else scaling
    flat = (tensor.flatten(0, 1) for tensor in (query, key, value))
    out_NTD = _Attention.apply(*flat, attention_mask, causal, scale)
    return out_NTD.unflatten(0, (batch, heads)).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make it known to transformers; masks are made as for its SDPA. Returns its name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def fits(model_class: Any, config: Any) -> bool:
    """Whether a model's attention is this plain one: no cap on the scores, no sinks, chosen by name."""
    capped = getattr(config, "attn_logit_softcapping", None)
    supported = all(
        getattr(model_class, flag, False) for flag in ("_supports_attention_backend", "_supports_sdpa")
    )
    return supported and not capped
