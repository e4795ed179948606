"""Kernels of a GPU that work texts off one after another, each tried before it is used.

Knows FlashAttention's and torch's kernels for texts of different lengths; knows nothing about models. What a
machine has depends on its card, driver and packages: instead of a table of versions, a kernel is given three
small texts and must answer as plain arithmetic does, forward and backward.

    N tokens of all texts, H heads, G key heads, D width of a head, S texts and one
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlm_adapt.attention.texts import TextMask

TRIED = (5, 130, 64)  # tokens of the texts of a trial: one is longer than a kernel's tile of 128
WINDOW = 16  # of the past, in a trial of windows
# bf16 keeps 8 bits; outputs and gradients of unit normal inputs are sums of about 100 such products.
TOLERANCE = 5e-2


def _package(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, starts_S: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    past = (window - 1, 0) if window else (-1, -1)
    return flash_attn_varlen_func(
        q_NHD,
        k_NGD,
        v_NGD,
        starts_S,
        starts_S,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        window_size=past,
    )


def _torch(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, starts_S: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    """Torch's own copy of FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        more["enable_gqa"] = q_NHD.shape[1] != k_NGD.shape[1]
    past = (window - 1 if window else -1, 0)
    out: Any = varlen_attn(
        q_NHD, k_NGD, v_NGD, starts_S, starts_S, longest, longest, scale=scale, window_size=past, **more
    )
    return out


KERNELS: dict[str, Callable[..., Tensor]] = {"flash-attn": _package, "torch": _torch}


def by_text(query: Tensor, key: Tensor, value: Tensor, mask: TextMask, scale: float) -> Tensor | None:
    """Attention of causal texts in one row: query [1, H, N, D], key and value [1, G, N, D] to [1, N, H, D].

    Returns:
        None when nothing here works such texts off.
    """
    window = mask.window or 0
    name = usable(query.shape[1], key.shape[1], query.shape[-1], query.dtype, query.device, window > 0)
    if name is None:
        return None
    return _run(KERNELS[name], query, key, value, mask.starts_S, mask.longest, scale, window)


def _run(
    kernel: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts_S: Tensor,
    longest: int,
    scale: float,
    window: int,
) -> Tensor:
    parts = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    return kernel(*parts, starts_S, longest, scale, window)[None]


@lru_cache(maxsize=64)
def usable(
    heads: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device, windows: bool = False
) -> str | None:
    """The first kernel that answers rightly for these shapes on this device; None when none does."""
    for name, kernel in KERNELS.items():
        try:
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                shapes = (heads, key_heads, width, dtype, device)
                if all(_right(kernel, *shapes, window) for window in {0, WINDOW * windows}):
                    return name
        except Exception:  # noqa: BLE001 - whatever a missing or unfit kernel raises, the next is tried
            continue
    return None


@lru_cache(maxsize=64)
def flex_usable(heads: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch compiles FlexAttention for these shapes on this device, and it answers rightly."""
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            return _right(_flex, heads, key_heads, width, dtype, device, 0)
    except Exception:  # noqa: BLE001 - a compiler that is missing or fails raises whatever it likes
        return False


def _flex(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, starts_S: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    """FlexAttention as transformers compiles it."""
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers.integrations.flex_attention import compile_friendly_flex_attention

    count = len(q_NHD)
    number_N = torch.bucketize(torch.arange(count, device=q_NHD.device), starts_S[1:], right=True)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (number_N[q] == number_N[k]) & (k <= q)

    mask = create_block_mask(sees, 1, None, count, count, device=q_NHD.device.type)
    parts = (x.transpose(0, 1)[None] for x in (q_NHD, k_NGD, v_NGD))
    out: Any = compile_friendly_flex_attention(
        *parts, block_mask=mask, enable_gqa=q_NHD.shape[1] != k_NGD.shape[1], scale=scale, training=True
    )
    return out[0].transpose(0, 1)


def _right(
    kernel: Any, heads: int, key_heads: int, width: int, dtype: torch.dtype, device: torch.device, window: int
) -> bool:
    """Whether a kernel's outputs and gradients are those of plain arithmetic in float32."""
    generator = torch.Generator(device).manual_seed(0)
    count, starts = sum(TRIED), [0]
    for length in TRIED:
        starts.append(starts[-1] + length)

    def random(of: int) -> Tensor:
        made = torch.randn(1, of, count, width, generator=generator, device=device).to(dtype)
        return made.requires_grad_(True)

    inputs = [random(heads), random(key_heads), random(key_heads)]
    starts_S = torch.tensor(starts, dtype=torch.int32, device=device)
    query, key, value = inputs
    got = _run(kernel, query, key, value, starts_S, max(TRIED), width**-0.5, window)
    places = torch.arange(count, device=device)
    number = torch.bucketize(places, starts_S[1:], right=True)
    back = places[:, None] - places[None]
    seen = (number[:, None] == number[None]) & (back >= 0) & (back < (window or count))
    wide = [x.detach().float().requires_grad_(True) for x in inputs]
    q, k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in wide)
    scores = (q @ k.transpose(2, 3) * width**-0.5).masked_fill(~seen, float("-inf"))
    want = (scores.softmax(-1) @ v).transpose(1, 2)
    weight = torch.randn(want.shape, generator=generator, device=device)
    mine = torch.autograd.grad((got.float() * weight).sum(), inputs)
    plain = torch.autograd.grad((want * weight).sum(), wide)
    pairs = [(got, want), *zip(mine, plain, strict=True)]
    return all(bool(((a.float() - b).abs() <= TOLERANCE * (1 + b.abs())).all()) for a, b in pairs)
