"""peft's tuners on towers of every library: fused attention, fused qkv, convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import tiny
import torch
from open_clip.transformer import VisionTransformer
from torch import nn

from vlm_adapt.adapt import METHODS
from vlm_adapt.adapt.method import make_method
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.vision.openclip import OpenClipTower
from vlm_adapt.vision.timm import TimmTower

torch.set_num_threads(1)
SPEC = ImageSpec((32, 32), (0.5,) * 3, (0.5,) * 3, "squash", "bicubic")
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def put(part: Any, name: str, where: str = "language", move: float = 0.05, **settings: Any) -> Any:
    torch.manual_seed(1)
    method = make_method(METHODS, name, settings)
    method.attach(Place(where, part))
    for parameter in method.parameters.values():
        parameter.data += move * torch.randn(parameter.shape)
    return method


def clip_tower() -> OpenClipTower:
    torch.manual_seed(0)
    visual = VisionTransformer(
        image_size=32, patch_size=16, width=32, layers=2, heads=4, mlp_ratio=2.0, output_dim=8
    )
    return OpenClipTower(visual.requires_grad_(False), SPEC).eval()


def timm_tower(name: str = "vit_tiny_patch16_224", **sizes: Any) -> TimmTower:
    torch.manual_seed(0)
    sizes = sizes or {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return TimmTower(timm.create_model(name, num_classes=0, **sizes), SPEC).eval()


def features(tower: Any) -> torch.Tensor:
    found: torch.Tensor = tower(PIXELS, [tower.depth - 1])[0]
    return found


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_fused_attention_is_pefts(batch_first: bool, need_weights: bool) -> None:
    """peft's own layer on the same tensors, masks and all; and the base's weights stay as they are.

    peft 0.21 adds the update of out_proj twice and differentiates it once; so its factor is doubled here to
    compare the rest. That it is right once is what test_open_clip sees when it merges.
    """
    from peft import LoraConfig, inject_adapter_in_model

    from vlm_adapt.adapt.fused_attention import FusedAttention

    found = []
    for own in (False, True):
        torch.manual_seed(0)
        holder = nn.Module()
        holder.attn = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        config = LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False)
        if own:
            config._register_custom_module({nn.MultiheadAttention: FusedAttention})
        torch.manual_seed(1)
        inject_adapter_in_model(config, holder)
        holder.attn.base_layer.out_proj.scaling["default"] *= 2 if own else 1
        weight = holder.attn.base_layer.in_proj_weight
        kept = weight.detach().clone()
        generator = torch.Generator().manual_seed(2)
        q, k, v = (torch.randn(5, 5, 16, generator=generator) for _ in range(3))
        mask = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        padding = torch.zeros(5, 5, dtype=torch.bool)
        padding[1, 3:] = True
        outputs = []
        for inputs in ((q, q, q), (q, k, v)):
            more: dict[str, Any] = {"need_weights": need_weights, "attn_mask": mask}
            outputs += holder.attn(*inputs, **more, key_padding_mask=padding)
        sum(o.square().mean() for o in outputs if o is not None).backward()
        grads = [
            p.grad / (2 if own and "out_proj" in name else 1)
            for name, p in holder.named_parameters()
            if "lora_" in name
        ]
        found.append((outputs, grads))
        if own:
            assert holder.attn.base_layer.in_proj_weight is weight and torch.equal(weight, kept)
    for ours, theirs in zip(*(outputs + grads for outputs, grads in found), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:  # of values up to 40
            torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", "visual.transformer.resblocks.*.attn", "attn"])
def test_open_clip(targets: str) -> None:
    """The fused attention is one layer among the linear ones: adapted, switched, merged."""
    tower = clip_tower()
    base = features(tower).detach()
    names = [name for name, _ in tower.named_parameters()]
    method = put(tower, "lora", "vision", move=0, r=2, target_modules=targets)
    attention = 2 * (2 * (32 + 96) + 2 * (32 + 32))
    mlp = 2 * 2 * 2 * (32 + 64) if targets == "all-linear" else 0
    assert sum(p.numel() for p in method.parameters.values()) == attention + mlp
    torch.testing.assert_close(features(tower), base, atol=1e-5, rtol=0)
    for parameter in method.parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    moved = features(tower)
    assert (moved - base).abs().max() > 1e-3
    moved.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters.values())
    method.set_active(False)
    torch.testing.assert_close(features(tower), base, atol=0, rtol=0)
    method.set_active(True)
    method.merge()
    torch.testing.assert_close(features(tower), moved, atol=1e-5, rtol=0)
    assert [name for name, _ in tower.named_parameters()] == names


def test_layers_a_tuner_cannot_take() -> None:
    with pytest.raises(UserError, match="'attn' is a fused attention, which 'oft' cannot adapt") as caught:
        put(clip_tower(), "oft", "vision", oft_block_size=4, target_modules="attn")
    tiny.sentence(caught)
    with pytest.raises(UserError, match="'out_proj' matches no layer, did you mean 'c_proj'"):
        put(clip_tower(), "lora", "vision", target_modules="out_proj")
    method = put(clip_tower(), "oft", "vision", oft_block_size=4)
    assert {name.rpartition(".")[2] for name in method.names} == {"c_fc", "c_proj"}


@pytest.mark.parametrize("name", ["lora", "loha", "oft", "ia3", "vera", "adalora"])
def test_timm_and_peft_on_its_plain_model(tmp_path: Path, name: str) -> None:
    """Fused qkv as a whole; file names are those of timm's own model, and peft loads the file onto it."""
    from peft import PeftModel

    tower = timm_tower()
    base = features(tower).detach()
    method = put(tower, name, "vision", **METHODS.load(name).example)
    assert any(key.startswith("base_model.model.blocks.0.attn.qkv.") for key in method.parameters)
    moved = features(tower).detach()
    assert (moved - base).abs().max() > 1e-4
    method.save(tmp_path, {key: p.detach().clone() for key, p in method.parameters.items()})
    plain = timm_tower()
    PeftModel.from_pretrained(plain.trunk, tmp_path)
    torch.testing.assert_close(features(plain.eval()), moved, atol=1e-5, rtol=0)
    method.merge()
    torch.testing.assert_close(features(tower), moved, atol=1e-5, rtol=0)


TUNERS = [name for name, place in METHODS.items() if place.startswith("vlm_adapt.adapt.tuners")]
CONVOLUTIONAL = [name for name in TUNERS if "conv" in METHODS.load(name).layers]


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutions(name: str) -> None:
    """3 x 3 convolutions of a ResNet, where the tuner takes them."""
    tower = timm_tower("resnet10t", zero_init_last=False)
    base = features(tower).detach()
    method = put(tower, name, "vision", move=0, **METHODS.load(name).example, target_modules="conv1")
    torch.testing.assert_close(features(tower), base, atol=1e-5, rtol=0)
    for parameter in method.parameters.values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    moved = features(tower)
    assert (moved - base).abs().max() > 1e-4
    method.merge()
    torch.testing.assert_close(features(tower), moved, atol=1e-5, rtol=0)
