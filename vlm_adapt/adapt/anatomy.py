"""Where attention and feed-forward are in a transformer block, and what of them meets the residual.

Found by structure and by the names that transformers, timm, open_clip and our own towers give. Knows names of
modules; knows nothing about methods, parts or plans.

    x = x + attention_end(attention(attention_norm(x)))
    x = x + mlp_end(mlp(mlp_norm(x)))

`attention_end` and `mlp_end` are the modules whose output is added to the residual (but for dropout and
stochastic depth): the norm after the sublayer in Gemma 2 and Swin V2, the layer scale in DINOv2, else the
sublayer itself. Scales that are bare parameters (ConvNeXt's gamma) come after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

ATTENTION = ("self_attn", "attention", "attn", "self_attention")
CROSS = ("crossattention", "cross_attn", "encoder_attn", "cross_attention")
MLP = ("mlp", "feed_forward", "ffn", "feedforward", "block_sparse_moe")
ATTENTION_NORMS = (
    "input_layernorm",
    "layernorm_before",
    "layer_norm1",
    "norm1",
    "ln_1",
    "norm_latents",
    "self_attn_layer_norm",
    "attention_norm",
)
MLP_NORMS = (
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "layernorm_after",
    "layer_norm2",
    "norm2",
    "ln_2",
    "final_layer_norm",
    "ffn_norm",
)
CROSS_NORMS = ("ln_cross_attn", "encoder_attn_layer_norm", "layer_norm", "norm_cross")
# What passes the output on, in this order, before it is added.
ATTENTION_ENDS = ("post_self_attn_layernorm", "layer_scale1", "ls1", "ls_1")
MLP_ENDS = ("post_mlp_layernorm", "post_feedforward_layernorm", "layer_scale2", "ls2", "ls_2")


@dataclass(frozen=True)
class Anatomy:
    """The places of a block; each is None where the block has no such thing.

    Attributes:
        attention, cross_attention: the modules that mix tokens. They may return a tuple, output first.
        mlp: the feed-forward; where its layers lie in the block itself (OPT), the last of them.
        attention_norm, mlp_norm, cross_attention_norm: the norm that makes the sublayer's input of the
            residual stream. A parallel block (Phi, Cohere) has one for both. None where the sublayer reads
            the stream itself (norms after the sublayer alone, or after the sum).
        mlp_start: the module whose first input is the feed-forward's (normed) input: `mlp`, but `fc1` in OPT.
        attention_end, mlp_end, cross_attention_end: the modules whose output is added to the residual.
        channels_first: whether the feed-forward works on [N, C, H, W] (ConvNeXt with convolutions) and not
            on [..., C].
        width: channels of the residual stream; 0 where there is neither attention nor feed-forward.
    """

    attention: nn.Module | None = None
    attention_norm: nn.Module | None = None
    attention_end: nn.Module | None = None
    cross_attention: nn.Module | None = None
    cross_attention_norm: nn.Module | None = None
    cross_attention_end: nn.Module | None = None
    mlp: nn.Module | None = None
    mlp_norm: nn.Module | None = None
    mlp_start: nn.Module | None = None
    mlp_end: nn.Module | None = None
    channels_first: bool = False
    width: int = 0

    def __bool__(self) -> bool:
        """Whether anything was found."""
        return self.attention_end is not None or self.mlp_end is not None


def anatomy(block: nn.Module) -> Anatomy:
    """The places of one transformer block; an empty (false) one where it has none that is known."""
    children = dict(block.named_children())
    layers = children.get("layer")
    if isinstance(layers, nn.ModuleList) and len(layers) and hasattr(layers[0], "SelfAttention"):
        return _t5(layers)
    if hasattr(children.get("attention"), "output"):
        return _bert(children)
    if "to_out" in children:
        return _perceiver(children)
    return _usual(block, children)


def anatomies(block: nn.Module, name: str = "") -> Iterator[tuple[str, Anatomy]]:
    """(dotted name, anatomy) of the block, or of the outermost modules within it that have one.

    A connector is one block to a plan; a Q-Former within it has several.

    Args:
        name: the block's own name, which the names given begin with.
    """
    found = anatomy(block)
    if found:
        yield name, found
        return
    for child, module in block.named_children():
        yield from anatomies(module, f"{name}.{child}" if name else child)


def width_of(module: nn.Module | None) -> int:
    """Channels that a norm, a layer or a feed-forward gives; 0 where it does not tell."""
    if module is None:
        return 0
    if is_norm(module):
        weight = getattr(module, "weight", None)
        shape = getattr(module, "normalized_shape", None) if weight is None else weight.shape
        return int(shape[-1]) if shape else 0
    last = 0
    layer: Any
    for layer in module.modules():
        if isinstance(layer, nn.MultiheadAttention):
            return layer.embed_dim
        # peft's layers and open_clip's have these attributes too; GPT-2's Conv1D says `nf`.
        last = getattr(layer, "out_features", None) or getattr(layer, "nf", None) or last
    return last


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a layer norm, an RMS norm, or a norm of batches or groups, by its class."""
    return type(module).__name__.lower().rstrip("0123456789d").endswith("norm")


def _usual(block: nn.Module, children: dict[str, nn.Module]) -> Anatomy:
    attention, cross, mlp = (_first(children, names) for names in (ATTENTION, CROSS, MLP))
    attention_norm, mlp_norm = _first(children, ATTENTION_NORMS), _first(children, MLP_NORMS)
    attention_end, mlp_end = (
        _last(children, names) or module for names, module in ((ATTENTION_ENDS, attention), (MLP_ENDS, mlp))
    )
    mlp_start = mlp
    if "post_feedforward_layernorm" in children:  # Gemma 2, OLMo 2: the norm follows the attention
        attention_end = children.get("post_attention_layernorm", attention_end)
        mlp_norm = children.get("pre_feedforward_layernorm")
    order = list(children)
    if "norm1" in children and "attn" in children and order.index("attn") < order.index("norm1"):
        # timm lists them in the order of use: here norms come after the sublayer (Swin V2)
        attention_norm, mlp_norm, attention_end, mlp_end = None, None, children["norm1"], children["norm2"]
        attention_end, mlp_end = children.get("ls1", attention_end), children.get("ls2", mlp_end)
    elif mlp is not None and attention is None and mlp_norm is None:
        mlp_norm = children.get("norm")  # ConvNeXt
    if mlp is None and {"fc1", "fc2"} <= set(children):  # OPT
        mlp_start, mlp, mlp_end = children["fc1"], children["fc2"], children["fc2"]
        if not getattr(block, "do_layer_norm_before", True):
            attention_norm, mlp_norm = None, None  # OPT 350 M: norms follow the sums
    if mlp is not None and mlp_norm is None and mlp_end is mlp:
        inner = list(mlp.named_children())
        if inner and inner[0][0] in ("norm", "0") and is_norm(inner[0][1]) and len(inner) > 1:
            mlp_norm, mlp_start = inner[0][1], inner[1][1]  # TinyViT
        elif attention_norm is not None:
            mlp_norm = attention_norm  # parallel blocks share it
    return Anatomy(
        attention=attention,
        attention_norm=attention_norm,
        attention_end=attention_end,
        cross_attention=cross,
        cross_attention_norm=None if cross is None else _first(children, CROSS_NORMS),
        cross_attention_end=cross,
        mlp=mlp,
        mlp_norm=mlp_norm,
        mlp_start=mlp_start,
        mlp_end=mlp_end,
        channels_first=any(isinstance(layer, nn.Conv2d) for layer in (mlp.modules() if mlp else ())),
        width=_width(mlp_end, mlp_norm, attention_norm, attention_end),
    )


def _t5(layers: Any) -> Anatomy:
    first, last = layers[0], layers[-1]
    cross = layers[1] if hasattr(layers[1], "EncDecAttention") else None
    mlp = getattr(last, "DenseReluDense", None)
    return Anatomy(
        attention=first.SelfAttention,
        attention_norm=first.layer_norm,
        attention_end=first.SelfAttention,
        cross_attention=None if cross is None else cross.EncDecAttention,
        cross_attention_norm=None if cross is None else cross.layer_norm,
        cross_attention_end=None if cross is None else cross.EncDecAttention,
        mlp=mlp,
        mlp_norm=None if mlp is None else last.layer_norm,
        mlp_start=mlp,
        mlp_end=mlp,
        width=width_of(first.layer_norm),
    )


def _bert(children: dict[str, nn.Module]) -> Anatomy:
    """Norms after the sum, inside the sublayers (Q-Former): their last Linear is what is added."""
    attention, cross = children["attention"], children.get("crossattention")
    start = children.get("intermediate_query", children.get("intermediate"))
    end = getattr(children.get("output_query", children.get("output")), "dense", None)
    attention_end, cross_end = (
        getattr(getattr(module, "output", None), "dense", module) for module in (attention, cross)
    )
    return Anatomy(
        attention=attention,
        attention_end=attention_end,
        cross_attention=cross,
        cross_attention_end=cross_end,
        mlp=end,
        mlp_start=start,
        mlp_end=end,
        width=_width(end, attention_end),
    )


def _perceiver(children: dict[str, nn.Module]) -> Anatomy:
    """Our resampler: the attention's layers lie in the block, the feed-forward begins with its norm."""
    feed_forward = children["feed_forward"]
    norm, start, *_ = feed_forward.children()
    return Anatomy(
        attention=children["to_out"],
        attention_norm=children["norm_latents"],
        attention_end=children["to_out"],
        mlp=feed_forward,
        mlp_norm=norm,
        mlp_start=start,
        mlp_end=feed_forward,
        width=width_of(norm),
    )


def _first(children: dict[str, nn.Module], names: tuple[str, ...]) -> nn.Module | None:
    return next((children[name] for name in names if name in children), None)


def _last(children: dict[str, nn.Module], names: tuple[str, ...]) -> nn.Module | None:
    return next((children[name] for name in reversed(names) if name in children), None)


def _width(*modules: nn.Module | None) -> int:
    return next((width for width in map(width_of, modules) if width), 0)
