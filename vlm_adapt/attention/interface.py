"""The attention function that transformers calls: it looks at the mask and chooses what works it off.

Knows transformers' attention interface; knows nothing about towers or languages.

    B rows, H heads, G key heads, T queries, K keys, D width of a head
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_adapt.attention import kernels
from vlm_adapt.attention.guard import arrived
from vlm_adapt.attention.products import by_mask, by_text
from vlm_adapt.attention.texts import TextMask, causal_text

NAME = "vlm_adapt"
FLASH = "flash_attention_2"
MORE = ("position_bias", "softcap", "s_aux", "cache")  # what only transformers' own functions can judge


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query [B, H, T, D], key and value [B, G, K, D].

    Args:
        attention_mask: a TextMask, a BlockMask, a tensor [B, 1, T, K], or None.

    Returns:
        [B, T, H, D], and no weights.

    Raises:
        RuntimeError: texts were to be kept apart here, and the model handed over no mask.
    """
    from torch.nn.attention.flex_attention import BlockMask
    from transformers.integrations.flex_attention import flex_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    arrived(attention_mask is not None)
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **more}
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    batch, _, queries, width = query.shape
    square, on_cpu = queries == key.shape[2], query.device.type == "cpu"
    odd = any(more.get(name) is not None for name in MORE)
    scale = width**-0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if isinstance(attention_mask, TextMask):
        if square and not odd and (batch, queries) == (1, attention_mask.shape[-1]):
            if on_cpu:
                return by_text(query, key, value, attention_mask.texts, scale, dropout), None
            if attention_mask.window is not None and not dropout:
                found = kernels.by_text(query, key, value, attention_mask, scale)
                if found is not None:
                    return found, None
        attention_mask = attention_mask.dense()
    if on_cpu and not odd:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is not None or not causal or queries == 1:
            if not dropout:
                return by_mask(query, key, value, attention_mask, scale), None
        elif square:
            texts = [causal_text(row * queries, queries, query.dtype) for row in range(batch)]
            return by_text(query, key, value, texts, scale, dropout), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
    """transformers' own FlashAttention, which is told by keywords where texts begin."""
    from transformers.integrations.flash_attention import flash_attention_forward

    arrived(more.get("cu_seq_lens_q") is not None)
    return flash_attention_forward(module, query, key, value, mask, **more)


def register() -> str:
    """Make them known to transformers; masks are made as for its SDPA. Returns our name there."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionInterface.register(FLASH, _flash)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def fits(model_class: Any, config: Any) -> bool:
    """Whether a model's attention is this plain one: no cap on the scores, no sinks, chosen by name."""
    capped = getattr(config, "attn_logit_softcapping", None)
    supported = all(
        getattr(model_class, flag, False) for flag in ("_supports_attention_backend", "_supports_sdpa")
    )
    return supported and not capped
