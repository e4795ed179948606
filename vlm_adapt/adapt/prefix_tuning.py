"""Prefix tuning, also called P-tuning v2: learned keys and values before every text, in every block.

Li and Liang 2021, "Prefix-Tuning"; Liu et al. 2022, "P-Tuning v2". Knows where blocks make keys and values;
knows nothing about masks or caches: the places of a prefix lie in the sequence, and their keys and values
are overwritten where the block has just made them. Every mask, cache and kernel then takes them along.

    out = softmax([P_k; K] . q / sqrt(d_h)) [P_v; V]        n * L * 2 * n_kv * d_h numbers

The places have position 0, where rotary embeddings turn nothing, and the text goes on at n, as in peft. With
position tables or relative biases the place's own position counts. In an encoder-decoder the places are the
encoder's: its self-attention and the decoder's cross-attention have a prefix, the decoder's self-attention
has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.prompt_tuning import SoftPrompt, Vectors, whole
from vlm_adapt.errors import UserError

PAIRS = (("k_proj", "v_proj"), ("k", "v"), ("key", "value"))
KEY_NORMS = ("k_norm", "k_layernorm", "key_norm", "key_layernorm", "k_ln")
VALUE_NORMS = ("v_norm", "value_norm")
QUERY_NORMS = ("q_norm", "q_layernorm", "query_norm", "query_layernorm", "q_ln")
# Projections of queries, keys and values in one, by how their numbers lie; only where we know it.
FUSED = {
    ("gpt2", "c_attn"): "parts",
    ("phi3", "qkv_proj"): "parts",
    ("gpt_neox", "query_key_value"): "heads",
}
CROSS = ("EncDecAttention", "encoder_attn", "cross")


@dataclass(frozen=True)
class Target:
    """Where a block makes its keys, or its values.

    Attributes:
        owner, leaf: the attention, and its layer that gives them: [B, T, X], or behind a norm of heads
            [B, T, H, d_h] or [B, H, T, d_h].
        width: how many numbers they are.
        at: which of X they are, where it holds more.
    """

    owner: nn.Module
    leaf: str
    width: int
    at: Tensor | None = None


class PrefixEncoder(nn.Module):
    """n embeddings through Linear(d, h), tanh, Linear(h, all keys and values); names as in peft."""

    def __init__(self, tokens: int, width: int, hidden: int, out: int, device: Any):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width, device=device)
        self.transform = nn.Sequential(
            nn.Linear(width, hidden, device=device), nn.Tanh(), nn.Linear(hidden, out, device=device)
        )

    def forward(self) -> Tensor:
        """vectors [n, out]: key and value of the first block, of the second, …"""
        places_P = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
        return self.transform(self.embedding(places_P))


class PrefixTuning(SoftPrompt):
    """n learned keys and values in every block.

    Args:
        num_virtual_tokens: n.
        prefix_projection: make them by an MLP, as in Li and Liang; P-tuning v2 mostly does without. The MLP
            is for training: what is saved for use are the keys and values.
        encoder_hidden_size: h of that MLP; by default the language's width.
        init_std: deviation of the first keys and values without the MLP. P-tuning v2 and peft begin with
            1, which an instructed language takes a dozen steps to get over (docs/log.md).
    """

    name = "prefix_tuning"
    summary = "learned keys and values before every text in every block (P-tuning v2)"
    paper = "Li and Liang 2021, arXiv 2101.00190; Liu et al. 2022, arXiv 2110.07602"
    example = {"num_virtual_tokens": 4}
    embeds = False

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        prefix_projection: bool = False,
        encoder_hidden_size: int | None = None,
        init_std: float = 0.2,
    ):
        super().__init__(num_virtual_tokens)
        if not isinstance(prefix_projection, bool):
            raise UserError(
                f"adapt: prefix_tuning's prefix_projection is true or false, not {prefix_projection!r}"
            )
        if encoder_hidden_size is not None:
            whole(self.name, encoder_hidden_size=encoder_hidden_size)
            if not prefix_projection:
                raise UserError("adapt: prefix_tuning's encoder_hidden_size is for prefix_projection: true")
        if isinstance(init_std, bool) or not isinstance(init_std, int | float) or init_std < 0:
            raise UserError(f"adapt: prefix_tuning's init_std is a number from 0, not {init_std!r}")
        self.projected, self.hidden, self.init_std = prefix_projection, encoder_hidden_size, float(init_std)
        self.targets: list[tuple[Target, Target]] = []

    def attach(self, place: Place) -> None:
        """Find where every block makes keys and values, and overwrite them at the prefix's places."""
        part: Any = place.part
        kind = str(part.config.model_type)
        self.targets = [key_value(block, kind, name) for _, name, block in place.blocks()]
        super().attach(place)
        first = 0
        for pair in self.targets:
            for target in pair:
                overwrite = Overwrite(part.prompts, self.prompt, first, target)
                overwrite.follow(target.owner, ())
                target.owner.register_forward_pre_hook(overwrite.follow)
                first += target.width

    @property
    def width(self) -> int:
        """Numbers of a place: the keys and values of all blocks."""
        return sum(target.width for pair in self.targets for target in pair)

    def build(self, device: torch.device | str) -> nn.Module:
        """The keys and values, or what makes them."""
        if not self.projected:
            return Vectors(self.virtual_tokens, self.width, self.init_std, device)
        part: Any = self.part
        width = int(part.width)
        return PrefixEncoder(self.virtual_tokens, width, self.hidden or width, self.width, device)

    def check_length(self, max_length: int) -> None:
        """Refuse texts in which a window of attention leaves the prefix behind."""
        part: Any = self.part
        config = part.config if part is not None else None
        window = int(getattr(config, "sliding_window", None) or 0)
        kinds = set(getattr(config, "layer_types", None) or ())
        if 0 < window < max_length and kinds != {"full_attention"}:
            raise UserError(
                f"adapt: prefix_tuning cannot stay in sight: layers of this language see {window} tokens "
                f"back, and model.language.max_length is {max_length}; set it to {window} or less, or take "
                "prompt_tuning"
            )

    def words(self) -> dict[str, Any]:
        """peft's PREFIX_TUNING, for causal languages whose blocks are alike."""
        part: Any = self.part
        config = part.config
        widths = {target.width for pair in self.targets for target in pair}
        if part.seq2seq or len(widths) > 1:
            return {}
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return {
            "peft_type": "PREFIX_TUNING",
            "token_dim": widths.pop(),
            "num_attention_heads": heads,
            "num_layers": len(self.targets),
            "prefix_projection": False,
            "encoder_hidden_size": None,
        }


class Overwrite:
    """A forward hook that puts some columns of a prompt's vectors in the place of keys, or of values."""

    def __init__(self, prompts: Any, prompt: Any, first: int, target: Target):
        self.prompts, self.prompt, self.target = prompts, prompt, target
        self.columns = slice(first, first + target.width)

    def follow(self, owner: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Hook the layer that the attention has now: methods wrap layers, and merging takes wrappers off."""
        module = getattr(owner, self.target.leaf)
        if self not in module._forward_hooks.values():
            module.register_forward_hook(self)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """The output with the prefix in its places; None (as it was) where no text begins."""
        taken = (self.prompts.current or {}).get(self.prompt)
        if taken is None or module is not getattr(self.target.owner, self.target.leaf):
            return None
        if output.dim() == 3:
            return taken.put(output.flatten(0, 1), self.columns, self.target.at).view_as(output)
        behind = heads_first(inputs[0], self.columns)
        ours = output.transpose(1, 2) if behind else output
        flat = ours.reshape(ours.shape[0] * ours.shape[1], -1)
        new = taken.put(flat, self.columns).view(ours.shape)
        return new.transpose(1, 2) if behind else new


def heads_first(given: Tensor, columns: slice) -> bool:
    """Whether a tensor of heads is [B, H, T, d_h], by its shape, or by how it lies in memory."""
    heads = (columns.stop - columns.start) // given.shape[-1]
    if (given.shape[1] == heads) != (given.shape[2] == heads):
        return given.shape[1] == heads
    return given.stride(1) < given.stride(2)


def key_value(block: nn.Module, kind: str, name: str = "") -> tuple[Target, Target]:
    """Where a block makes its keys and its values; the cross-attention's, where it has one.

    Args:
        kind: the model's type, `llama` say.

    Raises:
        UserError: it is not known where.
    """
    found: list[tuple[str, tuple[Target, Target]]] = []
    for inner, attention in block.named_modules():
        children = dict(attention.named_children())
        for key, value in PAIRS:
            if key in children and value in children:
                found.append((inner, _apart(attention, key, value, kind)))
        for leaf in children:
            if (kind, leaf) in FUSED:
                found.append((inner, _fused(attention, leaf, FUSED[kind, leaf])))
    if len(found) > 1:
        found = [pair for pair in found if any(word in pair[0] for word in CROSS)]
    if len(found) != 1:
        raise UserError(
            f"adapt: prefix_tuning does not know where this language ({kind}) makes keys and values in block "
            f"'{name}': take prompt_tuning, or lora"
        )
    return found[0][1]


def _apart(attention: nn.Module, key: str, value: str, kind: str) -> tuple[Target, Target]:
    children = dict(attention.named_children())
    known = (*KEY_NORMS, *VALUE_NORMS, *QUERY_NORMS)
    for name in children:
        if "norm" in name.lower() and name not in known and not name.startswith(("sub_", "o_")):
            raise UserError(
                f"adapt: prefix_tuning does not know what '{name}' in the attention of {kind} "
                "does to keys and values: take prompt_tuning, or lora"
            )
    widths = out_features(children[key]), out_features(children[value])
    keys = next((name for name in KEY_NORMS if name in children), key)
    values = next((name for name in VALUE_NORMS if name in children), value)
    return Target(attention, keys, widths[0]), Target(attention, values, widths[1])


def _fused(attention: Any, leaf: str, form: str) -> tuple[Target, Target]:
    """Columns of keys and values: `parts` is [queries | keys | values], `heads` the three of each head."""
    out, config = out_features(getattr(attention, leaf)), attention.config
    heads = config.num_attention_heads
    every = torch.arange(out, device="cpu")
    if form == "heads":
        keys, values = every.view(heads, 3, -1)[:, 1].flatten(), every.view(heads, 3, -1)[:, 2].flatten()
    else:
        groups = getattr(config, "num_key_value_heads", None) or heads
        width = out // (heads + 2 * groups) * groups
        keys, values = every[-2 * width : -width], every[-width:]
    return Target(attention, leaf, len(keys), keys), Target(attention, leaf, len(values), values)


def out_features(module: Any) -> int:
    """Outputs of a linear layer, of GPT-2's Conv1D, or of a method's layer around one."""
    for name in ("out_features", "nf"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return out_features(module.base_layer)
