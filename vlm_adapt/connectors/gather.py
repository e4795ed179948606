"""Features of one or several layers, at different grids and widths, brought together on one grid.

Knows grids and channels; knows nothing about towers or language models. The one place where layers
meet, before whichever connector follows.

    stage 1  56x56x64  --norm--pool--+
    stage 3  14x14x160 --norm--pool--+-- concat --> 7x7x(64+160+320)
    stage 4   7x7x320  --norm--------+

Shapes: N images, P patches of a layer, V channels of all layers together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_adapt.connectors.packed import VARIES
from vlm_adapt.errors import UserError

NORMALISATIONS = ("layer", "data", "none")


class GatherLayers(nn.Module):
    """list of features_NPV, one for each layer, to one features_NPV on a common grid.

    With one layer and neither option it is the identity. It has no parameters, and with `normalise:
    data` it has statistics, which `calibrate` fills and checkpoints keep.

    Args:
        widths, grids: channels and (rows, columns) of each layer; (0, 0) where every image has its own,
            which is then the same in all layers.
        grid: the common (rows, columns), or one number for both; default that of the last layer. Finer
            features are averaged (adaptive average pooling), coarser ones interpolated bilinearly.
        normalise: `layer` gives each token zero mean and unit deviation over channels (layer norm without
            parameters), so that no layer drowns another; `data` gives each channel zero mean and unit
            deviation over the first training images, which also takes away the large constant that
            early layers carry in every channel and that hides what differs between images; `none`.
            True and False are `layer` and `none`. Default: `layer` if there are several layers.
    Attributes:
        width, grid: channels and (rows, columns) that come out.
    Raises:
        UserError: no layers, as many widths as not grids, or an impossible grid.
    """

    def __init__(
        self,
        widths: Sequence[int],
        grids: Sequence[tuple[int, int]],
        grid: int | Sequence[int] | None = None,
        normalise: bool | str | None = None,
    ):
        super().__init__()
        if not widths or len(widths) != len(grids):
            raise UserError(
                f"a connector needs a grid for each layer: {len(widths)} widths, {len(grids)} grids"
            )
        self.widths, self.grids = list(widths), [(int(rows), int(columns)) for rows, columns in grids]
        self.grid = self.grids[-1] if grid is None else _as_grid(grid)
        self.varies = VARIES in self.grids
        if self.varies and set([*self.grids, self.grid]) != {VARIES}:
            raise UserError(
                "a connector's grid is for images of one size, and these have each their own: leave it out"
            )
        if normalise is None or isinstance(normalise, bool):
            normalise = "layer" if (len(widths) > 1 if normalise is None else normalise) else "none"
        if normalise not in NORMALISATIONS:
            raise UserError(
                f"unknown normalise '{normalise}' of a connector: choose {', '.join(NORMALISATIONS)}"
            )
        self.normalise = normalise
        self.calibrated: Tensor
        if normalise == "data":
            self.register_buffer("calibrated", torch.zeros(1))
            for index, width in enumerate(self.widths):
                self.register_buffer(f"mean_{index}", torch.zeros(width))
                self.register_buffer(f"deviation_{index}", torch.ones(width))
        self.width = sum(widths)
        for index, own in enumerate([] if self.varies else self.grids):
            for axis in range(2):
                matrix = resize_matrix(own[axis], self.grid[axis])
                self.register_buffer(f"resize_{index}_{axis}", matrix, persistent=False)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """features_NPV of each layer to features_NPV with all channels; errors name both shapes."""
        if len(features) != len(self.widths):
            raise UserError(f"the connector was built for {len(self.widths)} layers and got {len(features)}")
        gathered = []
        for index, (features_NPV, width, grid) in enumerate(
            zip(features, self.widths, self.grids, strict=True)
        ):
            if self.varies and features_NPV.shape[2] != width:
                raise UserError(
                    f"the connector was built for features of {width} channels "
                    f"and got {features_NPV.shape[2]}"
                )
            if not self.varies and tuple(features_NPV.shape[1:]) != (grid[0] * grid[1], width):
                raise UserError(
                    f"the connector was built for features of {grid[0] * grid[1]} x {width} "
                    f"and got {features_NPV.shape[1]} x {features_NPV.shape[2]}"
                )
            if self.normalise == "layer":
                features_NPV = F.layer_norm(features_NPV, (width,))
            elif self.normalise == "data":
                mean_V, deviation_V = getattr(self, f"mean_{index}"), getattr(self, f"deviation_{index}")
                features_NPV = ((features_NPV - mean_V) / deviation_V).to(features_NPV.dtype)
            gathered.append(self._resize(features_NPV, index))
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered, dim=-1)

    @property
    def wants_data(self) -> bool:
        """Whether `calibrate` is still to come."""
        return self.normalise == "data" and not bool(self.calibrated.item())

    @torch.no_grad()
    def calibrate(self, features: Sequence[Tensor]) -> None:
        """Take each channel's mean and deviation from features_NPV of the first images, a layer each."""
        for index, features_NPV in enumerate(features):
            deviation_V, mean_V = torch.std_mean(features_NPV.float(), dim=(0, 1))
            # Assigned, not copied: a model held in bf16 still keeps its statistics in float32.
            setattr(self, f"mean_{index}", mean_V)
            setattr(self, f"deviation_{index}", deviation_V.clamp_min(1e-4))
        self.calibrated = torch.ones(1, device=self.calibrated.device)

    def _resize(self, features_NPV: Tensor, index: int) -> Tensor:
        if self.grids[index] == self.grid:
            return features_NPV
        (rows, columns), (new_rows, new_columns) = self.grids[index], self.grid
        if rows % new_rows == 0 and columns % new_columns == 0:
            cut = features_NPV.unflatten(1, (new_rows, rows // new_rows, new_columns, columns // new_columns))
            return cut.mean(dim=(2, 4)).flatten(1, 2)
        # As two matrix products: torch's own kernels for this are not deterministic in backward on a GPU.
        with torch.autocast(features_NPV.device.type, enabled=False):
            map_NhwV = features_NPV.float().unflatten(1, (rows, columns))
            rows_oh = getattr(self, f"resize_{index}_0").float()
            columns_ow = getattr(self, f"resize_{index}_1").float()
            map_NhwV = torch.einsum("oh,nhwv->nowv", rows_oh, map_NhwV)
            map_NhwV = torch.einsum("pw,nowv->nopv", columns_ow, map_NhwV)
        return map_NhwV.flatten(1, 2).to(features_NPV.dtype)


def resize_matrix(size: int, new_size: int) -> Tensor:
    """(new_size, size) weights of average pooling (fewer) or bilinear interpolation (more), one axis."""
    eye_1SS = torch.eye(size, dtype=torch.float32, device="cpu")[None]
    if new_size <= size:
        return F.adaptive_avg_pool1d(eye_1SS, new_size)[0].T.contiguous()
    return F.interpolate(eye_1SS, size=new_size, mode="linear", align_corners=False)[0].T.contiguous()


def _as_grid(grid: int | Sequence[int]) -> tuple[int, int]:
    pair = (grid, grid) if isinstance(grid, int) else tuple(grid)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise UserError(f"a connector's grid is one number or [rows, columns] from 1, not {grid}")
    return pair
