"""The stride of a hierarchical encoder's last downsampling: 2 as it was made, 1 for a finer last map.

Knows timm's TinyViT, which MobileSAM runs so (Zhang et al. 2023, arXiv 2306.14289): the same weights, and
a last map twice as fine. Knows nothing of the rest of a tower.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm_adapt.errors import UserError


def set_last_stride(trunk: Any, stride: int, name: str) -> None:
    """Give the convolution of the last downsampling this stride.

    Args:
        trunk: timm's TinyVit.
        stride: 1 or 2; 2 changes nothing.
        name: of the model, for messages.
    Raises:
        UserError: another stride, or an encoder that is no TinyViT.
    """
    if stride not in (1, 2) or isinstance(stride, bool):
        raise UserError(f"last_stride of '{name}' is 1 or 2, not {stride!r}")
    if stride == 2:
        return
    if type(trunk).__name__ != "TinyVit":
        raise UserError(f"last_stride is for TinyViT only, and '{name}' is another encoder: leave it out")
    convolution = trunk.stages[-1].downsample.conv2.conv
    assert isinstance(convolution, nn.Conv2d)
    convolution.stride = (stride, stride)
    info = getattr(trunk.feature_info, "info", trunk.feature_info)
    info[-1]["reduction"] = info[-2]["reduction"]
