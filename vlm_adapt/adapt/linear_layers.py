"""Which layers of a part multiply by a weight, by the names that a plan gives them.

Knows linear layers, convolutions and the fused attention of torch, and how they are called; knows nothing
about what a method does with them. A layer that its neighbour reads the weight of, without calling it (the
`out_proj` of torch's attention, BEiT's `qkv`), is told apart: a hook on it would never run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from vlm_adapt.adapt.place import Place
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

LINEAR, CONVOLUTION = "linear", "convolution"
OURS = "vlm_adapt.adapt."
ALL = {(LINEAR,): "all-linear", (CONVOLUTION,): "all-conv", (LINEAR, CONVOLUTION): "all"}


@dataclass(frozen=True)
class Layer:
    """A weight and the module that has it.

    Attributes:
        name: dotted name below `Place.inner`, as in the library's own files (of torch's fused attention
            `...attn.in_proj`); file keys are made of it.
        module, leaf: the weight is `module.<leaf>`.
        parent: the module that uses it.
        kind: LINEAR or CONVOLUTION.
        called: whether `module(x)` is x times the weight, so that a hook sees input and output.
        transposed: whether the weight is [in, out] (GPT-2's Conv1D), not [out, in].
    """

    name: str
    module: nn.Module
    leaf: str
    parent: nn.Module
    kind: str
    called: bool = True
    transposed: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """The base's own weight, whatever methods make of it."""
        found = self.module._parameters[self.leaf]
        assert found is not None
        return found

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of a linear layer."""
        rows, columns = self.weight.shape
        return (columns, rows) if self.transposed else (rows, columns)


def find_layers(place: Place, method: str, targets: str | Sequence[str], *kinds: str) -> list[Layer]:
    """The layers that `target_modules` means, in the part's order.

    Linear layers are looked for in the part's blocks (a head is none of them), convolutions everywhere in
    the part unless the plan names blocks: stems and patch embeddings are outside of blocks.

    Args:
        method: for the error's sentence.
        targets: `all-linear`, `all-conv` or `all` (both), a name, or names: a layer is meant when its
            dotted name is one of them or ends with it.
        kinds: LINEAR, CONVOLUTION or both, in this order.

    Raises:
        UserError: a target matches nothing (the nearest is given), or the part has no such layer.
    """
    layers = _layers(place, kinds)
    everything = ALL[kinds]
    if not layers:
        raise UserError(
            f"adapt: method '{method}' finds no {' or '.join(kinds)} layer in '{place.where}': "
            "put it on another part, or on other blocks"
        )
    if targets == everything:
        return layers
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for target in wanted:
        found = [layer.name for layer in layers if ends_with(layer.name, target)]
        if not found:
            endings = sorted({layer.name.rpartition(".")[2] for layer in layers})
            hint = nearest(target, [*endings, everything]) or ": there are " + ", ".join(endings)
            raise UserError(f"adapt: target_modules '{target}' of '{method}' matches no layer{hint}")
        chosen.update(found)
    return [layer for layer in layers if layer.name in chosen]


def ends_with(name: str, target: str) -> bool:
    """Whether a dotted name is `target`, or ends with it after a dot."""
    return name == target or name.endswith("." + target)


def _layers(place: Place, kinds: Sequence[str]) -> list[Layer]:
    in_blocks = place.inside()
    used = {id(module) for name, module in place.part.named_modules() if place.is_used(name)}
    everywhere = in_blocks if place.chosen is not None else used
    found = []
    modules = dict(place.inner.named_modules())
    for name, module in modules.items():
        kind = CONVOLUTION if isinstance(module, nn.Conv2d) else LINEAR
        if kind not in kinds or id(module) not in (everywhere if kind == CONVOLUTION else in_blocks):
            continue
        if not _belongs_to_an_adapter(name, modules):
            plain = name.replace(".base_layer.", ".").removesuffix(".base_layer")
            found += _weights(plain, module, _parent(name, modules))
    return found


def _weights(name: str, module: nn.Module, parent: nn.Module) -> list[Layer]:
    if isinstance(module, nn.Conv2d):
        return [Layer(name, module, "weight", parent, CONVOLUTION)]
    if isinstance(module, nn.Linear):
        read = isinstance(parent, nn.MultiheadAttention) or _reads_the_weight(name, parent)
        return [Layer(name, module, "weight", parent, LINEAR, called=not read)]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return [Layer(name, module, "weight", parent, LINEAR, transposed=True)]
    if isinstance(module, nn.MultiheadAttention):
        leaves = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        leaves = [leaf for leaf in leaves if module._parameters.get(leaf) is not None]
        return [
            Layer(f"{name}.{leaf.removesuffix('_weight')}", module, leaf, module, LINEAR, called=False)
            for leaf in leaves
        ]
    return []


def _reads_the_weight(name: str, parent: nn.Module) -> bool:
    """BEiT, EVA and Swin V2 of timm join the biases of q and v, and multiply by `qkv.weight` themselves."""
    fused = name.rpartition(".")[2] == "qkv" and getattr(parent, "q_bias", None) is not None
    return fused and not getattr(parent, "qkv_bias_separate", False)


def _parent(name: str, modules: dict[str, nn.Module]) -> nn.Module:
    """The module that uses a layer; of a layer that another method wraps, the one around that."""
    name = name.removesuffix(".base_layer")
    return modules[name.rpartition(".")[0]] if name else modules[""]


def _belongs_to_an_adapter(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a module was added by a method: below a layer that peft wraps, yet not the layer itself; or
    below a module of our own methods that does not stand for a layer (as a low-rank base does)."""
    pieces = name.split(".")
    for end in range(1, len(pieces)):
        above = modules[".".join(pieces[:end])]
        if isinstance(getattr(above, "base_layer", None), nn.Module):
            if pieces[end] != "base_layer":
                return True
        elif type(above).__module__.startswith(OURS) and not hasattr(above, "in_features"):
            return True
    return False
