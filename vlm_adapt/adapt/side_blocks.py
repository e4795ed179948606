"""Narrower copies of a transformer's blocks, for a side network.

A language's are of the library's own class, so that they take the same masks, rotary angles and cache; a
plain ViT's are our own pre-norm block, whatever library the tower comes from. Knows how blocks are made and
where their layers lie; knows nothing about ladders or training.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.adapt.anatomy import anatomy
from vlm_adapt.adapt.prune import Heads, Kept, linear_layers, matrix, side_heads
from vlm_adapt.errors import UserError

INNER_NAMES = ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size")
HEAD_WIDTHS = ("head_dim", "key_value_proj_dim", "head_size")


@dataclass
class SideBlock:
    """A narrower block, and what it takes to prune the weights it starts from.

    Attributes:
        module: the narrower block, with random weights.
        source: the block that it is pruned from, in the same form.
        kept_heads: the query heads that it keeps, once it is pruned.
    """

    module: nn.Module
    source: nn.Module
    heads: Heads
    side_heads: Heads
    inner: int
    side_inner: int
    width: int
    kept_heads: tuple[int, ...] = ()

    def prune(self, channels_D: Tensor) -> None:
        """Start from the weights that matter most; `channels_D` are the channels of the stream to keep."""
        kept = Kept(
            self.source,
            self.module,
            channels_D,
            self.heads,
            self.side_heads,
            self.inner,
            self.side_inner,
            self.width,
        )
        kept.copy()
        self.kept_heads = tuple(kept.heads)


# Languages ---------------------------------------------------------------------------------------


def language_block(block: nn.Module, number: int, cache_slot: int, r: int, device: torch.device) -> SideBlock:
    """A block of the same class as `block`, every dimension but a head's width divided by r.

    Args:
        number: of the block in its stack; some classes do otherwise in some layers.
        cache_slot: where it keeps keys and values in the cache that the model hands around.

    Raises:
        UserError: the class cannot be made narrower.
    """
    config: Any = next(m.config for m in block.modules() if hasattr(m, "config"))
    width = int(config.hidden_size)
    name = type(block).__name__
    attention: Any = anatomy(block).attention
    head_width = next((int(getattr(attention, n)) for n in HEAD_WIDTHS if hasattr(attention, n)), 0)
    if not head_width:
        raise UserError(f"adapt: side_tuning does not know the heads of a {name}: choose another method")
    heads = Heads(
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_width,
    )
    inner = _inner(block)
    for free in (True, False):
        wanted = side_heads(heads, r, width // r, free)
        reduced = _reduced(config, r, width // r, wanted)
        try:
            with torch.device(device):
                module = _make(type(block), reduced, number)
        except ValueError:  # heads that do not divide the width, where a class insists on it
            continue
        made: Any = anatomy(module).attention
        if any(getattr(made, n, None) == wanted.width for n in HEAD_WIDTHS):
            break
    else:
        raise UserError(f"adapt: side_tuning cannot make a {name} {r} times narrower: choose another r")
    part: Any
    if wanted.width != head_width and getattr(config, "rope_parameters", None):
        raise UserError(
            f"adapt: side_tuning with r {r} would make the heads of a {name} narrower than its rotary "
            f"angles: choose an r that divides its {heads.query} heads"
        )
    for part in module.modules():
        if hasattr(part, "layer_idx"):
            part.layer_idx = cache_slot
    return SideBlock(module.float(), block, heads, wanted, inner, _inner(module), width)


def _reduced(config: Any, r: int, width: int, heads: Heads) -> Any:
    reduced = copy.deepcopy(config)
    reduced.hidden_size = width
    reduced.num_attention_heads = heads.query
    if getattr(config, "num_key_value_heads", None):
        reduced.num_key_value_heads = heads.key
    if not hasattr(config, "d_kv"):
        reduced.head_dim = heads.width
    for name in INNER_NAMES:
        if isinstance(getattr(config, name, None), int):
            setattr(reduced, name, max(1, getattr(config, name) // r))
    return reduced


def _make(kind: type[nn.Module], config: Any, number: int) -> nn.Module:
    known = inspect.signature(kind.__init__).parameters
    more = {name: number for name in ("layer_idx", "layer_id") if name in known}
    return kind(config, **more)


def _inner(block: nn.Module) -> int:
    """Inner units of a block's feed-forward: what its last layer reads."""
    mlp: Any = anatomy(block).mlp
    layers = [
        module
        for name, module in mlp.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and "lora_" not in name
    ]
    return matrix(layers[-1]).shape[1]


# Vision ------------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), then x + feed-forward(norm(x)).

    Args:
        width: channels of the stream; the heads' own width is free.
        activation: of the feed-forward; it has no weights.
    """

    def __init__(self, width: int, heads: Heads, inner: int, activation: nn.Module, eps: float = 1e-6):
        super().__init__()
        self.heads = heads.query
        across = heads.query * heads.width
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, across) for _ in range(3))
        self.out_proj = nn.Linear(across, width)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = copy.deepcopy(activation)  # its own: others may listen to theirs

    def forward(self, hidden_NTD: Tensor) -> Tensor:
        """hidden_NTD to the same shape."""
        normed_NTD = self.norm1(hidden_NTD)
        query, key, value = (
            layer(normed_NTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        hidden_NTD = hidden_NTD + self.out_proj(mixed.transpose(1, 2).flatten(2))
        return hidden_NTD + self.fc2(self.activation(self.fc1(self.norm2(hidden_NTD))))


def vision_block(block: nn.Module, r: int, device: torch.device) -> SideBlock:
    """A PlainBlock r times narrower than a plain ViT's block, from whichever library.

    Raises:
        UserError: the block is of another kind.
    """
    source = canonical(block, device)
    width, inner = source.fc2.out_features, source.fc2.in_features
    heads = Heads(source.heads, source.heads, source.q_proj.out_features // source.heads)
    wanted = side_heads(heads, r, width // r, free_width=True)
    side_inner = max(1, inner // r)
    with torch.device(device):
        module = PlainBlock(width // r, wanted, side_inner, source.activation, source.norm1.eps)
    return SideBlock(module, source, heads, wanted, inner, side_inner, width)


@torch.no_grad()
def canonical(block: nn.Module, device: torch.device) -> PlainBlock:
    """A plain ViT's block with its weights as a PlainBlock, layer scales folded in.

    Rotary angles and norms of queries and keys are left out: a side network finds positions in what the
    backbone hands it.

    Raises:
        UserError: the block has no such attention or feed-forward.
    """
    found = anatomy(block)
    attention: Any = found.attention
    layers = _mlp_layers(found.mlp)
    if attention is None or layers is None or found.attention_norm is None or found.mlp_norm is None:
        raise UserError(
            f"adapt: side_tuning takes blocks with attention and a feed-forward of two layers, each behind a "
            f"norm, not a {type(block).__name__}: choose another method"
        )
    count = next(
        int(getattr(holder, name))
        for holder in (attention, getattr(attention, "config", None), *attention.modules())
        for name in ("num_heads", "num_attention_heads")
        if hasattr(holder, name)
    )
    query, key, value, out = _attention_layers(attention)
    first, last, activation = layers
    across, width = query[0].shape
    first_norm: Any = found.attention_norm
    with torch.device(device):
        eps = float(getattr(first_norm, "eps", 1e-6))
        inner = first.weight.shape[0]
        made = PlainBlock(width, Heads(count, count, across // count), inner, activation, eps)
    scales = (_scale(found.attention_end, attention), _scale(found.mlp_end, found.mlp))
    pairs: list[tuple[Any, tuple[Tensor, Tensor | None], Tensor | None]] = [
        (made.q_proj, query, None),
        (made.k_proj, key, None),
        (made.v_proj, value, None),
        (made.out_proj, out, scales[0]),
        (made.fc1, (first.weight, first.bias), None),
        (made.fc2, (last.weight, last.bias), scales[1]),
    ]
    if device.type == "meta":
        return made
    for target, (weight, bias), scale in pairs:
        target.weight.copy_(weight if scale is None else weight * scale[:, None])
        target.bias.zero_() if bias is None else target.bias.copy_(bias if scale is None else bias * scale)
    norm: Any
    for target, norm in ((made.norm1, found.attention_norm), (made.norm2, found.mlp_norm)):
        target.weight.copy_(norm.weight)
        if getattr(norm, "bias", None) is not None:
            target.bias.copy_(norm.bias)
    return made


def _attention_layers(attention: Any) -> list[tuple[Tensor, Tensor | None]]:
    """(weight, bias) of query, key, value and output."""
    if isinstance(attention, nn.MultiheadAttention):
        fused: Any = attention
        end = fused.out_proj
        return [*_thirds(fused.in_proj_weight, fused.in_proj_bias), (end.weight, end.bias)]
    layers: dict[str, Any] = {
        name.rpartition(".")[2]: m for name, m in attention.named_modules() if isinstance(m, nn.Linear)
    }
    out = next((layers[n] for n in ("o_proj", "out_proj", "proj", "dense") if n in layers), None)
    found: list[tuple[Tensor, Tensor | None]] = []
    if "qkv" in layers:
        found = _thirds(layers["qkv"].weight, layers["qkv"].bias)
    else:
        for names in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            found += [(layers[n].weight, layers[n].bias) for n in names if n in layers]
    if out is None or len(found) != 3:
        raise UserError(
            f"adapt: side_tuning does not know the layers of a {type(attention).__name__}: choose another "
            "method"
        )
    return [*found, (out.weight, out.bias)]


def _thirds(weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    return list(zip(weight.chunk(3), biases, strict=True))


def _mlp_layers(mlp: nn.Module | None) -> tuple[Any, Any, nn.Module] | None:
    """First and last layer of a feed-forward and its activation; None where it is of another kind."""
    if mlp is None:
        return None
    layers = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    if len(layers) != 2 or layers[0].out_features != layers[1].in_features:
        return None
    words = ("gelu", "silu", "relu", "swish", "mish")
    for module in mlp.modules():
        if not list(module.parameters()) and any(word in type(module).__name__.lower() for word in words):
            return layers[0], layers[1], module
    return layers[0], layers[1], nn.GELU()


def _scale(end: Any, sublayer: Any) -> Tensor | None:
    """The layer scale that the sublayer's output passes."""
    if end is None or end is sublayer:
        return None
    return next((p for p in end.parameters() if p.ndim == 1), None)


__all__ = ["PlainBlock", "SideBlock", "canonical", "language_block", "linear_layers", "vision_block"]
