"""The learned frame of pixels: the paper's count, the sum written out, any kind of tower, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny
import torch
from torch.nn.functional import pad

from vlm_adapt.adapt.image_prompt import ImagePrompt
from vlm_adapt.adapt.place import Place
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.vision import build_tower

torch.set_num_threads(1)
LINE = {"method": "image_prompt", "where": "vision", "frame": 2}


@pytest.fixture
def ours(tmp_path: Path) -> Any:
    return rows.assemble(tiny.vit(tmp_path / "vit"), tiny.llama(tmp_path / "llama"))


def lines(*plain: dict[str, Any]) -> list[Adapt]:
    return [Adapt.model_validate(line) for line in plain]


def test_counts() -> None:
    """2 C p (H + W - 2p): 69,840 for 30 pixels around 224 (Bahng et al., section 4), whatever the tower."""
    for name in ("timm:tiny_vit_5m_224", "timm:vit_tiny_patch16_224"):
        with torch.device("meta"):
            tower = build_tower(name, "random:")
        for frame, count in ((30, 69_840), (1, 2 * 3 * 446), (111, 2 * 3 * 111 * 226)):
            method = ImagePrompt(frame)
            method.attach(Place("vision", tower))
            assert sum(p.numel() for p in method.parameters.values()) == count
            assert {p.device.type for p in method.parameters.values()} == {"meta"}


@pytest.mark.parametrize(
    "name", ["tiny_vit_5m_224", "swin_tiny_patch4_window7_224", "convnext_atto", "levit_128s"]
)
def test_the_sum_written_out(name: str) -> None:
    """x + frame, the frame around nothing; zeros change nothing, and switched off it is the tower alone."""
    size = None if name == "levit_128s" else 64
    tower = build_tower(f"timm:{name}", "random:0", image_size=size).requires_grad_(False)
    base = copy.deepcopy(tower)
    pixels_NCHW = torch.randn(2, 3, *tower.image_spec.size, generator=torch.Generator().manual_seed(0))
    method = ImagePrompt(5)
    method.attach(Place("vision", tower))
    plain = base(pixels_NCHW, [0, -1])
    assert all(torch.equal(a, b) for a, b in zip(tower(pixels_NCHW, [0, -1]), plain, strict=True))
    with torch.no_grad():
        for parameter in method.parameters.values():
            parameter.normal_()
    part = {key.removeprefix("image_prompt."): p.detach() for key, p in method.parameters.items()}
    side = pixels_NCHW.shape[-1]
    frame_CHW = (
        pad(part["top"], (0, 0, 0, side - 5))
        + pad(part["bottom"], (0, 0, side - 5, 0))
        + pad(part["left"], (0, side - 5, 5, 5))
        + pad(part["right"], (side - 5, 0, 5, 5))
    )
    assert int((frame_CHW != 0).sum()) == sum(p.numel() for p in part.values())
    found = tower(pixels_NCHW, [0, -1])
    for ours, hand in zip(found, base(pixels_NCHW + frame_CHW, [0, -1]), strict=True):
        torch.testing.assert_close(ours, hand, atol=1e-6, rtol=1e-6)
    sum(feature.square().sum() for feature in found).backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in method.parameters.values())
    assert all(p.grad is None for p in base.parameters())
    method.set_active(False)
    assert all(torch.equal(a, b) for a, b in zip(tower(pixels_NCHW, [0, -1]), plain, strict=True))


def test_the_papers_start() -> None:
    tower = build_tower("timm:tiny_vit_5m_224", "random:0", image_size=64)
    torch.manual_seed(0)
    method = ImagePrompt(16, initial="normal")
    method.attach(Place("vision", tower))
    drawn = torch.cat([p.detach().flatten() for p in method.parameters.values()])
    assert not method.identity and len(drawn) == 2 * 3 * 16 * 96
    # 9,216 draws: mean and deviation of N(0, 1) to four standard errors.
    assert abs(float(drawn.mean())) < 4 / 96 and abs(float(drawn.std()) - 1) < 4 / 96 / 2**0.5


def test_bf16_and_recomputed_blocks() -> None:
    for autocast in (False, True):
        tower = build_tower("timm:tiny_vit_5m_224", "random:0", 64, torch.bfloat16).requires_grad_(False)
        method = ImagePrompt(4)
        method.attach(Place("vision", tower))
        pixels_NCHW = torch.randn(2, 3, 64, 64).bfloat16()
        gradients = []
        for enabled in (False, True):
            tower.set_activation_checkpointing(enabled)
            for parameter in method.parameters.values():
                assert parameter.dtype == torch.float32
                parameter.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                tower(pixels_NCHW)[0].float().square().sum().backward()
            gradients.append([p.grad for p in method.parameters.values()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_training_step_saved_and_read(ours: Any, tmp_path: Path) -> None:
    method = ours.adapt([lines(LINE)]).attached[0].method
    batch = rows.batch(ours, [rows.conversation(ours, "<image>what color is the shape?", "red")])
    before = ours.model.logits(batch)
    optimizer = torch.optim.SGD(method.parameters.values(), lr=0.1)
    ours.model.train()
    first = ours.model(batch)[0]
    first.backward()
    optimizer.step()
    assert ours.model(batch)[0] < first
    ours.model.eval()
    after = ours.model.logits(batch)
    method.save(tmp_path / "frame", {key: p.detach().clone() for key, p in method.parameters.items()})
    with torch.no_grad():
        for parameter in method.parameters.values():
            parameter.zero_()
        assert torch.equal(ours.model.logits(batch), before)
        for key, tensor in method.read(tmp_path / "frame").items():
            method.parameters[key].copy_(tensor)
    assert torch.equal(ours.model.logits(batch), after)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"frame": 0}, "whole number of pixels from 1 as frame, not 0"),
        ({"frame": 8}, "frame of 8 pixels leaves nothing of an image of 16 x 16: choose at most 7"),
        ({"initial": "ones"}, "initial is zeros or normal, not 'ones'"),
        ({"blocks": [0]}, "stands before all blocks: leave blocks out"),
        ({"width": 3}, "has no setting 'width'"),
        ({"where": "connector"}, "is for vision, not for 'connector'"),
    ],
)
def test_bad_settings(ours: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        ours.adapt([lines(LINE | settings)])
    tiny.sentence(caught)
    assert not hasattr(ours.model.vision, "image_prompt")


def test_images_of_many_sizes_have_no_frame() -> None:
    options = {"width": 32, "depth": 2, "heads": 4, "patch": 4}
    tower = build_tower("navit:tiny", "random:0", options=options)
    with pytest.raises(UserError, match="needs images of one size"):
        ImagePrompt(2).attach(Place("vision", tower))
