"""Structured pruning: what of a transformer's weights a narrower copy of it starts from.

Whole channels, heads and inner units are kept, those whose weights have the largest sum of absolute values
(LST, Sung et al. 2022, section 3.3: the L1 norm of rows and columns). The channels of the residual stream are
the same ones in every block, since the stream joins them; heads and inner units are each block's own. Knows
names and shapes of linear layers; knows nothing about towers, languages or training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.errors import UserError

WIDTH, QUERY, KEY, INNER = "width", "query", "key", "inner"
# Leaf name of a linear layer -> what its outputs are (several where they are fused), and its inputs.
ROLES: dict[str, tuple[tuple[str, ...], str]] = {
    **{name: ((QUERY,), WIDTH) for name in ("q_proj", "q")},
    **{name: ((KEY,), WIDTH) for name in ("k_proj", "v_proj", "k", "v")},
    **{name: ((WIDTH,), QUERY) for name in ("o_proj", "o", "out_proj", "dense", "attn.c_proj")},
    **{name: ((INNER,), WIDTH) for name in ("gate_proj", "up_proj", "fc1", "wi", "wi_0", "wi_1")},
    **{name: ((INNER,), WIDTH) for name in ("c_fc", "dense_h_to_4h")},
    **{name: ((WIDTH,), INNER) for name in ("down_proj", "fc2", "wo", "mlp.c_proj", "dense_4h_to_h")},
    **{name: ((QUERY, KEY, KEY), WIDTH) for name in ("qkv_proj", "c_attn")},
    "gate_up_proj": ((INNER, INNER), WIDTH),
    "query_key_value": ((QUERY, KEY, KEY), WIDTH),  # head by head: see `blocked`
}
NORMS = {"q_norm": QUERY, "k_norm": KEY}  # where they span all heads


@dataclass
class Heads:
    """Heads of attention: how many query and key heads there are, and channels of one."""

    query: int
    key: int
    width: int


def magnitude(weight: Tensor) -> Tensor:
    """Absolute values, the same to the bit whether the base was loaded in float32 or in bfloat16."""
    return weight.detach().to(torch.bfloat16).double().abs()


def top(importance_N: Tensor, count: int) -> Tensor:
    """The `count` most important numbers, in ascending order; of equals the first."""
    order = torch.sort(importance_N, descending=True, stable=True).indices
    return order[:count].sort().values


def matrix(layer: nn.Module) -> Tensor:
    """A linear layer's weight as [out, in] (GPT-2's Conv1D holds [in, out])."""
    weight: Any = layer.weight
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def blocked(name: str, layer: nn.Module, heads: Heads) -> Tensor:
    """Numbers of a layer's outputs, all queries first, then all keys, then all values.

    GPT-NeoX holds them as [heads, 3, width of a head].
    """
    numbers = torch.arange(matrix(layer).shape[0])
    if not name.endswith("query_key_value"):
        return numbers
    return numbers.view(heads.query, 3, heads.width).transpose(0, 1).flatten()


def linear_layers(block: nn.Module) -> Iterable[tuple[str, nn.Module, tuple[tuple[str, ...], str]]]:
    """(dotted name, layer, roles) of each linear layer of a block.

    Raises:
        UserError: a layer's name says nothing about what it does.
    """
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            continue
        if ".lora_" in name:  # another adapter of the same base, which does not act while this one does
            continue
        name = name.removesuffix(".base_layer")
        roles = ROLES.get(".".join(name.split(".")[-2:])) or ROLES.get(name.rpartition(".")[2])
        if roles is None:
            raise UserError(
                f"adapt: side_tuning cannot prune a layer called '{name}': it does not know what its rows "
                "are; say init: random"
            )
        yield name, module, roles


def _roles_by_size(layer: nn.Module, roles: tuple[tuple[str, ...], str], sizes: dict[str, int]) -> list[int]:
    found = [sizes[role] for role in roles[0]]
    if tuple(matrix(layer).shape) != (sum(found), sizes[roles[1]]):
        raise UserError(
            f"adapt: side_tuning cannot prune a layer of shape {tuple(matrix(layer).shape)} where it expects "
            f"({sum(found)}, {sizes[roles[1]]}): say init: random"
        )
    return found


def width_importance(blocks: Sequence[nn.Module], width: int) -> Tensor:
    """How much all layers that read or write the residual stream make of each of its channels."""
    importance_D = torch.zeros(width, dtype=torch.float64)
    for block in blocks:
        for _, layer, (outputs, inputs) in linear_layers(block):
            size = magnitude(matrix(layer))
            if inputs == WIDTH:
                importance_D += size.sum(0).cpu()
            elif outputs == (WIDTH,):
                importance_D += size.sum(1).cpu()
    return importance_D


class Kept:
    """Which rows and columns a narrower copy of a block keeps.

    Args:
        block: the block as it is.
        side: the narrower one, of the same class: its shapes say how many of each are kept.
        channels_D: the channels of the residual stream that are kept.
        heads, side_heads: of both.
        inner, side_inner: inner units of both.
    """

    def __init__(
        self,
        block: nn.Module,
        side: nn.Module,
        channels_D: Tensor,
        heads: Heads,
        side_heads: Heads,
        inner: int,
        side_inner: int,
        width: int,
    ):
        self.block, self.side, self.of, self.side_of = block, side, heads, side_heads
        self.sizes = {
            WIDTH: width,
            QUERY: heads.query * heads.width,
            KEY: heads.key * heads.width,
            INNER: inner,
        }
        by_role = self._importance()
        self.heads, key_heads = choose_heads(by_role[QUERY], by_role[KEY], heads, side_heads)
        self.rows = {
            WIDTH: channels_D,
            QUERY: rows_of(self.heads, heads.width, side_heads.query * side_heads.width),
            KEY: rows_of(key_heads, heads.width, side_heads.key * side_heads.width),
            INNER: top(by_role[INNER], side_inner),
        }

    def _importance(self) -> dict[str, Tensor]:
        found = {role: torch.zeros(size, dtype=torch.float64) for role, size in self.sizes.items()}
        for name, layer, roles in linear_layers(self.block):
            outputs, inputs = roles
            sizes = _roles_by_size(layer, roles, self.sizes)
            pieces = matrix(layer)[blocked(name, layer, self.of)].split(sizes, 0)
            for role, piece in zip(outputs, pieces, strict=True):
                size = magnitude(piece)
                found[role] += size.sum(1).cpu()
                found[inputs] += size.sum(0).cpu()
        return found

    @torch.no_grad()
    def copy(self) -> None:
        """Give the narrower block what it keeps of the block's weights, norms and biases included."""
        side = dict(self.side.named_modules())
        in_layers = set()
        for name, layer, (outputs, inputs) in linear_layers(self.block):
            rows = blocked(name, layer, self.of)[self._fused(outputs)]
            target: Any = side[name]
            places = blocked(name, target, self.side_of)
            matrix(target)[places] = matrix(layer)[rows][:, self.rows[inputs]].to(target.weight.dtype)
            bias: Any = getattr(layer, "bias", None)
            if bias is not None:
                target.bias[places] = bias[rows].to(target.bias.dtype)
            in_layers |= {f"{name}.weight", f"{name}.bias"}
        targets = dict(self.side.named_parameters())
        for name, parameter in self.block.named_parameters():
            if name not in targets or name in in_layers:
                continue
            if parameter.shape == targets[name].shape:
                targets[name].copy_(parameter)
                continue
            fitting = [role for role, size in self.sizes.items() if parameter.shape == (size,)]
            role = NORMS.get(name.split(".")[-2], fitting[0] if fitting else "")
            if role not in fitting:
                raise UserError(f"adapt: side_tuning cannot prune '{name}': say init: random")
            targets[name].copy_(parameter[self.rows[role]])

    def _fused(self, outputs: tuple[str, ...]) -> Tensor:
        found, start = [], 0
        for role in outputs:
            found.append(self.rows[role] + start)
            start += self.sizes[role]
        return torch.cat(found)


def choose_heads(query_Q: Tensor, key_K: Tensor, heads: Heads, side: Heads) -> tuple[list[int], list[int]]:
    """The query heads and the key heads to keep, given what each of their rows matters.

    Query heads that share a key head stay with it.
    """
    by_query = query_Q.view(heads.query, -1).sum(1)
    by_key = key_K.view(heads.key, -1).sum(1)
    share = heads.query // heads.key
    groups = by_key + by_query.view(heads.key, share).sum(1)
    if side.width != heads.width:  # heads of another width: rows are cut from as many heads as it takes
        count = -(-side.query * side.width // heads.width)
        found = top(by_query, min(count, heads.query)).tolist()
        return found, found if share == 1 else top(by_key, -(-side.key * side.width // heads.width)).tolist()
    kept = top(groups, side.key).tolist()
    query = [
        group * share + int(index)
        for group in kept
        for index in top(by_query.view(heads.key, share)[group], side.query // side.key)
    ]
    return query, kept


def rows_of(heads: Sequence[int], width: int, count: int) -> Tensor:
    """The rows of these heads, at most `count`."""
    return torch.tensor([head * width + row for head in heads for row in range(width)])[:count]


def side_heads(heads: Heads, r: int, reduced: int, free_width: bool) -> Heads:
    """Heads of a net r times narrower.

    Args:
        reduced: its width.
        free_width: whether a head is as wide as it was (the rotary embedding's width), or takes an equal
            share of `reduced`.
    """
    key = max(1, heads.key // r)
    query = min(max(key, heads.query // r // key * key), heads.query // heads.key * key)
    if free_width:
        return Heads(query, key, heads.width)
    query = next(count for count in range(query, 0, -1) if reduced % count == 0)
    return Heads(query, query, reduced // query)
