"""Every mask that a promptable model finds in an image without being asked: a grid of points, then selection.

As SAM's automatic mask generator (Kirillov et al. 2023, arXiv 2304.02643, app. B), with its thresholds. Knows
points, scores and boxes; knows nothing about names, colours or files.

Shapes: P masks of H x W pixels, h x w of the decoder's own logits. Boxes are (left, top, right, bottom), the
last two just outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlm_adapt.data.long_side import Frame
from vlm_adapt.errors import UserError
from vlm_adapt.models.promptable import ImageEmbedding, Promptable

Box = tuple[int, int, int, int]
NEAR = 20  # pixels of the image: a mask that ends so near a crop's edge was cut by it


@dataclass(frozen=True)
class FoundMask:
    """A mask of the whole image.

    Attributes:
        mask_HW: bool.
        box: that it fills.
        area: in pixels.
        predicted_iou: what the decoder believes of it.
        stability: IoU of the mask at a higher and at a lower threshold.
        point: (x, y) that prompted it.
    """

    mask_HW: np.ndarray
    box: Box
    area: int
    predicted_iou: float
    stability: float
    point: tuple[float, float]


@dataclass
class _Candidates:
    """What passed the thresholds in a crop: tensors of P rows."""

    low_Phw: Tensor
    iou_P: Tensor
    stability_P: Tensor
    boxes_P4: Tensor
    points_P2: Tensor

    def __getitem__(self, kept: Tensor) -> _Candidates:
        return _Candidates(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))

    @classmethod
    def joined(cls, parts: list[_Candidates]) -> _Candidates:
        names = cls.__dataclass_fields__
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class AutomaticMasks:
    """Settings of the search; call it with a model and an image.

    Args:
        points_per_side: of the grid, on the whole image and on every crop.
        predicted_iou: masks of which the decoder believes less are dropped.
        stability: masks that change more with the threshold are dropped.
        stability_offset: of the logits' threshold, up and down.
        nms: of two masks whose boxes have a larger IoU, the better stays.
        crop_layers: further rounds on 4, 16, ... overlapping crops: finds small things, 4 times as long each.
        crop_overlap: share of the short side that crops of the first round share.
        points_divisor: each further round has so many times fewer points a side.
        min_area: pixels; smaller masks are dropped.
        at_once: points between two reports of progress.

    Raises:
        UserError: a setting out of its range.
    """

    points_per_side: int = 32
    predicted_iou: float = 0.88
    stability: float = 0.95
    stability_offset: float = 1.0
    nms: float = 0.7
    crop_layers: int = 0
    crop_overlap: float = 512 / 1500
    points_divisor: int = 1
    min_area: int = 0
    at_once: int = 64

    def __post_init__(self) -> None:
        for name, low, high in (
            ("points_per_side", 1, 512), ("predicted_iou", 0, 1), ("stability", 0, 1), ("nms", 0, 1),
            ("crop_layers", 0, 4), ("crop_overlap", 0, 0.99), ("points_divisor", 1, 64),
            ("min_area", 0, math.inf), ("at_once", 1, 4096),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"automatic masks: {name} is from {low} to {high}, not {value}")

    @torch.no_grad()
    def __call__(
        self, model: Promptable, pixels_HWC: np.ndarray, progress: Callable[[int, int], None] | None = None
    ) -> list[FoundMask]:
        """The masks of an image, the largest first.

        Args:
            pixels_HWC: uint8.
            progress: told how many of how many points are done.
        """
        size = (pixels_HWC.shape[0], pixels_HWC.shape[1])
        crops = crops_of(size, self.crop_layers, self.crop_overlap)
        sides = [max(1, self.points_per_side // self.points_divisor**layer) for _, layer in crops]
        done, total = 0, sum(side**2 for side in sides)
        parts: list[tuple[_Candidates, Box, Frame]] = []
        for (box, _), side in zip(crops, sides, strict=True):
            left, top, right, bottom = box
            embedding = model.embed(np.ascontiguousarray(pixels_HWC[top:bottom, left:right]))
            found = []
            points_P2 = _grid(side) * np.array([right - left, bottom - top], np.float32)
            for start in range(0, len(points_P2), self.at_once):
                some_P2 = points_P2[start : start + self.at_once]
                found.append(self._candidates(model, embedding, some_P2, box, size))
                done += len(some_P2)
                if progress is not None:
                    progress(done, total)
            candidates = _Candidates.joined(found)
            candidates = candidates[box_nms(candidates.boxes_P4, candidates.iou_P, self.nms)]
            parts.append((candidates, box, embedding.frame))
        if len(parts) > 1:  # of a mask that several crops gave, that of the smallest crop stays
            areas = [float((box[2] - box[0]) * (box[3] - box[1])) for _, box, _ in parts]
            scores = [1 / area + 0 * part.iou_P for (part, _, _), area in zip(parts, areas, strict=True)]
            kept = box_nms(torch.cat([part.boxes_P4 for part, _, _ in parts]), torch.cat(scores), self.nms)
            whose = torch.repeat_interleave(torch.tensor([len(part.iou_P) for part, _, _ in parts]))
            first = np.cumsum([0, *(len(part.iou_P) for part, _, _ in parts)])
            parts = [
                (part[kept[whose[kept] == number] - int(first[number])], box, frame)
                for number, (part, box, frame) in enumerate(parts)
            ]
        masks = [mask for part, box, frame in parts for mask in self._whole(model, part, box, frame, size)]
        return sorted(masks, key=lambda mask: -mask.area)

    def _candidates(
        self,
        model: Promptable,
        embedding: ImageEmbedding,
        points_P2: np.ndarray,
        crop: Box,
        size: tuple[int, int],
    ) -> _Candidates:
        """What the points of one batch give and the thresholds let pass; places are the whole image's."""
        _, iou_PM, low_PMhw = model.masks(embedding, points_P2[:, None], full_size=False)
        asked_P = torch.arange(len(points_P2)).repeat_interleave(iou_PM.shape[1])
        iou_P, low_Phw = iou_PM.flatten().cpu(), low_PMhw.flatten(0, 1).cpu()
        good = (iou_P > self.predicted_iou).nonzero()[:, 0]
        shown = _working(embedding.frame)
        stable, boxes, kept = [], [], []
        for number in good.tolist():
            (logits_HW,) = model.full_size(low_Phw[number][None, None], shown)[0]
            stability, inside_HW = self._stability(logits_HW), logits_HW > 0
            box = _box_of(inside_HW)
            if stability < self.stability or box is None:
                continue
            scale = (
                embedding.frame.original[1] / shown.original[1],
                embedding.frame.original[0] / shown.original[0],
            )
            placed = [box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]]
            whole = [placed[side] + crop[side % 2] for side in range(4)]
            if not _cut(whole, crop, size):
                stable.append(stability)
                boxes.append(whole)
                kept.append(number)
        chosen = torch.tensor(kept, dtype=torch.int64)
        points = torch.from_numpy(points_P2 + np.array(crop[:2], np.float32))
        return _Candidates(
            low_Phw[chosen],
            iou_P[chosen],
            torch.tensor(stable, dtype=torch.float32),
            torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            points[asked_P[chosen]],
        )

    def _stability(self, logits_HW: Tensor) -> float:
        """IoU of the masks at a higher and at a lower threshold; the one lies in the other."""
        inner = int((logits_HW > self.stability_offset).sum())
        outer = int((logits_HW > -self.stability_offset).sum())
        return inner / outer if outer else 0.0

    def _whole(
        self, model: Promptable, part: _Candidates, crop: Box, frame: Frame, size: tuple[int, int]
    ) -> list[FoundMask]:
        """Masks of the whole image."""
        left, top, right, bottom = crop
        masks = []
        for number, low_hw in enumerate(part.low_Phw):
            inside_HW = (model.full_size(low_hw[None, None], frame)[0, 0] > 0).numpy()
            mask_HW = np.zeros(size, bool)
            mask_HW[top:bottom, left:right] = inside_HW
            box, area = _box_of(torch.from_numpy(mask_HW)), int(mask_HW.sum())
            if box is None or area < self.min_area:
                continue
            x, y = part.points_P2[number].tolist()
            scores = float(part.iou_P[number]), float(part.stability_P[number])
            masks.append(FoundMask(mask_HW, box, area, *scores, (x, y)))
        return masks


def _grid(side: int) -> np.ndarray:
    """points_P2 in 0..1, in the middles of side x side fields, row after row."""
    middles = (np.arange(side, dtype=np.float32) + 0.5) / side
    x, y = np.meshgrid(middles, middles)
    return np.stack([x.ravel(), y.ravel()], axis=-1)


def crops_of(size: tuple[int, int], layers: int, overlap: float) -> list[tuple[Box, int]]:
    """(box, layer) of the image itself (layer 0) and of the crops of each further layer: 2^layer a side.

    Args:
        size: (height, width).
        overlap: share of the short side in layer 1; half in each further one.
    """
    height, width = size
    crops: list[tuple[Box, int]] = [((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        count = 2**layer
        shared = int(overlap * min(size) * 2 / count)
        across = math.ceil((shared * (count - 1) + width) / count)
        down = math.ceil((shared * (count - 1) + height) / count)
        for row in range(count):
            for column in range(count):
                left, top = (across - shared) * column, (down - shared) * row
                box = (left, top, min(left + across, width), min(top + down, height))
                if box[2] > left and box[3] > top:  # an image of a few pixels has no such crop
                    crops.append((box, layer))
    return crops


def box_nms(boxes_P4: Tensor, scores_P: Tensor, most: float) -> Tensor:
    """Numbers of the boxes that stay, the best first: none overlaps a better one by an IoU above `most`."""
    order = scores_P.argsort(descending=True, stable=True)
    boxes_P4 = boxes_P4[order]
    areas_P = (boxes_P4[:, 2:] - boxes_P4[:, :2]).prod(1)
    alive_P = torch.ones(len(order), dtype=torch.bool)
    for number in range(len(order)):
        if not alive_P[number]:
            continue
        later = boxes_P4[number + 1 :]
        shared = torch.minimum(boxes_P4[number, 2:], later[:, 2:]) - torch.maximum(
            boxes_P4[number, :2], later[:, :2]
        )
        common = shared.clamp(min=0).prod(1)
        alive_P[number + 1 :] &= common <= most * (areas_P[number] + areas_P[number + 1 :] - common)
    return order[alive_P]


def _working(frame: Frame) -> Frame:
    """The frame at which masks are judged: the image's own size, or the square's where that is smaller."""
    return frame if frame.original[0] <= frame.resized[0] else replace(frame, original=frame.resized)


def _box_of(inside_HW: Tensor) -> Box | None:
    """The box that a mask fills; None for an empty one."""
    rows, columns = inside_HW.any(1).nonzero()[:, 0], inside_HW.any(0).nonzero()[:, 0]
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _cut(box: list[float], crop: Box, size: tuple[int, int]) -> bool:
    """Whether a mask ends at an edge of its crop that is not the image's: another crop has it whole."""
    image = (0, 0, size[1], size[0])
    return any(
        abs(box[side] - crop[side]) <= NEAR and abs(box[side] - image[side]) > NEAR for side in range(4)
    )
