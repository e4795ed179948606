"""Rows with prompts put together into a PromptBatch of tensors, and a PromptBatch moved to its device.

Knows shapes and what stands in for a kind of prompt that nobody has; knows nothing about models. Every batch
has every kind of prompt, in one order, so that ranks run the same modules: where a kind has no prompt, one
that weighs nothing.

    N images, P prompts of a kind an image (padded), K points a prompt, h x w target size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_adapt.data.long_side import Frame
from vlm_adapt.data.prompt_draws import IGNORED, POINTS
from vlm_adapt.data.prompt_reader import MASK_SHARE, PromptRow, Target
from vlm_adapt.data.tasks.prompted import KINDS

STAND_IN = "other"  # words of a prompt that weighs nothing
POINTS_OF = {"point": 1, "points": POINTS, "mask": 1}


@dataclass
class PromptGroup:
    """The prompts of one kind.

    Attributes:
        targets_NPhw: uint8: 1 inside, 0 outside, 255 unknown.
        there_NP: false at padding.
        points_NPK2, labels_NPK, boxes_NP4, coarse_NPhw: in pixels of the square; masks uint8, 0 and 1. None
            where the kind has none.
        words: of each image's prompts; empty where the kind has none.
    """

    targets_NPhw: Tensor
    there_NP: Tensor
    points_NPK2: Tensor | None = None
    labels_NPK: Tensor | None = None
    boxes_NP4: Tensor | None = None
    coarse_NPhw: Tensor | None = None
    words: tuple[tuple[str, ...], ...] = ()

    def each(self, change: Callable[[Tensor], Tensor]) -> PromptGroup:
        """The same with changed tensors (moved, pinned)."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


@dataclass
class PromptBatch:
    """What a promptable model reads in one microbatch.

    Attributes:
        pixels_NCHW: uint8 squares; ONE zero image when there is none.
        frames: how each image lies in its square.
        groups: by kind, always all of KINDS and in that order.
        learned: masks that are learned from: what the loss is divided by, over all ranks.
        keys: the samples' keys.
        samples: how many samples of the stream went in.
    """

    pixels_NCHW: Tensor
    frames: tuple[Frame, ...]
    groups: dict[str, PromptGroup]
    learned: int
    keys: tuple[str, ...] = ()
    samples: int = 0

    @property
    def images(self) -> Tensor:
        """What the tower reads."""
        return self.pixels_NCHW

    @property
    def tokens(self) -> int:
        """Prompts that are not padding."""
        return self.learned

    @property
    def places(self) -> int:
        """Prompts, padding included."""
        return sum(group.there_NP.numel() for group in self.groups.values())

    def _each(self, change: Callable[[Tensor], Tensor]) -> PromptBatch:
        groups = {kind: group.each(change) for kind, group in self.groups.items()}
        return replace(self, pixels_NCHW=change(self.pixels_NCHW), groups=groups)

    def to(self, device: torch.device) -> PromptBatch:
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PromptBatch:
        """The batch in page-locked memory, from where a GPU takes it without waiting."""
        return self._each(lambda tensor: tensor.pin_memory())


def collate_prompts(
    rows: Sequence[PromptRow | Sequence[PromptRow]],
    samples: int | None = None,
    image_size: tuple[int, int] = (4, 4),
) -> PromptBatch:
    """Put rows together; no rows at all give one zero image with prompts that weigh nothing.

    Args:
        rows: of squares of one size, or lists of them.
        samples: what `PromptBatch.samples` says; by default the number of images.
        image_size: (height, width) of the square.
    """
    images = [one for row in rows for one in ([row] if isinstance(row, PromptRow) else row)]
    side = image_size[0]
    targets = [one.targets for one in images] or [[]]
    groups = {
        kind: _group(kind, [[one for one in own if one.kind == kind] for own in targets], side)
        for kind in KINDS
    }
    count = len(images) if samples is None else samples
    learned = sum(map(len, targets))
    if not images:
        pixels = torch.zeros(1, 3, *image_size, dtype=torch.uint8)
        return PromptBatch(pixels, (Frame.of(image_size, side),), groups, 0, (), count)
    pixels = torch.from_numpy(np.stack([one.pixels_CHW for one in images]))
    frames = tuple(one.frame for one in images)
    return PromptBatch(pixels, frames, groups, learned, tuple(one.key for one in images), count)


def _group(kind: str, targets: list[list[Target]], side: int) -> PromptGroup:
    """The prompts of one kind of all images, as many for each by padding."""
    images, prompts, small = len(targets), max(1, *map(len, targets)), max(1, side // MASK_SHARE)
    masks = np.full((images, prompts, small, small), IGNORED, np.uint8)
    there = np.zeros((images, prompts), bool)
    points = np.zeros((images, prompts, POINTS_OF.get(kind, 0), 2), np.float32)
    labels = np.ones(points.shape[:-1], np.int64)
    boxes = np.zeros((images, prompts, 4), np.float32)
    boxes[..., 2:] = side
    coarse = np.zeros_like(masks) if kind == "mask" else None
    words = [[STAND_IN] * prompts for _ in targets]
    for image, own in enumerate(targets):
        for place, one in enumerate(own):
            there[image, place], masks[image, place] = True, one.target_hw
            if one.points_K2 is not None:
                points[image, place], labels[image, place] = one.points_K2, one.labels_K
            if one.box_4 is not None:
                boxes[image, place] = one.box_4
            if one.coarse_hw is not None and coarse is not None:
                coarse[image, place] = one.coarse_hw
            words[image][place] = one.words or STAND_IN
    return PromptGroup(
        torch.from_numpy(masks),
        torch.from_numpy(there),
        torch.from_numpy(points) if points.size else None,
        torch.from_numpy(labels) if points.size else None,
        torch.from_numpy(boxes) if kind == "box" else None,
        None if coarse is None else torch.from_numpy(coarse),
        tuple(map(tuple, words)) if kind == "text" else (),
    )
