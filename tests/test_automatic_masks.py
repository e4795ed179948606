"""Masks without being asked: what a grid of points finds, what the thresholds drop, crops and their edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sam
import torch

from vlm_adapt.data.long_side import Frame
from vlm_adapt.errors import UserError
from vlm_adapt.models.automatic_masks import AutomaticMasks, FoundMask, box_nms, crops_of
from vlm_adapt.models.promptable import ImageEmbedding, Prediction, Promptable
from vlm_adapt.models.promptable_build import build

LOW = 64  # side of the drawn logits


class Drawn:
    """A model that sees: the mask at a point is all that has the point's colour; green is unstable."""

    side = 256

    def __init__(self) -> None:
        self.images = 0

    def embed(self, pixels_HWC: np.ndarray) -> ImageEmbedding:
        self.images += 1
        frame = Frame.of((pixels_HWC.shape[0], pixels_HWC.shape[1]), self.side)
        return ImageEmbedding(torch.from_numpy(pixels_HWC.copy()), frame)

    def masks(self, embedding: ImageEmbedding, points: np.ndarray, full_size: bool) -> Prediction:
        pixels_HWC, frame = embedding.features_1Dhw.numpy(), embedding.frame
        assert not full_size
        low, iou = [], []
        middles = (np.arange(LOW) + 0.5) * frame.side / LOW
        rows = (middles * frame.original[0] / frame.resized[0]).astype(int)
        columns = (middles * frame.original[1] / frame.resized[1]).astype(int)
        for (x, y), *_ in points:
            colour = pixels_HWC[int(y), int(x)]
            inside = np.zeros((LOW, LOW), bool)
            there = np.ix_(rows < frame.original[0], columns < frame.original[1])
            seen = pixels_HWC[rows[rows < frame.original[0]]][:, columns[columns < frame.original[1]]]
            inside[there] = (seen == colour).all(-1)
            much = 0.5 if tuple(colour) == (0, 255, 0) else 8.0
            logits = torch.from_numpy(np.where(inside, much, -much)).float()
            low.append(torch.stack([logits, logits - 20]))
            iou.append([0.5 if tuple(colour) == (255, 0, 0) else 0.95, 0.99])
        low_PMhw = torch.stack(low)
        return Prediction(low_PMhw, torch.tensor(iou), low_PMhw)

    full_size = Promptable.full_size


def rectangles(
    *given: tuple[int, int, int, int, tuple[int, int, int]], size: tuple[int, int] = (128, 192)
) -> Any:
    pixels = np.full((*size, 3), 40, np.uint8)
    for left, top, right, bottom, colour in given:
        pixels[top:bottom, left:right] = colour
    return pixels


def found(pixels: np.ndarray, **settings: Any) -> list[FoundMask]:
    model: Any = Drawn()
    return AutomaticMasks(**{"points_per_side": 16} | settings)(model, pixels)


def boxes(masks: list[FoundMask]) -> list[tuple[int, ...]]:
    """Boxes to the nearest 4 pixels: the drawn logits are that coarse."""
    return [tuple(4 * round(side / 4) for side in mask.box) for mask in masks]


WHITE, BLUE, RED, GREEN = (255, 255, 255), (0, 0, 255), (255, 0, 0), (0, 255, 0)


def test_each_thing_once_and_in_order() -> None:
    """Red is believed in too little, green is not stable, empty masks are none."""
    pixels = rectangles(
        (24, 24, 72, 72, WHITE), (120, 16, 152, 48, BLUE), (120, 80, 152, 112, RED), (16, 88, 64, 112, GREEN)
    )
    masks = found(pixels)
    assert boxes(masks) == [(0, 0, 192, 128), (24, 24, 72, 72), (120, 16, 152, 48)]
    for mask in masks:
        assert mask.mask_HW.shape == (128, 192) and mask.mask_HW.dtype == bool
        assert mask.area == mask.mask_HW.sum() and mask.predicted_iou == pytest.approx(0.95)
        x, y = (int(value) for value in mask.point)
        assert mask.mask_HW[y, x]
    truth = (pixels == 255).all(-1)
    assert (masks[1].mask_HW & truth).sum() / (masks[1].mask_HW | truth).sum() > 0.9
    assert len(found(pixels, predicted_iou=0.3)) == 4
    assert len(found(pixels, stability=0.0)) == 4
    assert len(found(pixels, min_area=1500)) == 2
    assert len(found(pixels, points_per_side=1)) == 1  # the middle, which is ground


def test_progress_and_batches() -> None:
    told: list[tuple[int, int]] = []
    model: Any = Drawn()
    pixels = rectangles((24, 24, 72, 72, WHITE))
    together = AutomaticMasks(5, at_once=64)(model, pixels)
    apart = AutomaticMasks(5, at_once=10)(model, pixels, lambda done, total: told.append((done, total)))
    assert told == [(10, 25), (20, 25), (25, 25)]
    assert boxes(together) == boxes(apart)
    assert model.images == 2  # the image is embedded once a search


def test_large_images_are_judged_small_and_given_whole() -> None:
    pixels = rectangles((120, 120, 360, 360, WHITE), size=(640, 960))
    masks = found(pixels)
    wanted = [(0, 0, 960, 640), (120, 120, 360, 360)]
    np.testing.assert_allclose([mask.box for mask in masks], wanted, atol=15)  # a place is 15 pixels wide
    assert masks[1].mask_HW.shape == (640, 960)


def test_crops_find_what_the_image_misses() -> None:
    """What an edge of a crop has cut is dropped, and what the crop has whole stays once."""
    pixels = rectangles((99, 69, 111, 81, BLUE), (10, 10, 60, 40, WHITE), size=(240, 240))
    assert len(found(pixels)) == 2  # points lie 15 pixels apart
    model: Any = Drawn()
    # A border of half a pixel is a large part of so small a mask: it is less stable.
    masks = AutomaticMasks(16, stability=0.7, crop_layers=1, min_area=9)(model, pixels)
    assert model.images == 5
    wanted = [(0, 0, 240, 240), (10, 10, 60, 40), (99, 69, 111, 81)]
    np.testing.assert_allclose([mask.box for mask in masks], wanted, atol=4)
    assert not [mask for mask in masks if mask.area < 9]


def test_crop_layout() -> None:
    """As SAM lays them out: 2^layer a side, overlapping by a share of the short side, covering everything."""
    crops = crops_of((480, 640), 2, 512 / 1500)
    assert [layer for _, layer in crops] == [0] + [1] * 4 + [2] * 16
    assert crops[0][0] == (0, 0, 640, 480)
    shared = int(512 / 1500 * 480)
    across, down = -(-(shared + 640) // 2), -(-(shared + 480) // 2)
    assert [box for box, layer in crops if layer == 1] == [
        (left, top, min(left + across, 640), min(top + down, 480))
        for top in (0, down - shared)
        for left in (0, across - shared)
    ]
    for wanted in (1, 2):
        covered = np.zeros((480, 640), bool)
        for box, layer in crops:
            if layer == wanted:
                covered[box[1] : box[3], box[0] : box[2]] = True
        assert covered.all()
    for size in ((1, 1), (1, 50), (3, 2)):
        assert all(box[2] > box[0] and box[3] > box[1] for box, _ in crops_of(size, 3, 0.3))


def test_nms_against_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * 50
    given = torch.cat([corners, corners + torch.rand(60, 2, generator=generator) * 40], dim=1)
    scores = torch.rand(60, generator=generator).round(decimals=1)  # ties: the first stays

    def iou(one: torch.Tensor, two: torch.Tensor) -> float:
        width = min(one[2], two[2]) - max(one[0], two[0])
        height = min(one[3], two[3]) - max(one[1], two[1])
        common = max(width, 0) * max(height, 0)
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
        return float(common / (sum(areas) - common))

    kept: list[int] = []
    for number in sorted(range(60), key=lambda number: -float(scores[number])):
        if all(iou(given[number], given[other]) <= 0.3 for other in kept):
            kept.append(number)
    assert box_nms(given, scores, 0.3).tolist() == kept
    assert 5 < len(kept) < 50
    assert box_nms(torch.zeros(0, 4), torch.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"points_per_side": 0}, "points_per_side is from 1 to 512, not 0"),
        ({"predicted_iou": 1.5}, "predicted_iou"),
        ({"crop_layers": -1}, "crop_layers"),
        ({"min_area": -1}, "min_area"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AutomaticMasks(**settings)


def test_with_a_real_decoder(tmp_path: Path) -> None:
    """Random weights: what is found has the image's size, and finding nothing is fine."""
    model = build(tiny_sam.config(tmp_path), torch.float32).model
    pixels = np.random.default_rng(0).integers(0, 255, (50, 30, 3), np.uint8)
    low: Any = {"predicted_iou": 0.0, "stability": 0.0, "nms": 1.0}
    model.connector.decoder.mask_decoder.iou_prediction_head.proj_out.bias.data += 1
    assert all(mask.mask_HW.shape == (50, 30) for mask in AutomaticMasks(3, **low)(model, pixels))
    model.connector.decoder.mask_decoder.iou_prediction_head.proj_out.bias.data -= 99
    assert AutomaticMasks(3, **low)(model, pixels) == []
    assert AutomaticMasks(3, crop_layers=1, **low)(model, pixels) == []
