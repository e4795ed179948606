"""The class token of a tower's depths is the library's own, and first whatever a block was given besides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import tiny
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from vlm_adapt.adapt import METHODS
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError
from vlm_adapt.vision import build_tower
from vlm_adapt.vision.tower import Tower

Reference = Callable[[Tensor], list[Tensor]]
LAYERS = [0, 2, 3]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def of_open_clip(folder: Path) -> tuple[Tower, Reference]:
    vision = {"image_size": 32, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"interpolation": "bilinear", "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    visual: Any = model.visual

    def reference(pixels_NCHW: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        handles = [
            visual.transformer.resblocks[layer].register_forward_hook(lambda m, a, out: seen.append(out))
            for layer in LAYERS
        ]
        visual(pixels_NCHW)
        for handle in handles:
            handle.remove()
        return [tokens[:, 0] for tokens in seen[:-1]] + [visual.ln_post(seen[-1])[:, 0]]

    return build_tower(str(folder)), reference


def of_timm(folder: Path) -> tuple[Tower, Reference]:
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 0}
    trunk: Any = timm.models.VisionTransformer(**options, reg_tokens=3)  # between class token and patches
    from vlm_adapt.image_spec import ImageSpec
    from vlm_adapt.vision.timm import TimmTower

    copy: Any = timm.models.VisionTransformer(**options, reg_tokens=3).eval()
    copy.load_state_dict(trunk.state_dict(), strict=False)

    def reference(pixels_NCHW: Tensor) -> list[Tensor]:
        pairs = copy.forward_intermediates(
            pixels_NCHW, indices=LAYERS, return_prefix_tokens=True, intermediates_only=True
        )
        return [prefix[:, 0] for _, prefix in pairs[:-1]] + [copy.forward_features(pixels_NCHW)[:, 0]]

    spec = ImageSpec((32, 32), (0.5,) * 3, (0.5,) * 3, "squash", "bilinear")
    return TimmTower(trunk, spec).eval(), reference


def of_transformers(folder: Path) -> tuple[Tower, Reference]:
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = tiny.seeded(transformers.Dinov2WithRegistersModel, config)
    model.save_pretrained(folder)

    def reference(pixels_NCHW: Tensor) -> list[Tensor]:
        output = model(pixels_NCHW, output_hidden_states=True)
        states = [output.hidden_states[layer + 1][:, 0] for layer in LAYERS[:-1]]
        return [*states, output.last_hidden_state[:, 0]]

    return build_tower(f"hf:{folder}"), reference


LIBRARIES = [of_open_clip, of_timm, of_transformers]


@pytest.mark.parametrize("library", LIBRARIES)
def test_class_token_is_the_librarys(library: Callable[..., Any], tmp_path: Path) -> None:
    tower, reference = library(tmp_path)
    assert tower.has_class_token
    pixels_NCHW = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features, patches = tower(pixels_NCHW, LAYERS, class_token=True), tower(pixels_NCHW, LAYERS)
        for layer_NTD, layer_NPD, class_ND in zip(features, patches, reference(pixels_NCHW), strict=True):
            assert layer_NTD.shape[1] == 17
            torch.testing.assert_close(layer_NTD[:, 0], class_ND, rtol=0, atol=1e-5)  # float32's own rounding
            torch.testing.assert_close(layer_NTD[:, 1:], layer_NPD, rtol=0, atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_it_stays_first_among_learned_tokens(library: Callable[..., Any], tmp_path: Path) -> None:
    """With LoRA and visual prompts attached; the prompts stand between it and the patches."""
    tower, _ = library(tmp_path)
    pixels_NCHW = torch.randn(2, 3, 32, 32)
    for name, options in (("lora", {"r": 2}), ("visual_prompt", {"tokens": 2})):
        METHODS.load(name)(**options).attach(Place("vision", tower))
    tower.eval()
    seen: list[Tensor] = []
    handle = tower.blocks[2].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        (features_NTD,) = tower(pixels_NCHW, [2], class_token=True)
    handle.remove()
    assert seen[0].shape[1] >= 1 + 2 + 16
    assert torch.equal(features_NTD[:, 0], seen[0][:, 0])
    assert torch.equal(features_NTD[:, 1:], seen[0][:, -16:])
    features_NTD = tower(pixels_NCHW, [3], class_token=True)[0]
    features_NTD[:, 0, 0].sum().backward()  # one channel: a layer norm holds their sum fixed
    prompts = [p for name, p in tower.named_parameters() if name.endswith("prompts")]
    assert prompts and any(p.grad is not None and p.grad.abs().sum() > 0 for p in prompts)


def test_towers_without_say_so(tmp_path: Path) -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    tiny.seeded(transformers.SiglipVisionModel, config).save_pretrained(tmp_path / "siglip")
    siglip = build_tower(f"hf:{tmp_path / 'siglip'}")
    swin = build_tower("timm:swin_tiny_patch4_window7_224", "random:", 64)
    for tower, side in ((siglip, 16), (swin, 64)):
        assert not tower.has_class_token
        with pytest.raises(UserError) as caught:
            tower(torch.zeros(1, 3, side, side), [0], class_token=True)
        assert "without a class token" in tiny.sentence(caught)


def test_native_sizes_have_none(tmp_path: Path) -> None:
    tiny.vit(tmp_path / "vit")
    tower = build_tower(f"hf:{tmp_path / 'vit'}", options={"native": {"max_patches": 16}})
    assert not tower.has_class_token
    with pytest.raises(UserError) as caught:
        tower(None, [0], class_token=True)
    assert "patches only" in tiny.sentence(caught)


def test_models_run_whole_have_theirs(tmp_path: Path) -> None:
    """A model that the tower knows no layout of, with a class token among its embeddings."""
    config = transformers.DeiTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    model = tiny.seeded(transformers.DeiTModel, config)
    model.save_pretrained(tmp_path)
    tower = build_tower(f"hf:{tmp_path}")
    assert tower.has_class_token
    pixels_NCHW = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        (features_NTD,) = tower(pixels_NCHW, [0], class_token=True)
        states = model(pixels_NCHW, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(features_NTD[:, 0], states[:, 0], rtol=0, atol=1e-6)
