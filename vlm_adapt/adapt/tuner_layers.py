"""What peft makes of a model, seen from outside: its layers, whose they are, and how to keep it calm.

Knows peft's layers and their names; knows nothing about methods, parts or plans.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.weight_change import own_weights
from vlm_adapt.quiet import quiet

# What peft lets all layers of a model hold together: it names adapters of other layers too.
SHARED = (
    *("vera_A", "vera_B", "pvera_A", "pvera_B", "randlora_A", "randlora_B"),
    *("vblora_vector_bank", "unilora_theta_d", "tinylora_v", "tinylora_P"),
    *("frod_V", "lily_B"),
)


def config_class(kind: str) -> Any:
    """peft's configuration class of a tuner."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]


def find(inner: nn.Module) -> list[Any]:
    """Every layer of peft's below a module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in inner.modules() if isinstance(module, BaseTunerLayer)]


def names_on(layer: Any) -> set[str]:
    """Names of the adapters that a layer of peft's holds itself."""
    own = (*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ()))
    held_: list[Any] = [getattr(layer, name, None) for name in own if name not in SHARED]
    return {name for one in held_ if hasattr(one, "keys") for name in one.keys()}  # noqa: SIM118


def flat(error: BaseException) -> str:
    """An error's message in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@contextmanager
def keeping_flags(inner: nn.Module) -> Iterator[None]:
    """peft makes what is active trainable; what trains is the plan's to say."""
    flags = [(parameter, parameter.requires_grad) for parameter in inner.parameters()]
    yield
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextmanager
def calm() -> Iterator[None]:
    """Without peft's remarks on settings that are decided here, or on a missing CUDA compiler (BOFT)."""
    records = logging.getLogger("torch.utils.cpp_extension")
    level = records.level
    records.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        records.setLevel(level)


def fold(inner: nn.Module, layers: list[Any], adapter: str) -> None:
    """Add an adapter to the base's weights, each in its own dtype, and take it off its layers."""
    for layer in layers:
        weights = [(parameter, parameter.dtype) for parameter in layer.get_base_layer().parameters()]
        with own_weights(layer.get_base_layer()):
            layer.merge(adapter_names=[adapter])
        for parameter, dtype in weights:
            parameter.data = parameter.data.to(dtype)
    parents = [(parent, name, child) for parent in inner.modules() for name, child in parent.named_children()]
    with keeping_flags(inner):
        for layer in layers:
            layer.merged_adapters = [name for name in layer.merged_adapters if name != adapter]
            layer.delete_adapter(adapter)
            if not names_on(layer):
                for parent, name, child in parents:
                    if child is layer:
                        setattr(parent, name, layer.base_layer)


@contextmanager
def stand_ins(inner: nn.Module, names: list[str]) -> Iterator[None]:
    """Weights on the CPU for layers on the meta device, while a tuner that must read values is made."""
    layers: list[Any] = [inner.get_submodule(name) for name in names]
    layers = [layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers]
    kept = [(layer, layer._parameters["weight"]) for layer in layers]
    for layer, weight in kept:
        layer._parameters["weight"] = nn.Parameter(torch.randn(weight.shape), requires_grad=False)
    try:
        yield
    finally:
        for layer, weight in kept:
            layer._parameters["weight"] = weight


def to_meta(inner: nn.Module) -> None:
    """Put parameters that peft made on the CPU onto the meta device, where the rest of the model is."""
    for module in inner.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                flag = parameter.requires_grad
                module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=flag)


def named_tensors(
    tuner: nn.Module, names: list[str], config: Any, adapter: str
) -> tuple[dict[str, Tensor], dict[int, tuple[Any, str]]]:
    """An adapter's tensors by the keys of peft's own files, and where each tensor is held.

    Args:
        names: of all adapters of the model, so that others' tensors are told apart.
        config: peft's, of this adapter.

    Returns:
        (tensors by key; by a tensor's id what holds it, a module or a plain dictionary, and its name there)
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    whole: Any = nn.Module()
    whole.base_model, whole.peft_config = tuner, dict.fromkeys(names, config)
    named = get_peft_model_state_dict(
        whole, state_dict=whole.state_dict(keep_vars=True), adapter_name=adapter, save_embedding_layers=False
    )
    found: dict[int, tuple[Any, str]] = {}
    for module in whole.modules():
        for held_ in (module._parameters, module._buffers):
            found |= {id(tensor): (module, leaf) for leaf, tensor in held_.items() if tensor is not None}
        if isinstance(module, BaseTunerLayer):
            for kept in [kept for kept in module.__dict__.values() if isinstance(kept, dict)]:
                found |= {id(t): (kept, leaf) for leaf, t in kept.items() if isinstance(t, Tensor)}
    return named, found


def held(holder: Any, leaf: str) -> Tensor:
    """The tensor that a holder has under a name."""
    tensor: Tensor = holder[leaf] if isinstance(holder, dict) else getattr(holder, leaf)
    return tensor


def hide_buffers(layer: nn.Module) -> None:
    """Keep what a tuner makes beside its parameters out of the part's own state: the method saves it."""
    for name, child in [("", layer), *layer.named_children()]:
        if name != "base_layer":
            for module in child.modules() if name else [layer]:
                module._non_persistent_buffers_set.update(module._buffers)


def settle(layer: Any, adapter: str) -> None:
    """Raise an adapter's own floats on a layer of peft's, buffers too, and take over the base's mode."""
    layer.train(layer.get_base_layer().training)
    for name, child in layer.named_children():
        if name != "base_layer":
            for module in child.modules():
                for held_ in (module._parameters, module._buffers):
                    for leaf, tensor in held_.items():
                        mine = leaf == adapter or module is not child
                        if tensor is not None and mine and tensor.is_floating_point():
                            tensor.data = tensor.data.float()
