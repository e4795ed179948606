"""Piggyback: a mask of one bit for each frozen weight, learned through its real-valued self.

The layer multiplies by W * 1[m > 0.005]; m starts at 0.01, so that nothing is masked, and its gradient is
that of the masked weight times W: the threshold is passed as if it were not there (Mallya et al. 2018,
section 3). Knows layers with a weight; knows nothing about what they are for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.bits import bytes_of, pack, unpack
from vlm_adapt.adapt.linear_layers import CONVOLUTION, LINEAR, Layer, find_layers
from vlm_adapt.adapt.method import Gathered, Method, read_tensors
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.weight_change import Change, add_change, merge_change
from vlm_adapt.errors import UserError

START, THRESHOLD = 1e-2, 5e-3
LATENT = "latent.safetensors"


class _Masked(torch.autograd.Function):
    """W * 1[m > THRESHOLD] with the gradient g * W for m."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * (mask > THRESHOLD).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        weight, mask = ctx.saved_tensors
        needs_weight, needs_mask = ctx.needs_input_grad
        of_weight = grad * (mask > THRESHOLD).to(grad.dtype) if needs_weight else None
        return of_weight, (grad * weight).to(mask.dtype) if needs_mask else None


class Mask(Change):
    """A weight times its mask."""

    def __init__(self) -> None:
        super().__init__("piggyback")

    def changed(self, module: nn.Module, weight: Tensor) -> Tensor:
        """As in Change."""
        return _Masked.apply(weight, self.parameter(module, "mask"))


class Piggyback(Method):
    """Masks on frozen weights; biases, norms and batch statistics stay as they are.

    Trained is a float for each weight, stored one bit. A plain gradient step moves a mask by the learning
    rate times g * W; with Adam by about the learning rate, so 1e-3 to 1e-4 is where to start.

    Args:
        target_modules: `all` (linear layers of the blocks, and convolutions), a name, or a list of names.

    Raises:
        UserError: no such layer.
    """

    name = "piggyback"
    summary = "a learned mask of one bit for each frozen weight"
    paper = "Mallya et al. 2018, arXiv 1801.06519"
    order = 2  # after wrappers of layers: the mask is inside of them, and is merged before them
    mergeable = True
    # Not 5e-3: Adam's first step would put half of all masks on the threshold itself.
    example = {"learning_rate": 3e-3}

    def __init__(self, target_modules: str | Sequence[str] = "all"):
        super().__init__()
        self.targets = target_modules
        self.changes: list[tuple[Layer, Mask]] = []

    def attach(self, place: Place) -> None:
        """Put a mask beside each chosen layer's weight."""
        self.part = place.part
        for layer in find_layers(place, self.name, self.targets, LINEAR, CONVOLUTION):
            mask = nn.Parameter(torch.full(layer.weight.shape, START, device=place.device))
            change = Mask()
            add_change(layer.module, layer.leaf, change, {"mask": mask})
            self.changes.append((layer, change))
            self.parameters[f"{layer.name}.mask"] = mask

    def save(self, folder: Path, tensors: Gathered) -> None:
        """One bit for each weight, packed in uint8."""
        super().save(folder, {key: pack(mask > THRESHOLD) for key, mask in tensors.items()})

    def save_latent(self, folder: Path, tensors: Gathered) -> None:
        """The masks as floats."""
        save_floats(folder, tensors)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """As in Method: the floats where they are, else masks of START and 0 that do the same."""
        if (folder / LATENT).is_file():
            return read_tensors(folder / LATENT, self.parameters)
        path = folder / self.file_name
        packed = read_tensors(path, self.parameters)
        return {
            key: unpack_checked(path, key, packed[key], parameter).float() * START
            for key, parameter in self.parameters.items()
        }

    def bytes_stored(self) -> int:
        """An eighth of a byte for each weight."""
        return sum(bytes_of(count_of(mask)) for mask in self.parameters.values())

    def set_active(self, active: bool) -> None:
        """As in Method."""
        super().set_active(active)
        for _, change in self.changes:
            change.active = active

    def merge(self) -> None:
        """Multiply the weights by their masks."""
        for layer, change in self.changes:
            merge_change(layer.module, layer.leaf, change)
        self.changes, self.parameters = [], {}


def save_floats(folder: Path, tensors: Gathered) -> None:
    """Write what is trained, of which `save` keeps bits only."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / LATENT)


def unpack_checked(path: Path, key: str, packed: Tensor, parameter: nn.Parameter) -> Tensor:
    """The bits of a file in a parameter's shape.

    Raises:
        UserError: the file holds another number of them, or no bits.
    """
    wanted = bytes_of(math.prod(parameter.shape))
    if packed.dtype != torch.uint8 or packed.numel() != wanted:
        raise UserError(
            f"'{path}': '{key}' has {packed.numel()} bytes and the model needs {wanted}: "
            "it belongs to another model"
        )
    return unpack(packed, parameter.shape)


def count_of(parameter: nn.Parameter) -> int:
    """How many numbers a parameter has; ZeRO-3 leaves empty shells behind."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
