"""Which layers of a part a tuner of peft can take, by the names that a plan gives them.

Knows kinds of layers and what other tuners hold already; knows nothing about what a tuner does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from vlm_adapt.adapt.place import Place
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

KINDS = {
    "linear": "a linear layer",
    "conv": "a convolution",
    "attention": "a fused attention",
    "embedding": "an embedding",
}


def choose_layers(
    place: Place, targets: str | Sequence[str], kinds: Sequence[str], method: str = "lora"
) -> list[str]:
    """Dotted names, below `place.inner`, of the layers that `targets` means.

    Args:
        targets: `all-linear` (and fused attentions, where the tuner takes them), a name, or names: a layer
            is meant when its dotted name is one or ends with one; `*` stands for one piece of a name.
        kinds: of KINDS, what the tuner can take.

    Raises:
        UserError: a target matches no layer (the nearest name is given) or one the tuner cannot take.
    """
    layers = reachable(place)
    if targets == "all-linear":
        meant = [name for name, kind in layers.items() if kind in kinds and kind in ("linear", "attention")]
        if not meant:
            raise UserError(
                f"adapt: method '{method}' finds no linear layer in '{place.where}': put it on another part, "
                "or on other blocks"
            )
        return sorted(meant)
    prefix = next((f"{name}." for name, m in place.part.named_modules() if m is place.inner and name), "")
    chosen: set[str] = set()
    for target in [targets] if isinstance(targets, str) else list(targets):
        pattern = re.compile(r"(.*\.)?" + re.escape(str(target)).replace(r"\*", r"[^.]*"))
        found = [name for name in layers if pattern.fullmatch(prefix + name)]
        able = [name for name in found if layers[name] in kinds]
        if found and not able:
            raise UserError(
                f"adapt: target_modules '{target}' is {KINDS[layers[found[0]]]}, which '{method}' cannot "
                "adapt: choose another layer or method"
            )
        if not found:
            endings = sorted({name.rpartition(".")[2] for name, kind in layers.items() if kind in kinds})
            hint = nearest(target, endings) or ": there are " + ", ".join(endings)
            raise UserError(f"adapt: target_modules '{target}' matches no layer{hint}")
        chosen.update(able)
    return sorted(chosen)


def reachable(place: Place) -> dict[str, str]:
    """Dotted name below `place.inner` and kind of every layer that is called, in the chosen blocks.

    A layer that another tuner holds keeps its own name. What lies inside a tuner's layer, and what a fused
    attention multiplies by without calling it (its `out_proj`, BEiT's `qkv`), is none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    within = place.inside()
    found: dict[str, str] = {}
    hidden: set[str] = set()
    for name, module in place.inner.named_modules():
        owner = name.rpartition(".")[0]
        if name and (owner in hidden or name in hidden):
            hidden.add(name)
            continue
        base: Any = module
        if isinstance(module, BaseTunerLayer):
            hidden.add(name)
            base = module.get_base_layer()
        elif isinstance(module, nn.MultiheadAttention):
            hidden.add(name)
        elif getattr(module, "q_bias", None) is not None and not getattr(module, "qkv_bias_separate", False):
            hidden.add(f"{name}.qkv")
        kind = kind_of(base)
        if kind and id(module) in within:
            found[name] = kind
    return found


def kind_of(module: nn.Module) -> str:
    """The kind of a layer, or an empty string; GPT-2's Conv1D is a linear layer."""
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else ""
