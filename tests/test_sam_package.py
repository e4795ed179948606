"""MobileSAM as its package brings it: against its published forward, against SamModel, and on photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_sam
import torch
from mobile_sam_forward import MobileSam
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from vlm_adapt import weights
from vlm_adapt.data.images import decode
from vlm_adapt.models.promptable import Promptable
from vlm_adapt.models.promptable_build import build
from vlm_adapt.segment.opened import config_of

pytestmark = pytest.mark.network
COCO = Path(__file__).parents[2] / "shared" / "data" / "coco_mini"


@pytest.fixture(scope="module")
def model() -> Promptable:
    return build(config_of("package:mobile-sam"), torch.float32).model


def test_equals_the_published_forward(model: Promptable) -> None:
    """At 1024 pixels windows of 7 and 14 do not divide the maps: they are padded on both sides of this."""
    folder = weights.fetch("mobile-sam-tinyvit")
    original = MobileSam(
        load_file(folder / "model.safetensors"), load_file(folder / "sam_decoder.safetensors")
    )
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 1024, 1024)
    assert model.vision.grids([0, 1, 2, 3]) == [(256, 256), (128, 128), (64, 64), (64, 64)]
    with torch.no_grad():
        features = model.vision(pixels, [2, 3])
        wanted = original.stages(pixels)
        embedding = original.embedding(pixels)
        ours = model.connector.neck(features[1])
    for found, map_NDhw in zip(features, wanted[2:], strict=True):
        scale = map_NDhw.abs().max()
        # float32 sums in another order, through twelve blocks
        torch.testing.assert_close(
            found / scale, map_NDhw.flatten(2).transpose(1, 2) / scale, rtol=0, atol=1e-5
        )
    torch.testing.assert_close(ours, embedding, rtol=0, atol=1e-4)


def test_equals_sam_model(model: Promptable) -> None:
    decoder = model.connector.decoder
    assert sum(one.numel() for one in decoder.mask_decoder.parameters()) == 4_058_340
    assert sum(one.numel() for one in decoder.prompt_encoder.parameters()) == 6_220
    sam = tiny_sam.sam_model(decoder)
    torch.manual_seed(0)
    features = torch.randn(1, 256, 64, 64)
    points, labels = torch.rand(1, 1, 2, 2) * 1024, torch.tensor([[[1, 0]]])
    boxes, masks = torch.tensor([[[100.0, 200, 700, 900]]]), torch.randn(1, 1, 256, 256)
    for ours, theirs in (
        (
            {"points_NPK2": points, "labels_NPK": labels},
            {"input_points": points, "input_labels": labels},
        ),
        ({"boxes_NP4": boxes}, {"input_boxes": boxes}),
        (
            {"points_NPK2": points, "labels_NPK": labels, "boxes_NP4": boxes},
            {"input_points": points, "input_labels": labels, "input_boxes": boxes},
        ),
        ({"boxes_NP4": boxes, "masks_NPHW": masks}, {"input_boxes": boxes, "input_masks": masks}),
    ):
        with torch.no_grad():
            logits, iou = decoder(features, **ours)
            wanted = sam(image_embeddings=features, **theirs)
        torch.testing.assert_close(logits, wanted.pred_masks, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(iou, wanted.iou_scores, rtol=1e-5, atol=1e-5)


def polygons(given: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    canvas = Image.new("L", size)
    for polygon in given:
        ImageDraw.Draw(canvas).polygon(polygon, fill=1, outline=1)
    return np.asarray(canvas) > 0


@pytest.mark.skipif(not COCO.exists(), reason="needs shared/data")
def test_boxes_of_people_on_photographs(model: Promptable) -> None:
    """Boxes of large things give masks as people drew them; so wrong an image road would not."""
    annotations: dict[str, Any] = json.loads((COCO / "annotations" / "instances_val.json").read_text())
    found = []
    for image in annotations["images"][1:4]:
        things = [
            one
            for one in annotations["annotations"]
            if one["image_id"] == image["id"] and not one["iscrowd"] and one["area"] > 48**2
        ]
        if not things:
            continue
        file = next((COCO / "images").glob(f"*/{image['file_name']}"))
        pixels = decode(file.read_bytes())
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in things)]
        made = model.masks(model.embed(pixels), boxes_P4=boxes, multimask=False)
        for number, one in enumerate(things):
            truth = polygons(one["segmentation"], (pixels.shape[1], pixels.shape[0]))
            mask = (made.logits_PMHW[number, 0] > 0).numpy()
            found.append((mask & truth).sum() / (mask | truth).sum())
    assert len(found) > 5
    assert np.mean(found) > 0.65, found  # 0.72 to 0.79 by size over 100 things; polygons are coarse
