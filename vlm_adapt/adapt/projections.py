"""Where query, key and value lie in the output of an attention's projection.

Fused ones by the layouts of timm, open_clip, transformers and our own towers, separate ones by their names.
A layout that is not known is refused: a wrong one would train something else than is said. Knows names and
shapes; knows nothing about methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlm_adapt.adapt.linear_layers import Layer

LETTERS = ("q", "k", "v")
SEPARATE = {
    "q": ("q_proj", "query", "q", "q_lin", "to_q", "wq", "query_proj"),
    "k": ("k_proj", "key", "k", "k_lin", "to_k", "wk", "key_proj"),
    "v": ("v_proj", "value", "v", "v_lin", "to_v", "wv", "value_proj"),
}


@dataclass(frozen=True)
class Projections:
    """The layout of a layer's output: `groups` times pieces of these sizes.

    Attributes:
        sizes: features of each piece in a group, by letter, in order.
    """

    groups: int
    sizes: dict[str, int]


def projections_of(layer: Layer) -> Projections | None:
    """The layout of a layer that gives queries, keys or values; None for any other.

    Raises:
        LookupError: it is fused in a way that is not known here.
    """
    leaf, out = layer.name.rpartition(".")[2], layer.shape[0]
    for letter, names in SEPARATE.items():
        if leaf in names:
            return Projections(1, {letter: out})
    if leaf not in FUSED:
        return None
    found = FUSED[leaf](layer.parent, out)
    if found is None or found.groups * sum(found.sizes.values()) != out:
        raise LookupError(layer.name)
    return found


def _in_order(q: int, k: int, v: int) -> Projections:
    return Projections(1, {"q": q, "k": k, "v": v})


def _thirds(attention: Any, out: int) -> Projections | None:
    return _in_order(out // 3, out // 3, out // 3)


def _by_head(heads: Any, out: int) -> Projections | None:
    if not isinstance(heads, int):
        return None
    each = out // heads // 3
    return Projections(heads, {"q": each, "k": each, "v": each})


def _qkv(attention: Any, out: int) -> Projections | None:
    """All of q, then k, then v; TinyViT and EfficientFormer head by head, MaxViT too where it says so."""
    key, value = getattr(attention, "key_dim", None), getattr(attention, "val_dim", None)
    if isinstance(key, int) and isinstance(value, int):
        return Projections(attention.num_heads, {"q": key, "k": key, "v": value})
    if getattr(attention, "head_first", False):
        return _by_head(attention.num_heads, out)
    if isinstance(getattr(attention, "kv_dim", None), int):
        return _in_order(attention.q_dim, attention.kv_dim, attention.kv_dim)
    return _thirds(attention, out)


def _grouped(attention: Any, out: int) -> Projections | None:
    """Phi-3, DBRX: fewer keys and values than queries."""
    groups, width = getattr(attention, "num_key_value_heads", None), getattr(attention, "head_dim", None)
    if not isinstance(groups, int) or not isinstance(width, int):
        return None
    return _in_order(out - 2 * groups * width, groups * width, groups * width)


def _wqkv(attention: Any, out: int) -> Projections | None:
    """DBRX; MPT and ModernBERT have thirds."""
    return _grouped(attention, out) or _thirds(attention, out)


def _query_key_value(attention: Any, out: int) -> Projections | None:
    """BLOOM, GPT-NeoX, Persimmon: head by head. Falcon: by groups of heads, or one key and one value."""
    heads = getattr(attention, "num_heads", None) or getattr(attention, "num_attention_heads", None)
    if heads is None and isinstance(getattr(attention, "head_size", None), int):
        heads = out // 3 // attention.head_size
    if not hasattr(attention, "new_decoder_architecture"):
        return _by_head(heads, out)
    width = attention.head_dim
    if attention.new_decoder_architecture:
        groups = attention.num_kv_heads
        return Projections(groups, {"q": heads // groups * width, "k": width, "v": width})
    return _in_order(heads * width, width, width) if attention.multi_query else _by_head(heads, out)


def _c_attn(attention: Any, out: int) -> Projections | None:
    """GPT-2: thirds. GPT-BigCode: one key and value, or head by head."""
    if getattr(attention, "is_cross_attention", False):
        return None
    if not hasattr(attention, "kv_dim"):
        return _thirds(attention, out)
    if attention.multi_query:
        return _in_order(attention.embed_dim, attention.kv_dim, attention.kv_dim)
    return _by_head(attention.num_heads, out)


FUSED: dict[str, Callable[[Any, int], Projections | None]] = {
    "in_proj": _thirds,
    "qkv": _qkv,
    "qkv_proj": _grouped,
    "query_key_value": _query_key_value,
    "c_attn": _c_attn,
    "Wqkv": _wqkv,
}
