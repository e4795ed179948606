"""Any tuner of peft that puts its layers in place of a part's, by its name and settings.

Knows how to inject one, name its tensors as peft's files do, switch it and merge it; knows nothing about what
a tuner computes, nor about the part. The formulas are peft's own and are never rewritten here.

Tensors that a tuner makes but does not train (VeRA's random projections, SHiRA's places) are saved beside
what trains and read back with it: a file holds everything but the base.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt import tuner_layers
from vlm_adapt.adapt.method import Gathered, Method, read_tensors
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.tuner_layers import calm, flat, keeping_flags, names_on
from vlm_adapt.adapt.tuner_targets import choose_layers
from vlm_adapt.errors import UserError
from vlm_adapt.quiet import quiet

ELSEWHERE = {
    "modules_to_save": "train whole modules by a second line, with method 'full'",
    "layers_to_transform": "choose blocks with 'blocks'",
    "layers_pattern": "choose blocks with 'blocks'",
    "trainable_token_indices": "add a second line with method 'trainable_tokens'",
    "layer_replication": "the model keeps its blocks as they are",
    "megatron_config": "its layers are not used here",
    "megatron_core": "its layers are not used here",
    "target_parameters": "name layers with 'target_modules'",
    "inference_mode": "it follows from the run",
    "task_type": "it follows from the model",
}
INTERNAL = (
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "runtime_config",
    "ensure_weight_tying",
    "target_modules",
)


class Tuner(Method):
    """A tuner of peft on layers of a part.

    Args:
        target_modules: `all-linear` (of the part's blocks), a name, or a list of names: a layer is chosen
            when its dotted name ends with one of them; `*` stands for one piece of a name.
        settings: fields of the tuner's own configuration in peft.

    Attributes:
        kind: peft's name of the tuner (`PeftType`).
        layers: kinds of layers it takes (see tuner_targets.KINDS).
        additive: whether it adds something to a layer's output that does not depend on the layer's weight.
        nests: whether it acts around whatever holds the layer already, and does not read the weight itself.
        stacks: whether a layer can hold several of it.
        shares: whether adapters of one model share tensors, so that one tuner must hold them all.
        reads_values: whether making it needs the weights' values, so that shapes alone do not do.

    Raises:
        UserError: peft refuses the settings, or a target matches nothing.
    """

    kind = ""
    order = 1
    mergeable = True
    layers: tuple[str, ...] = ("linear",)
    additive = True
    nests = True
    stacks = True
    shares = False
    reads_values = False
    file_name = "adapter_model.safetensors"

    def __init__(self, target_modules: str | Sequence[str] = "all-linear", **settings: Any):
        super().__init__()
        for key in settings:
            if key in ELSEWHERE:
                raise UserError(f"adapt: '{self.name}' takes no '{key}' here: {ELSEWHERE[key]}")
        if settings.get("bias", "none") != "none":
            raise UserError(f"adapt: '{self.name}' trains no biases: add a second line with method 'bitfit'")
        rank = settings.get("r")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
            raise UserError(f"adapt: r of '{self.name}' is a whole number, not {rank!r}")
        self.targets = target_modules
        self.settings = {key: value for key, value in settings.items() if value is not None}
        self.config: Any = self.configure(["layer"])  # told before a model is loaded
        self.names: list[str] = []
        self.inner: nn.Module = nn.Identity()
        self.adapter = "a0"
        self.fixed: dict[str, tuple[Any, str]] = {}

    @classmethod
    def extra_settings(cls) -> list[str]:
        """The fields of peft's own configuration."""
        with quiet():
            fields = tuner_layers.config_class(cls.kind).__dataclass_fields__
        return [name for name in fields if name not in INTERNAL]

    def configure(self, names: Sequence[str]) -> Any:
        """peft's configuration for these layers.

        Raises:
            UserError: peft refuses the settings.
        """
        try:
            with calm():
                return tuner_layers.config_class(self.kind)(
                    target_modules=list(names), **copy.deepcopy(self.settings)
                )
        except (TypeError, ValueError, ImportError, AssertionError) as error:
            raise UserError(f"adapt: peft refuses these settings of '{self.name}': {flat(error)}") from error

    def attach(self, place: Place) -> None:
        """Put peft's layers in place; the base's weights stay where they are."""
        self.part, self.inner = place.part, place.inner
        self.names = self.choose(place)
        self._check_company()
        self.config = self.configure(self.names)
        known: dict[str, Any] = self.inner.__dict__.setdefault("_peft_adapters", {})
        self.adapter = f"a{len(known)}"
        before = {id(parameter) for parameter in self.inner.parameters()}
        acting = {layer: list(layer.active_adapters) for layer in tuner_layers.find(self.inner)}
        meta = place.device.type == "meta"
        values = (
            tuner_layers.stand_ins(self.inner, self.names) if meta and self.reads_values else nullcontext()
        )
        try:
            with calm(), values:
                tuner = self._inject()
        except (
            TypeError,
            ValueError,
            ImportError,
            AssertionError,
            RuntimeError,
            LookupError,
            AttributeError,
        ) as error:
            # peft says what it cannot take by any of these.
            raise UserError(f"adapt: peft cannot attach '{self.name}' here: {flat(error)}") from error
        if meta:
            tuner_layers.to_meta(self.inner)
        known[self.adapter] = self
        with keeping_flags(self.inner):
            for layer, names in acting.items():
                layer.set_adapter(names + [self.adapter] * (self.adapter in names_on(layer)))
        for layer in self.my_layers():
            tuner_layers.settle(layer, self.adapter)
        self._name_tensors(tuner, before)

    def choose(self, place: Place) -> list[str]:
        """Dotted names, below the inner model, of the layers to hold."""
        return choose_layers(place, self.targets, self.layers, self.name)

    def _inject(self) -> nn.Module:
        """peft's tuner around the inner model; a tuner that shares tensors takes a second adapter itself."""
        from peft import PeftType
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        kind: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType[self.kind]]
        shared: dict[str, Any] = self.inner.__dict__.setdefault("_peft_shared", {})
        try:
            if self.shares and self.kind in shared:
                tuner = shared[self.kind]
                tuner.peft_config[self.adapter] = self.config
                tuner.active_adapter = self.adapter
                tuner.inject_adapter(tuner.model, self.adapter)
            else:
                tuner = kind(self.inner, self.config, self.adapter)
        finally:
            self.inner.__dict__.pop("peft_config", None)  # of one adapter alone; the next one has its own
        if self.shares:
            shared[self.kind] = tuner
        return tuner

    def _name_tensors(self, tuner: nn.Module, before: set[int]) -> None:
        """Fill `parameters` and `fixed` by the keys that peft's own files have."""
        names = list(self.inner.__dict__["_peft_adapters"])
        named, holders = tuner_layers.named_tensors(tuner, names, self.config, self.adapter)
        unshared: dict[int, str] = {}
        for key in sorted(named, key=len):  # what layers share is written once, under the tuner's own name
            unshared.setdefault(id(named[key]), key)
        for key in [key for key in named if unshared[id(named[key])] == key]:
            tensor = named[key]
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in before:
                self.parameters[key] = tensor
            elif id(tensor) in holders and id(tensor) not in before:
                self.fixed[key] = holders[id(tensor)]
        for layer in self.my_layers():
            tuner_layers.hide_buffers(layer)
        trained = {id(tensor) for tensor in self.parameters.values()}
        for name, parameter in self.inner.named_parameters():
            if parameter.requires_grad and id(parameter) not in before | trained:
                raise UserError(
                    f"adapt: with these settings of '{self.name}', peft's file would not hold all that "
                    f"trains ('{name}'): leave out what makes the file smaller"
                )

    def _check_company(self) -> None:
        others = [(n, other) for n in self.names for other in self._others_on(self.inner.get_submodule(n))]
        for name, other in others:
            if other.kind == self.kind and not self.stacks:
                raise UserError(f"adapt: '{name}' has '{self.name}' twice, and peft lets one act: leave one")
            if other.kind != self.kind and not self.nests:
                raise UserError(
                    f"adapt: '{self.name}' must hold the plain layer '{name}', which '{other.name}' holds "
                    f"already: put '{self.name}' first in the list, or give them other layers"
                )

    def _others_on(self, layer: nn.Module) -> list[Tuner]:
        """Other tuners that hold a layer, the innermost first."""
        adapters = self.inner.__dict__.get("_peft_adapters", {})
        found: list[Tuner] = []
        while isinstance(layer, nn.Module):
            here = [method for name, method in adapters.items() if name in names_on(layer)]
            found = [method for method in here if method is not self] + found
            layer = getattr(layer, "base_layer", None)  # type: ignore[assignment]
        return found

    # Files ---------------------------------------------------------------------------------------

    def save(self, folder: Path, tensors: Gathered) -> None:
        """Write peft's own format: `adapter_config.json` and `adapter_model.safetensors`."""
        super().save(folder, {**tensors, **{key: t.cpu() for key, t in self.fixed_tensors().items()}})
        written = self.written_config()
        written.target_modules, written.inference_mode = list(self.names), True
        written.save_pretrained(folder)

    def written_config(self) -> Any:
        """The configuration as a reader of the file needs it."""
        return copy.copy(self.config)

    def fixed_tensors(self) -> dict[str, Tensor]:
        """What is saved and not trained, by file key."""
        return {key: tuner_layers.held(*holder).detach() for key, holder in self.fixed.items()}

    def read(self, folder: Path) -> dict[str, Tensor]:
        """As in Method; tensors that do not train are put in place here."""
        fixed = self.fixed_tensors()
        path = folder / self.file_name
        tensors = read_tensors(path, {**self.parameters, **fixed})
        for key, tensor in fixed.items():
            if tensor.shape != tensors[key].shape:
                raise UserError(f"'{path}': '{key}' has another shape: it belongs to another model")
            tensor.copy_(tensors.pop(key))
        return tensors

    def bytes_stored(self) -> int:
        """As in Method, with what is saved and not trained."""
        fixed = sum(t.numel() * t.element_size() for t in self.fixed_tensors().values())
        return super().bytes_stored() + fixed

    # Together with others ------------------------------------------------------------------------

    def my_layers(self) -> list[Any]:
        """peft's layers that hold this adapter."""
        return [layer for layer in tuner_layers.find(self.inner) if self.adapter in names_on(layer)]

    def set_active(self, active: bool) -> None:
        """As in Method, for this adapter alone."""
        super().set_active(active)
        order = list(self.inner.__dict__["_peft_adapters"])
        with keeping_flags(self.inner):
            for layer in self.my_layers():
                names = {*layer.active_adapters} - {self.adapter} | ({self.adapter} if active else set())
                layer.set_adapter(sorted(names, key=order.index))

    @torch.no_grad()
    def merge(self) -> None:
        """Fold into the base's weights, and put the plain layers back."""
        if not self.mergeable:
            raise UserError(f"'{self.name}' cannot be merged: peft has no merge for it; keep the adapter")
        mine = self.my_layers()
        for layer in mine:
            self._check_merge(layer)
        try:
            with calm():
                tuner_layers.fold(self.inner, mine, self.adapter)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise UserError(f"'{self.name}' cannot be merged: {flat(error)}") from error
        self.inner.__dict__["_peft_adapters"][self.adapter] = None  # a name is used once

    def _check_merge(self, layer: Any) -> None:
        for other in self._others_on(layer):
            if not (self.additive and other.additive):
                raise UserError(
                    f"'{self.name}' cannot be merged around '{other.name}', which is on the same layers and "
                    f"is not a plain sum with it: merge '{other.name}' first, or keep both as adapters"
                )
