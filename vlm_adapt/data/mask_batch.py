"""Rows with masks put together into a MaskBatch of tensors, and a MaskBatch moved to its device.

Knows pictures, masks and label sets; knows nothing about models. Pixels stay uint8 until they are on the
device. Images of one batch may have different label sets, of different length.

    N images of H x W pixels, 3 channels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlm_adapt.data.mask_reader import MaskRow

STAND_IN = ("other",)  # a label set for no image at all: every rank runs the whole model


@dataclass
class MaskBatch:
    """What a segmenter reads in one microbatch.

    Attributes:
        pixels_NCHW: uint8; ONE zero image when there is none, so that every rank runs its model.
        masks_NHW: int16, or int32 where a label set is larger: numbers of the image's own labels; -1 is
            ignored.
        labels: each image's label set.
        valid: how many pixels of each image are not ignored.
        keys: the samples' keys.
        samples: how many samples of the stream went in.
    """

    pixels_NCHW: Tensor
    masks_NHW: Tensor
    labels: tuple[tuple[str, ...], ...]
    valid: tuple[int, ...]
    keys: tuple[str, ...] = ()
    samples: int = 0

    @property
    def images(self) -> Tensor:
        """What the tower reads."""
        return self.pixels_NCHW

    @property
    def learned(self) -> int:
        """Pixels that are learned from: what the loss is divided by, over all ranks."""
        return sum(self.valid)

    @property
    def tokens(self) -> int:
        """The same: pixels that are not padding or ignored."""
        return self.learned

    @property
    def places(self) -> int:
        """Pixels, ignored ones included."""
        return self.masks_NHW.numel()

    def _each(self, change: Callable[[Tensor], Tensor]) -> MaskBatch:
        return replace(self, pixels_NCHW=change(self.pixels_NCHW), masks_NHW=change(self.masks_NHW))

    def to(self, device: torch.device) -> MaskBatch:
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MaskBatch:
        """The batch in page-locked memory, from where a GPU takes it without waiting."""
        return self._each(lambda tensor: tensor.pin_memory())


def collate_masks(
    rows: Sequence[MaskRow | Sequence[MaskRow]],
    samples: int | None = None,
    image_size: tuple[int, int] = (1, 1),
) -> MaskBatch:
    """Put rows together; no rows at all give one zero image without a pixel to learn from.

    Args:
        rows: images of one size, or lists of them.
        samples: what `MaskBatch.samples` says; by default the number of images.
        image_size: (height, width), for the stand-in.
    """
    images = [one for row in rows for one in ([row] if isinstance(row, MaskRow) else row)]
    if not images:
        pixels = torch.zeros(1, 3, *image_size, dtype=torch.uint8)
        masks = torch.full((1, *image_size), -1, dtype=torch.int16)
        return MaskBatch(pixels, masks, (STAND_IN,), (0,), (), samples or 0)
    stacked_NHWC = np.stack([one.pixels_CHW.transpose(1, 2, 0) for one in images])  # as they lie in memory
    kind = np.result_type(*(one.mask_HW.dtype for one in images))
    masks_NHW = np.stack([one.mask_HW.astype(kind, copy=False) for one in images])
    return MaskBatch(
        torch.from_numpy(stacked_NHWC).permute(0, 3, 1, 2),
        torch.from_numpy(masks_NHW),
        tuple(one.labels for one in images),
        tuple(one.learned for one in images),
        tuple(one.key for one in images),
        len(images) if samples is None else samples,
    )
