"""Train some of the base's own weights, chosen by what they are: biases, norms, or batch norms.

Knows kinds of modules and parameters; knows nothing about architectures.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm_adapt.adapt.kept import Kept, is_norm_weight, parameters_of
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError


def is_bias(module: nn.Module, leaf: str) -> bool:
    """Whether a parameter is added to a layer's output (tables of position biases are not)."""
    return leaf == "bias" or leaf.endswith("_bias")


def is_batch_norm_weight(module: nn.Module, leaf: str) -> bool:
    """Whether a parameter scales or shifts what a batch norm gives; its statistics are buffers."""
    return isinstance(module, _BatchNorm)


class Selective(Method):
    """What the three have in common: weights of the base train in place."""

    order = 0
    mergeable = True
    missing = ""
    wanted = staticmethod(is_bias)

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept({})

    def attach(self, place: Place) -> None:
        """Name the parameters, and keep the base's values.

        Raises:
            UserError: there are none.
        """
        self.part = place.part
        self.parameters = dict(parameters_of(place, self.wanted))
        if not self.parameters:
            kind = type(place.inner).__name__
            there = "" if place.chosen is None else " in the blocks chosen"
            raise UserError(f"adapt: '{self.name}' on '{place.where}': {kind} has {self.missing}{there}")
        self.kept = Kept(self.parameters)

    def set_active(self, active: bool) -> None:
        """Put the trained values in place, or the base's own."""
        super().set_active(active)
        self.kept.show(active)

    def merge(self) -> None:
        """Nothing to fold: the trained values are the base's from now on."""
        self.set_active(True)
        self.kept, self.parameters = Kept({}), {}


class BitFit(Selective):
    """Biases alone, of all layers and norms; without `blocks`, those outside of the blocks too."""

    name = "bitfit"
    summary = "the biases alone"
    paper = "Ben Zaken et al. 2022, arXiv 2106.10199"
    missing = "no biases: take norm_tuning or lora"

    def attach(self, place: Place) -> None:
        """As the others; the weights of norms whose bias trains become float32 as the bias will.

        No value changes: a norm on the CPU takes no weight and bias of two dtypes, autocast or not.
        """
        super().attach(place)
        trained = {id(parameter) for parameter in self.parameters.values()}
        for module in place.part.modules():
            weight = getattr(module, "weight", None)
            if is_norm_weight(module, "weight") and id(getattr(module, "bias", None)) in trained:
                assert isinstance(weight, nn.Parameter)
                weight.data = weight.data.float()


class NormTuning(Selective):
    """Weights and biases of LayerNorms and RMSNorms; without `blocks`, the final norm's too."""

    name = "norm_tuning"
    summary = "weights and biases of LayerNorms and RMSNorms"
    paper = "Zhao et al. 2023, arXiv 2312.11420"
    missing = "no LayerNorm or RMSNorm with weights: take batch_norm or lora"
    wanted = staticmethod(is_norm_weight)


class BatchNorm(Selective):
    """Weights and biases of batch norms; their running statistics stay those of the base."""

    name = "batch_norm"
    summary = "weights and biases of batch norms, whose statistics stay frozen"
    sides = ("vision",)
    paper = "Frankle et al. 2021, arXiv 2003.00152"
    missing = "no batch norms: take norm_tuning or lora"
    wanted = staticmethod(is_batch_norm_weight)
