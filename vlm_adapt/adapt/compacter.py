"""Compacter: adapters whose two layers are sums of Kronecker products, with one small factor for all of them.

W = sum_i A_i kron (s_i t_i), i = 1 … n (Karimi Mahabadi et al. 2021, section 4; parametrised hypercomplex
multiplication of Zhang et al. 2021). Knows places of a block; knows nothing about architectures.

    n division, R rank (1 in the paper), I and O features in and out

The A_i [n, n, n] are one parameter that every layer uses. It lives in a module of its own, `Rule`, added to
the first adapted block, and each layer calls that module: so ZeRO-3 gathers it at each use, and its gradient
is the sum over all uses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlm_adapt.adapt.adapters import as_weight
from vlm_adapt.adapt.anatomy import Anatomy
from vlm_adapt.adapt.bottleneck import BottleneckAdapters
from vlm_adapt.errors import UserError


class Rule(nn.Module):
    """The A_i, normal with deviation 0.01 at the start."""

    def __init__(self, division: int, device: torch.device):
        super().__init__()
        self.weight_Nab = nn.Parameter(torch.empty(division, division, division, device=device))
        nn.init.normal_(self.weight_Nab, std=0.01)

    def forward(self) -> Tensor:
        """A copy [n, n, n]: ZeRO-3 takes the parameter's own memory back when this returns."""
        return self.weight_Nab.clone()


class PHMLinear(nn.Module):
    """x W + b with W [I, O] = sum_i A_i kron (s_i t_i); s and t uniform after Glorot (gain sqrt 2), b = 0.

    Args:
        rule: the shared A_i; not a submodule of this one, so that it is listed once.
    """

    def __init__(self, features_in: int, features_out: int, rank: int, rule: Rule, device: torch.device):
        super().__init__()
        self._rule = [rule]
        division = len(rule.weight_Nab)
        self.left_NiR = nn.Parameter(torch.empty(division, features_in // division, rank, device=device))
        self.right_NRo = nn.Parameter(torch.empty(division, rank, features_out // division, device=device))
        self.bias_O = nn.Parameter(torch.zeros(features_out, device=device))
        for factors in (self.left_NiR, self.right_NRo):
            for factor in factors.detach():
                nn.init.xavier_uniform_(factor, gain=math.sqrt(2))

    def forward(self, x_I: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        factors_Nio = self.left_NiR @ self.right_NRo
        rule_Nab = self._rule[0]()
        weight_IO = torch.einsum("nab,nio->aibo", rule_Nab.to(factors_Nio.dtype), factors_Nio)
        weight_IO = weight_IO.flatten(0, 1).flatten(1, 2)
        return nn.functional.linear(as_weight(x_I, weight_IO), weight_IO.T, self.bias_O)


class Compacter(BottleneckAdapters):
    """h + Up(gelu(Down h)) after attention and feed-forward; none after a decoder's cross-attention.

    n^3 + (number of adapters) * (2 (d + b) R + b + d) parameters; the papers' counts have the LayerNorms
    (`layer_norms: true`) too. It starts near the identity, not at it, as in the paper's code.

    Args: see `Adapters`, and
        division: n; width and bottleneck are multiples of it.
        rank: R.

    Raises:
        UserError: n does not divide the bottleneck, or the width.
    """

    name = "compacter"
    summary = "adapters of Kronecker products after attention and feed-forward"
    paper = "Karimi Mahabadi et al. 2021, arXiv 2106.04647"
    sides = ("vision", "connector", "language")
    identity = False
    example = {"bottleneck": 8}  # noqa: RUF012
    needs: tuple[str, ...] = ("attention_end", "mlp_end")
    bottleneck = 24
    activation = "gelu"

    def __init__(
        self,
        bottleneck: int | None = None,
        division: int = 4,
        rank: int = 1,
        activation: str | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
        layer_norms: bool = False,
    ):
        super().__init__(bottleneck, activation, scale, dropout, layer_norms)
        for setting, value in (("division", division), ("rank", rank)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"adapt: {self.name}'s {setting} is a whole number from 1, not {value!r}")
        if self.bottleneck % division:
            raise UserError(
                f"adapt: {self.name}'s bottleneck {self.bottleneck} is no multiple of division {division}"
            )
        self.division, self.rank = division, rank
        self.rule: Rule | None = None

    def insert(self, found: Anatomy, device: torch.device) -> dict[str, nn.Module]:
        """After each of `needs`; the first block holds the rule too."""
        if found.width % self.division:
            raise UserError(
                f"adapt: {self.name}'s division {self.division} does not divide the width {found.width}: "
                "choose a divisor"
            )
        modules: dict[str, nn.Module] = {}
        if self.rule is None:
            modules["rule"] = self.rule = Rule(self.division, device)
        return modules | super().insert(found, device)

    def layers(self, width: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
        """Down and Up of Kronecker products by the shared rule."""
        assert self.rule is not None
        down = PHMLinear(width, self.bottleneck, self.rank, self.rule, device)
        return down, PHMLinear(self.bottleneck, width, self.rank, self.rule, device)


class CompacterPlusPlus(Compacter):
    """As Compacter, after the feed-forward alone. Settings as there."""

    name = "compacter_pp"
    summary = "adapters of Kronecker products after the feed-forward alone (Compacter++)"
    needs = ("mlp_end",)
