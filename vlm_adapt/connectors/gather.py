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

from vlm_adapt.errors import UserError


class GatherLayers(nn.Module):
    """list of features_NPV, one for each layer, to one features_NPV on a common grid.

    With one layer and neither option it is the identity. It has no parameters.

    Args:
        widths, grids: channels and (rows, columns) of each layer.
        grid: the common (rows, columns), or one number for both; default that of the last layer. Finer
            features are averaged (adaptive average pooling), coarser ones interpolated bilinearly.
        normalise: give each layer's tokens zero mean and unit deviation over channels (layer norm
            without parameters), so that no layer drowns another; default: if there are several.
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
        normalise: bool | None = None,
    ):
        super().__init__()
        if not widths or len(widths) != len(grids):
            raise UserError(
                f"a connector needs a grid for each layer: {len(widths)} widths, {len(grids)} grids"
            )
        self.widths, self.grids = list(widths), [(int(rows), int(columns)) for rows, columns in grids]
        self.grid = self.grids[-1] if grid is None else _as_grid(grid)
        self.normalise = len(widths) > 1 if normalise is None else normalise
        self.width = sum(widths)
        for index, own in enumerate(self.grids):
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
            if tuple(features_NPV.shape[1:]) != (grid[0] * grid[1], width):
                raise UserError(
                    f"the connector was built for features of {grid[0] * grid[1]} x {width} "
                    f"and got {features_NPV.shape[1]} x {features_NPV.shape[2]}"
                )
            if self.normalise:
                features_NPV = F.layer_norm(features_NPV, (width,))
            gathered.append(self._resize(features_NPV, index))
        return gathered[0] if len(gathered) == 1 else torch.cat(gathered, dim=-1)

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
