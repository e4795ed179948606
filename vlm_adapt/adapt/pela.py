"""PELA: a base made smaller, each linear layer two thin ones (Guo et al. 2024, arXiv 2310.10700).

    W (out x in)  ~  U V,   U = U_r sqrt(S_r) (out x r),   V = sqrt(S_r) V_r^T (r x in)

with the r largest singular values: the best approximation of its rank, r (in + out) parameters. Knows linear
layers and singular values; knows nothing about what the part computes.

The paper's feature distillation is the objective `distillation` with `teacher: base` (models/teacher.py): it
compares what the parts give, and a penalty on a method's own parameters sees no inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.lora import choose_layers
from vlm_adapt.adapt.method import Method
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError


class LowRankLinear(nn.Module):
    """Two linear layers in the place of one; the dense one waits outside the model, for switching off.

    Args:
        dense: an nn.Linear, or GPT-2's Conv1D, whose weight lies the other way round.
        rank: r.

    Its bias is the dense layer's own parameter, by its own name. Without values (meta) the factors have none
    either.
    """

    def __init__(self, dense: Any, rank: int):
        super().__init__()
        weight_OI = _weight(dense)
        self.out_features, self.in_features = weight_OI.shape
        made = {"device": weight_OI.device, "dtype": torch.float32}
        self.down = nn.Linear(self.in_features, rank, bias=False, **made)
        self.up = nn.Linear(rank, self.out_features, bias=False, **made)
        if not weight_OI.is_meta:
            up_OR, down_RI = factors(weight_OI.detach().float(), rank)
            self.down.weight.data, self.up.weight.data = down_RI, up_OR
        self.bias = dense.bias
        self.active = True
        self.held: tuple[Any, ...] = (dense,)  # a tuple: not registered, so not counted, moved or sharded

    @property
    def weight(self) -> Tensor:
        """One of the factors, for libraries that ask a layer's weight for its dtype (T5)."""
        return self.up.weight

    def forward(self, input: Tensor) -> Tensor:
        """As the layer that it stands for."""
        if not self.active:
            return self.held[0](input)
        hidden = input
        if not torch.is_autocast_enabled(input.device.type):
            # Beside a frozen base of another dtype, what trains is float32.
            hidden = input.to(next(self.down.parameters()).dtype)
        output = self.up(self.down(hidden))
        if not torch.is_autocast_enabled(input.device.type):
            output = output.to(input.dtype)
        return output if self.bias is None else output + self.bias.to(output.dtype)


def factors(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out x r) and V (r x in) of the truncated singular value decomposition, sqrt(S) in both.

    The largest entry of each row of V is positive: a decomposition leaves signs open, and a method that
    trains on top of frozen factors wants the same ones everywhere.
    """
    left_OK, values_K, right_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    left_OR, right_RI = left_OK[:, :rank], right_KI[:rank]
    sign_R = right_RI.gather(1, right_RI.abs().argmax(1, keepdim=True)).sign()[:, 0]
    scale_R = values_K[:rank].sqrt() * sign_R
    return (left_OR * scale_R).contiguous(), (right_RI * scale_R[:, None]).contiguous()


class Pela(Method):
    """Low-rank layers in the place of a part's linear layers.

    Args:
        ratio: how many times fewer weights a layer gets: r = floor(in out / (ratio (in + out))), at least 1.
        target_modules: `all-linear` (of the part's blocks), a name, or a list of names, as of LoRA.
        frozen: the factors do not train: a smaller base for other methods of the plan. They are not saved
            then, but made again from the base's weights.

    Layers whose weight is read by the block that holds them are left dense: torch's own fused attention, and
    qkv of BEiT and EVA. A bias stays as it is, frozen unless another method trains it.

    Raises:
        UserError: a target matches nothing, or nothing that can be split.
    """

    name = "pela"
    summary = "linear layers as products of two thin ones from their SVD: a smaller base"
    paper = "Guo et al. 2024, arXiv 2310.10700"
    sides = ("vision", "language")
    # Before all others: they find the layers that are there afterwards, in whatever order a plan names them.
    order = -1
    mergeable = True
    identity = False
    example = {"ratio": 3}

    def __init__(
        self, ratio: float = 3.0, target_modules: str | Sequence[str] = "all-linear", frozen: bool = False
    ):
        super().__init__()
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not ratio >= 1:
            raise UserError(f"adapt: pela's ratio is a number from 1, not {ratio!r}")
        if not isinstance(frozen, bool):
            raise UserError(f"adapt: pela's frozen is true or false, not {frozen!r}")
        self.ratio, self.targets, self.frozen = ratio, target_modules, frozen
        self.layers: dict[str, LowRankLinear] = {}

    def attach(self, place: Place) -> None:
        """Put two layers in the place of each; the dense ones stay aside."""
        self.part, inner = place.part, place.inner
        names = [name for name in choose_layers(place, inner, self.targets) if can_split(inner, name)]
        if not names:
            raise UserError(f"adapt: 'pela' finds no linear layer to split in '{place.where}'")
        for name in names:
            dense = inner.get_submodule(name)
            rows, columns = _weight(dense).shape
            layer = LowRankLinear(dense, rank_of(rows, columns, self.ratio))
            if self.frozen:
                for factor in (layer.down, layer.up):
                    factor.weight.data = factor.weight.data.to(_weight(dense).dtype)
            _put(inner, name, layer)
            self.layers[name] = layer
            if not self.frozen:
                self.parameters[f"{name}.down.weight"] = layer.down.get_parameter("weight")
                self.parameters[f"{name}.up.weight"] = layer.up.get_parameter("weight")

    def set_active(self, active: bool) -> None:
        """The factors, or the dense layers, which are brought to the factors' device when first asked for."""
        super().set_active(active)
        for layer in self.layers.values():
            layer.active = active
            if not active:
                layer.held[0].to(layer.up.weight.device)

    def merge(self) -> None:
        """Multiply the factors back into one dense layer of the base's dtype.

        Raises:
            UserError: another method sits on the factors.
        """
        assert self.part is not None
        places = {id(module): name for name, module in self.part.named_modules()}
        for name, layer in self.layers.items():
            if type(layer.down) is not nn.Linear or type(layer.up) is not nn.Linear:
                raise UserError(
                    f"adapt: 'pela' cannot be merged while another method sits on '{name}': merge that first"
                )
        for layer in self.layers.values():
            dense, up_OR = layer.held[0].to(layer.up.weight.device), layer.up.weight.detach()
            weight_OI = _weight(dense)
            weight_OI.data.copy_(up_OR.float() @ layer.down.weight.detach().float())
            _put(self.part, places[id(layer)], dense)
        self.layers, self.parameters = {}, {}


def rank_of(rows: int, columns: int, ratio: float) -> int:
    """The rank at which two factors have `ratio` times fewer weights than rows x columns; at least 1."""
    return max(1, int(rows * columns / (ratio * (rows + columns))))


def can_split(inner: nn.Module, name: str) -> bool:
    """Whether a linear layer is called, and not only its weight read by the block that holds it."""
    parent, _, leaf = name.rpartition(".")
    holder, layer = inner.get_submodule(parent), inner.get_submodule(name)
    if isinstance(holder, nn.MultiheadAttention):
        return False
    if leaf == "qkv" and getattr(holder, "q_bias", None) is not None:
        return False
    return type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"


def _weight(layer: Any) -> Tensor:
    """A layer's weight, out x in."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
