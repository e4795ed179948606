"""Low-rank adaptation through peft, on any part.

W + (lora_alpha / r) B A, with A random and B zero at the start (Hu et al. 2021, LoRA, section 4.1).
Knows how to name a part's linear layers to peft and peft's file format; knows nothing about what the
part computes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vlm_adapt.adapt.method import Gathered, Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.choices import nearest
from vlm_adapt.errors import UserError

PREFIX = "base_model.model."  # how peft opens every key of an adapter file


class Lora(Method):
    """LoRA on the linear layers of a part.

    Args:
        r: rank.
        lora_alpha: the update is scaled by lora_alpha / r.
        lora_dropout: dropout on the adapter's input.
        target_modules: `all-linear` (of the part's blocks), a name, or a list of names: a layer is
            chosen when its dotted name ends with one of them.
        settings: further fields of peft's LoraConfig (use_dora, use_rslora, init_lora_weights, …).

    Raises:
        UserError: a target matches nothing, or peft refuses the settings.
    """

    name = "lora"
    summary = "low-rank updates of linear layers (with DoRA, rsLoRA, PiSSA, EVA, LoftQ by peft's settings)"
    paper = "Hu et al. 2021, arXiv 2106.09685"
    order = 1
    mergeable = True
    example = {"r": 4}
    file_name = "adapter_model.safetensors"

    def __init__(
        self,
        r: int = 8,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        **settings: Any,
    ):
        super().__init__()
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise UserError(f"adapt: LoRA's r is a whole number from 1, not {r!r}")
        self.targets = target_modules
        alpha = 2 * r if lora_alpha is None else lora_alpha
        self.settings = {"r": r, "lora_alpha": alpha, "lora_dropout": lora_dropout, **settings}
        self.config: Any = None
        self.adapter = "default"

    @staticmethod
    def extra_settings() -> list[str]:
        """The fields of peft's own configuration."""
        from peft import LoraConfig

        return list(LoraConfig.__dataclass_fields__)

    def attach(self, place: Place) -> None:
        """Inject the adapter; the base's weights stay where they are."""
        from peft import LoraConfig, inject_adapter_in_model

        self.part = part = place.part
        inner = inner_model(part)
        names = choose_layers(place, inner, self.targets)
        try:
            self.config = LoraConfig(target_modules=names, **self.settings)
        except (TypeError, ValueError) as error:
            raise UserError(f"adapt: peft refuses these LoRA settings: {error}") from error
        taken = {key for module in inner.modules() for key in getattr(module, "lora_A", {})}
        self.adapter = next(f"a{n}" for n in range(len(taken) + 1) if f"a{n}" not in taken)
        before = {id(parameter) for parameter in inner.parameters()}
        try:
            inject_adapter_in_model(self.config, inner, adapter_name=self.adapter)
        except ValueError as error:
            raise UserError(f"adapt: peft cannot attach LoRA here: {error}") from error
        module: Any
        for module in inner.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                # Autocast brings input and adapter to one dtype; peft's own cast would copy twice more.
                module.cast_input_dtype_enabled = False
        if taken:
            _activate_all(inner)
        self.parameters = {
            PREFIX + name.replace(f".{self.adapter}.", ".").removesuffix(f".{self.adapter}"): parameter
            for name, parameter in inner.named_parameters()
            if id(parameter) not in before
        }

    def save(self, folder: Path, tensors: Gathered) -> None:
        """Write peft's own format: `adapter_config.json` and `adapter_model.safetensors`."""
        super().save(folder, tensors)
        written = self.config.to_dict() | {"inference_mode": True, "peft_type": "LORA"}
        written = {key: sorted(value) if isinstance(value, set) else value for key, value in written.items()}
        text = json.dumps(written, indent=2, default=str)
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def inner_model(part: nn.Module) -> nn.Module:
    """The library's own model inside a part, so that file keys are those the library's users know."""
    inner = getattr(part, "model", None)
    return inner if isinstance(inner, nn.Module) else part


def choose_layers(place: Place, inner: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Dotted names, below `inner`, of the linear layers that `targets` means.

    Raises:
        UserError: a target matches no layer; the nearest name is given.
    """
    in_blocks = place.inside()
    layers = {
        name: module
        for name, module in inner.named_modules()
        if is_linear(module) and id(module) in in_blocks and "lora_" not in name
    }
    layers = {name.removesuffix(".base_layer"): module for name, module in layers.items()}
    if targets == "all-linear":
        return sorted(layers)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    chosen: set[str] = set()
    for target in wanted:
        found = [name for name in layers if name == target or name.endswith("." + target)]
        if not found:
            endings = sorted({name.rpartition(".")[2] for name in layers})
            hint = nearest(target, endings) or ": there are " + ", ".join(endings)
            raise UserError(f"adapt: target_modules '{target}' matches no layer{hint}")
        chosen.update(found)
    return sorted(chosen)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that peft adapts (GPT-2's Conv1D is one too)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _activate_all(inner: nn.Module) -> None:
    """Let every adapter of a layer add its update, not the newest alone."""
    module: Any
    for module in inner.modules():
        if hasattr(module, "lora_A") and hasattr(module, "set_adapter"):
            module.set_adapter(list(module.lora_A))
