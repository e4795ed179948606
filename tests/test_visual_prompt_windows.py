"""Prompts in attention windows: counts of Swin and TinyViT, the softmax written out, and refusals."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import rows
import timm
import tiny
import torch

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.visual_prompt_windows import VisualPromptWindows
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.vision import build_tower
from vlm_adapt.vision.timm import TimmTower
from vlm_adapt.vision.tower import silence

torch.set_num_threads(1)
SMALL: dict[str, dict[str, Any]] = {
    # Windows of 7 x 7 over 14 x 14 tokens, every second shifted; then one window.
    "swin_tiny_patch4_window7_224": {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    "tiny_vit_5m_224": {"embed_dims": (16, 32, 32, 64), "num_heads": (2, 2, 4, 4)},
}
TOTALS = {  # the widths of all blocks with windows
    "swin_tiny_patch4_window7_224": 2 * 96 + 2 * 192 + 6 * 384 + 2 * 768,
    "tiny_vit_5m_224": 2 * 128 + 6 * 160 + 2 * 320,
    "tiny_vit_21m_224": 2 * 192 + 6 * 384 + 2 * 576,
}
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def tower_of(name: str) -> TimmTower:
    torch.manual_seed(0)
    trunk = timm.create_model(name, num_classes=0, **SMALL[name])
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # biases by offset start at 0
    tower = TimmTower(trunk, ImageSpec((56, 56))).eval().requires_grad_(False)
    silence(tower)
    return tower


def attach(tower: Any, blocks: Any = None, **settings: Any) -> VisualPromptWindows:
    torch.manual_seed(1)
    method = VisualPromptWindows(**{"tokens": 3, **settings})
    method.attach(Place("vision", tower, set(), blocks))
    return method


@pytest.mark.parametrize("name", list(TOTALS))
def test_counts(name: str) -> None:
    """p D of each stage for each of its blocks."""
    with torch.device("meta"):
        tower = build_tower(f"timm:{name}", "random:")
    method = attach(tower, tokens=10)
    assert sum(p.numel() for p in method.parameters.values()) == 10 * TOTALS[name]
    assert {p.device.type for p in method.parameters.values()} == {"meta"}


def swin_by_hand(prompts_pD: torch.Tensor, norm: Any) -> Any:
    """softmax((q k' + [bias + mask, 0]) / ...) [v; v of the prompts] for a window's own tokens."""

    def forward(self: Any, x_NWD: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        windows, width, _ = x_NWD.shape
        every = torch.cat([x_NWD, norm(prompts_pD).expand(windows, -1, -1)], dim=1)
        q, k, v = self.qkv(every).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q[:, :, :width] @ k.transpose(2, 3) * self.scale
        table = self.relative_position_bias_table[self.relative_position_index]
        scores[..., :width] += table.permute(2, 0, 1)
        if mask is not None:
            scores[..., :width] += mask.repeat(windows // len(mask), 1, 1)[:, None]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return forward


def tiny_vit_by_hand(prompts_pD: torch.Tensor, norm: Any) -> Any:
    def forward(self: Any, x_NWD: torch.Tensor) -> torch.Tensor:
        windows, width, _ = x_NWD.shape
        every = self.norm(torch.cat([x_NWD, prompts_pD.expand(windows, -1, -1)], dim=1))
        each = self.qkv(every).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = each.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        scores = q[:, :, :width] @ k.transpose(2, 3) * self.scale
        scores[..., :width] += self.attention_biases[:, self.attention_bias_idxs]
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    return forward


@pytest.mark.parametrize("blocks", [None, "-2:"])
@pytest.mark.parametrize("name", list(SMALL))
def test_the_formula(name: str, blocks: Any) -> None:
    """More keys and values, made of the prompts as of tokens, for the queries of each window."""
    tower = tower_of(name)
    base = copy.deepcopy(tower)
    layers = list(range(tower.depth))
    before = base(PIXELS, layers)
    method = attach(tower, blocks)
    found = tower(PIXELS, layers)
    for key, prompts in method.parameters.items():
        block = base.trunk.get_submodule(key.partition(".attn.")[0])
        by_hand = swin_by_hand if hasattr(block, "norm1") else tiny_vit_by_hand
        forward = by_hand(prompts.detach(), getattr(block, "norm1", None))
        block.attn.forward = types.MethodType(forward, block.attn)
    for ours, hand, plain in zip(found, base(PIXELS, layers), before, strict=True):
        assert ours.shape == plain.shape
        # The same sums in products of other shapes, of numbers that reach some tens in TinyViT.
        torch.testing.assert_close(ours, hand, atol=1e-6 * max(1, float(hand.abs().max())), rtol=1e-6)
    assert (found[-1] - before[-1]).abs().max() > 1e-3
    found[-1].square().sum().backward()
    given = list(method.parameters.values())
    assert all(p.grad is not None and (p.grad != 0).any() for p in given)
    assert all(p.grad is None for p in tower.parameters() if not any(p is one for one in given))
    method.set_active(False)
    assert all(torch.equal(a, b) for a, b in zip(tower(PIXELS, layers), before, strict=True))
    names = [key for key, _ in tower.named_parameters() if "visual_prompt" not in key]
    assert names == [key for key, _ in base.named_parameters()]


@pytest.mark.parametrize("name", list(SMALL))
def test_two_lines_and_a_copy(name: str) -> None:
    """The windows see the prompts of both lines, in any order; a copy has its own."""
    tower = tower_of(name)
    one, two = attach(tower), attach(tower, tokens=2)
    found = tower(PIXELS)[0]
    other = tower_of(name)
    joined = attach(other, tokens=5)
    with torch.no_grad():
        for mine, a, b in zip(*(m.parameters.values() for m in (joined, one, two)), strict=True):
            mine.copy_(torch.cat([a, b]))
    torch.testing.assert_close(
        found, other(PIXELS)[0], atol=1e-6 * float(found.detach().abs().max()), rtol=1e-6
    )
    twin = copy.deepcopy(tower)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(tower(PIXELS)[0], found)


@pytest.mark.parametrize("name", list(SMALL))
def test_half_precision_and_recomputed_blocks(name: str) -> None:
    tower = tower_of(name).to(torch.bfloat16)
    method = attach(tower, dropout=0.0)
    for autocast in (False, True):
        gradients = []
        for enabled in (False, True):
            tower.train().set_activation_checkpointing(enabled)
            for parameter in method.parameters.values():
                assert parameter.dtype == torch.float32
                parameter.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                tower(PIXELS.bfloat16())[0].float().square().sum().backward()
            gradients.append([p.grad for p in method.parameters.values()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_training_step_saved_and_read(tmp_path: Path) -> None:
    from vlm_adapt.config.schema import Model
    from vlm_adapt.models.build import build

    tree = {
        "vision": {"model": "timm:tiny_vit_5m_224", "weights": "random:0", "image_size": 64, "layers": [2]},
        "connector": {"name": "mlp"},
        "language": {"model": str(tiny.llama(tmp_path / "llama"))},
    }
    ours = build(Model.model_validate(tree), torch.float32)
    lora = {"method": "lora", "where": "vision", "r": 2, "target_modules": "qkv"}
    line = {"method": "visual_prompt_windows", "where": "vision", "tokens": 2, "dropout": 0.1}
    plan = ours.adapt([[Adapt.model_validate(one) for one in (line, lora)]])
    trained = [p for item in plan.attached for p in item.method.parameters.values()]
    batch = rows.batch(ours, [rows.conversation(ours, "<image>what color is the shape?", "red")])
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ours.model.train()
    first = ours.model(batch)[0]
    first.backward()
    assert all(p.grad is not None for p in trained)
    optimizer.step()
    assert ours.model(batch)[0] < first
    ours.model.eval()
    after = ours.model.logits(batch)
    method = next(item.method for item in plan.attached if item.method.name == "visual_prompt_windows")
    method.save(tmp_path / "prompts", {key: p.detach().clone() for key, p in method.parameters.items()})
    with torch.no_grad():
        for parameter in method.parameters.values():
            parameter.normal_()
        assert not torch.allclose(ours.model.logits(batch), after, atol=1e-3)
        for key, tensor in method.read(tmp_path / "prompts").items():
            method.parameters[key].copy_(tensor)
    assert torch.equal(ours.model.logits(batch), after)


@pytest.mark.parametrize(
    ("name", "blocks", "said"),
    [
        ("vit_tiny_patch16_224", None, "no attention windows .*use visual_prompt for a plain ViT"),
        ("convnext_atto", None, "image_prompt for any tower"),
        ("swinv2_cr_tiny_ns_224", None, "no attention windows of timm's Swin or TinyViT"),
        (
            "tiny_vit_5m_224",
            "1:4",
            "block 1 has no attention windows; choose among 2, 3, or leave blocks out",
        ),
    ],
)
def test_refusals(name: str, blocks: Any, said: str) -> None:
    with torch.device("meta"):
        tower = build_tower(f"timm:{name}", "random:")
    with pytest.raises(UserError, match=said) as caught:
        attach(tower, blocks)
    tiny.sentence(caught)
