"""Visual prompts in a whole model, in half precision, in files, and where they cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import rows
import timm
import tiny
import torch
from test_visual_prompt import PIXELS, SMALL, attach, folder, meta, tower_of

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.visual_prompt import VisualPrompt
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.train.prepare import cache_features
from vlm_adapt.vision.timm import TimmTower

__all__ = ["folder"]  # a fixture
LINE = {"method": "visual_prompt", "where": "vision", "tokens": 3}


def lines(*plain: dict[str, Any]) -> list[Adapt]:
    return [Adapt.model_validate(line) for line in plain]


@pytest.fixture
def ours(tmp_path: Path) -> Any:
    return rows.assemble(tiny.vit(tmp_path / "vit"), tiny.llama(tmp_path / "llama"), layers=[-2])


def a_batch(ours: Any) -> Any:
    talks = [["<image>what color is the shape?", "red"], ["no", "yes"]]
    return rows.batch(ours, [rows.conversation(ours, *talk, seed=i) for i, talk in enumerate(talks)])


def test_a_training_step(ours: Any) -> None:
    """Beside LoRA on one tower: steps move the prompts, not the base; a block that does not run has none."""
    plan = ours.adapt([lines({"method": "lora", "where": "vision", "r": 2}, LINE)])
    prompts = plan.attached[1].method.parameters
    assert list(prompts) == ["layers.0.visual_prompt.prompts"]  # layers [-2] of two blocks
    assert {row["part"]: row["method"] for row in plan.table()}["vision"] == "lora, visual_prompt"
    trained = [p for item in plan.attached for p in item.method.parameters.values()]
    frozen = {n: p.clone() for n, p in ours.model.named_parameters() if not any(p is one for one in trained)}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch, losses = a_batch(ours), []
    ours.model.train()
    for _ in range(4):
        total, _ = ours.model(batch)
        total.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    assert losses[-1] < losses[0]
    named = dict(ours.model.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in frozen.items())


def test_trained_prompts_are_no_frozen_features(ours: Any) -> None:
    """Features are kept while an earlier stage's prompts stand still, and never while they train."""
    ours.adapt([lines(LINE)])
    with pytest.raises(UserError, match="needs a frozen tower"):
        cache_features(ours, 10, 0)
    full = lines({"method": "full", "where": "connector"})
    ours.adapt([lines(LINE), full])
    cache_features(ours, 10, 0)
    batch = a_batch(ours)
    first = ours.model.logits(batch)
    assert len(ours.model.feature_cache.kept) and torch.equal(ours.model.logits(batch), first)


def test_saved_and_read(ours: Any, tmp_path: Path) -> None:
    plan = ours.adapt([lines(LINE)])
    batch, method = a_batch(ours), plan.attached[0].method
    before = ours.model.logits(batch)
    method.save(tmp_path / "prompts", {key: p.detach().clone() for key, p in method.parameters.items()})
    (prompts,) = method.parameters.values()
    with torch.no_grad():
        prompts.normal_()
        assert not torch.allclose(ours.model.logits(batch), before, atol=1e-3)
        for key, tensor in method.read(tmp_path / "prompts").items():
            method.parameters[key].copy_(tensor)
    assert torch.equal(ours.model.logits(batch), before)
    assert method.bytes_stored() == 4 * 3 * 32


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["hf:clip", "hf:dinov3", "timm:vit", "timm:dinov3", "open_clip"])
def test_a_base_in_half_precision(folder: Path, name: str, autocast: bool) -> None:
    """float32 prompts in a bf16 tower: bf16 features, float32 gradients."""
    tower = tower_of(folder, name)
    expected = copy.deepcopy(tower)
    attach(expected)
    tower.to(torch.bfloat16)
    method = attach(tower)
    assert all(p.dtype == torch.float32 for p in method.parameters.values())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = tower(PIXELS.bfloat16())[0]
    features.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters.values())
    want = expected(PIXELS)[0]
    # bf16 has 8 bits of mantissa; some per cent after three blocks is its noise.
    assert (features.float() - want).norm() / want.norm() < 0.08


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:swin_tiny_patch4_window7_224", "use image_prompt, a learned frame of pixels, or for Swin"),
        ("timm:tiny_vit_5m_224", "is for plain ViTs"),
        ("timm:convnext_atto", "is for plain ViTs"),
        ("timm:levit_128s", "is for plain ViTs"),
        ("timm:efficientnet_b0", "is for plain ViTs"),
    ],
)
def test_hierarchies_are_told_of_frames(name: str, said: str) -> None:
    method = VisualPrompt()
    with pytest.raises(UserError, match=said) as caught:
        method.attach(Place("vision", meta(name)))
    assert "image_prompt" in tiny.sentence(caught)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_small_patch16_224"])
def test_blocks_that_count_on_their_patches(name: str) -> None:
    """A trial finds it, and leaves the tower as it was."""
    tower = TimmTower(timm.create_model(name, **SMALL), ImageSpec((16, 16)))
    names = [key for key, _ in tower.named_parameters()]
    first = VisualPrompt()
    with pytest.raises(UserError, match="cannot give more tokens to .*use image_prompt") as caught:
        first.attach(Place("vision", tower))
    tiny.sentence(caught)
    assert [key for key, _ in tower.named_parameters()] == names and not first.parameters
    assert not any(block._forward_pre_hooks for block in tower.blocks)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokens": 0}, "takes a whole number of tokens from 1, not 0"),
        ({"tokens": True}, "not True"),
        ({"deep": "yes"}, "deep is true or false, not 'yes'"),
        ({"dropout": 1}, "from 0 and below 1, not 1"),
        ({"where": "language"}, "is for vision, not for 'language'"),
        ({"token": 3}, "has no setting 'token', did you mean 'tokens'"),
        ({"blocks": [9]}, "has no block 9"),
    ],
)
def test_bad_settings(ours: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        ours.adapt([lines({"method": "visual_prompt", "where": "vision"} | settings)])
    tiny.sentence(caught)
