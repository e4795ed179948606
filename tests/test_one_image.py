"""The gradient of one image alone is what it is beside others, in towers with batch norms too."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.vision.timm import TimmTower

torch.set_num_threads(1)
NAMES: dict[str, dict[str, Any]] = {
    "tiny_vit_5m_224": {},  # with fewer channels torch takes another way, which is right
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)},
    "efficientnet_b0": {},
    "resnet10t": {},
}


@pytest.mark.parametrize("name", list(NAMES))
def test_one_image_alone(name: str) -> None:
    torch.manual_seed(0)
    tower = TimmTower(timm.create_model(name, num_classes=0, **NAMES[name]), ImageSpec((64, 64))).train()
    pixels_NCHW = torch.randn(3, 3, 64, 64)
    (features_NPD,) = tower(pixels_NCHW, [-1])
    weights_NPD = torch.randn(features_NPD.shape)  # in plain order, as connectors hand gradients back
    found = []
    for shares in ([[0, 1, 2]], [[0, 1], [2]]):
        tower.zero_grad()
        for share in shares:
            (tower(pixels_NCHW[share], [-1])[0] * weights_NPD[share]).sum().backward()
        found.append({key: p.grad.clone() for key, p in tower.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1])
    for key, together in found[0].items():
        # Float32 sums in another order: some 1e-6; the gradient that torch misread was off by its own length.
        assert (found[1][key] - together).norm() <= 1e-4 * together.norm() + 1e-6, key
