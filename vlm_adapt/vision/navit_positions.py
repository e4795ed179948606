"""Factorised position embeddings: one function of the row, one of the column, put together.

Dehghani et al. 2023, arXiv 2307.06304, section 2.1. Knows coordinates; knows nothing about images or
blocks. A patch's coordinate on an axis is p (its number from 0; `absolute`) or p / side, from 0 to below
1 (`fractional`: how far along the image it lies, whatever the image's size).

    learned     absolute: row p of a table.  fractional: the table read at p/side * (M - 1), linearly between
                its rows (the paper does not say how its learned table is read between entries)
    sinusoidal  [sin(c w_i), cos(c w_i)], w_i = 10000^(-i / (D/2)); c = p, or p/side * M
    fourier     W [cos(2 pi b_i c), sin(2 pi b_i c)], b and W learned, b drawn from N(0, 1) (Tancik et al.
                2020, arXiv 2006.10739); c = p / M * F, or p/side * F

M is `max_side`. F = 8 is the scale at which b's frequencies start: about eight waves along an axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlm_adapt.errors import UserError

COORDINATES = ("absolute", "fractional")
FUNCTIONS = ("learned", "sinusoidal", "fourier")
COMBINATIONS = ("sum", "product", "concat")
FOURIER_SCALE = 8.0


class AxisEmbedding(nn.Module):
    """A function of one coordinate, to D channels.

    Args:
        width: D.
        function, coordinates: see the module.
        max_side: M.
    """

    def __init__(self, width: int, function: str, coordinates: str, max_side: int):
        super().__init__()
        self.function, self.fractional, self.max_side = function, coordinates == "fractional", max_side
        self.width = width
        if function == "learned":
            self.table = nn.Parameter(torch.empty(max_side, width))
            nn.init.trunc_normal_(self.table, std=0.02)
        elif function == "fourier":
            self.frequencies = nn.Parameter(torch.randn(width // 2))
            self.linear = nn.Linear(width // 2 * 2, width, bias=False)
            nn.init.trunc_normal_(self.linear.weight, std=0.02)

    def forward(self, places_T: Tensor, sides_T: Tensor) -> Tensor:
        """Patch numbers along the axis, and the axis' length of each one's image, to [T, D] float32."""
        shares_T = places_T.float() / sides_T
        if self.function == "learned":
            if not self.fractional:
                return self.table[places_T].float()
            at_T = shares_T * (self.max_side - 1)
            low_T = at_T.floor().long()
            above_T1 = (at_T - low_T)[:, None]
            high_T = (low_T + 1).clamp_max(self.max_side - 1)
            return torch.lerp(self.table[low_T].float(), self.table[high_T].float(), above_T1)
        if self.function == "sinusoidal":
            half = self.width // 2
            steps_H = torch.arange(half, device=places_T.device, dtype=torch.float32)
            waves_H = torch.exp(steps_H * (-math.log(10000.0) / half))
            at_T = shares_T * self.max_side if self.fractional else places_T.float()
            angles_TH = at_T[:, None] * waves_H
            return torch.cat([angles_TH.sin(), angles_TH.cos()], dim=1)
        at_T = shares_T if self.fractional else places_T.float() / self.max_side
        angles_TH = 2 * math.pi * FOURIER_SCALE * at_T[:, None] * self.frequencies.float()
        waves_TD = torch.cat([angles_TH.cos(), angles_TH.sin()], dim=1)
        return self.linear(waves_TD.to(self.linear.weight.dtype)).float()


class FactorisedPositions(nn.Module):
    """Embeddings of (row, column), to D channels.

    Args:
        combine: `sum` or `product` of the two axes, or `concat` of two of D/2 channels.
    Raises:
        UserError: unknown names, or a width that the halves do not divide.
    """

    def __init__(self, width: int, function: str, coordinates: str, combine: str, max_side: int):
        super().__init__()
        for what, name, known in (
            ("positions", function, FUNCTIONS),
            ("coordinates", coordinates, COORDINATES),
            ("combine", combine, COMBINATIONS),
        ):
            if name not in known:
                raise UserError(f"unknown {what} '{name}' of navit: choose {', '.join(known)}")
        each = width // 2 if combine == "concat" else width
        if width % 2 or (function != "learned" and each % 2):
            raise UserError(f"navit's width {width} does not split for these positions: take a multiple of 4")
        self.combine = combine
        self.rows = AxisEmbedding(each, function, coordinates, max_side)
        self.columns = AxisEmbedding(each, function, coordinates, max_side)

    def forward(self, coordinates_T2: Tensor, sides_T2: Tensor) -> Tensor:
        """(row, column) of each patch and (rows, columns) of its image, to [T, D] float32."""
        rows_TD = self.rows(coordinates_T2[:, 0], sides_T2[:, 0])
        columns_TD = self.columns(coordinates_T2[:, 1], sides_T2[:, 1])
        if self.combine == "concat":
            return torch.cat([rows_TD, columns_TD], dim=1)
        return rows_TD + columns_TD if self.combine == "sum" else rows_TD * columns_TD
