"""Towers against the libraries' own output on the same random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm_adapt.errors import UserError
from vlm_adapt.vision import build_tower

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 4}
TEXT = {
    **TINY,
    "num_hidden_layers": 1,
    "vocab_size": 60,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
HF = {
    "clip": (
        transformers.CLIPVisionConfig,
        transformers.CLIPVisionModel,
        {"image_size": 32, "patch_size": 8},
    ),
    "siglip": (
        transformers.SiglipVisionConfig,
        transformers.SiglipVisionModel,
        {"image_size": 32, "patch_size": 8},
    ),
    "vit": (transformers.ViTConfig, transformers.ViTModel, {"image_size": 32, "patch_size": 8}),
    "dinov2": (transformers.Dinov2Config, transformers.Dinov2Model, {"image_size": 32, "patch_size": 8}),
    "registers": (
        transformers.Dinov2WithRegistersConfig,
        transformers.Dinov2WithRegistersModel,
        {"image_size": 32, "patch_size": 8},
    ),
    "dinov3": (
        transformers.DINOv3ViTConfig,
        transformers.DINOv3ViTModel,
        {"image_size": 32, "patch_size": 8},
    ),
    "beit": (transformers.BeitConfig, transformers.BeitModel, {"image_size": 32, "patch_size": 8}),
}
# Whether last_hidden_state is past the final norm: in all but CLIP.
PREFIX = {"clip": 1, "siglip": 0, "vit": 1, "dinov2": 1, "registers": 5, "dinov3": 1, "beit": 1}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def noisy(model: nn.Module) -> nn.Module:
    """Weights far from their symmetric start, so that every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def hf_folder(kind: str, folder: Path) -> tuple[str, nn.Module]:
    config_class, model_class, sizes = HF[kind]
    model = noisy(model_class(config_class(**TINY, **sizes)))
    model.save_pretrained(folder)
    return str(folder), model


def hf_patches(kind: str, model: nn.Module, pixels_NCHW: Tensor, **options: Any) -> list[Tensor]:
    with torch.no_grad():
        output = model(pixels_NCHW, output_hidden_states=True, **options)
    return [state[:, PREFIX[kind] :] for state in (*output.hidden_states[1:], output.last_hidden_state)]


@pytest.mark.parametrize("kind", list(HF))
def test_hf_features_are_the_librarys(kind: str, tmp_path: Path) -> None:
    name, model = hf_folder(kind, tmp_path)
    tower = build_tower(name)
    assert (tower.depth, tower.width, tower.grid, len(tower.blocks)) == (4, 32, (4, 4), 4)
    pixels_NCHW = torch.randn(2, 3, 32, 32)
    *expected, last = hf_patches(kind, model, pixels_NCHW)
    with torch.no_grad():
        early, late, middle = tower(pixels_NCHW, [0, -2, 1])
        # The same operations in the same order: equal to the bit.
        assert torch.equal(early, expected[0])
        assert torch.equal(middle, expected[1])
        assert torch.equal(late, expected[2])
        assert torch.equal(tower(pixels_NCHW)[0], last)
        # Stopping early gives what running on gives.
        assert torch.equal(tower(pixels_NCHW, [1])[0], tower(pixels_NCHW, [1, 3])[0])
        bare = build_tower(name, options={"final_norm": False})
        assert torch.equal(
            bare(pixels_NCHW, [3])[0], expected[3] if kind not in ("vit", "beit") else bare(pixels_NCHW)[0]
        )


@pytest.mark.parametrize("size", [(48, 48), (32, 64), (16, 64)])  # the last has as many patches as 32 x 32
@pytest.mark.parametrize("kind", ["clip", "siglip", "vit", "dinov2", "registers", "dinov3"])
def test_hf_positions_are_interpolated_as_by_the_library(
    kind: str, size: tuple[int, int], tmp_path: Path
) -> None:
    name, model = hf_folder(kind, tmp_path)
    tower = build_tower(name, image_size=size)
    assert tower.grid == (size[0] // 8, size[1] // 8) and tower.image_spec.size == size
    pixels_NCHW = torch.randn(1, 3, *size)
    options = {} if kind in ("dinov2", "registers", "dinov3") else {"interpolate_pos_encoding": True}
    *_, last = hf_patches(kind, model, pixels_NCHW, **options)
    assert torch.equal(tower(pixels_NCHW)[0], last)


@pytest.mark.parametrize(
    ("size", "words"), [(33, "size 33 .*try 32$"), ((64, 93), r"\[64, 93\] .*64, 96\]$")]
)
def test_an_image_that_patches_do_not_fill(size: int | tuple[int, int], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        build_tower(hf_folder("vit", tmp_path)[0], image_size=size)


def test_an_image_size_that_the_library_cannot_take_is_a_sentence(tmp_path: Path) -> None:
    config = transformers.SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], image_size=64, patch_size=4, window_size=2
    )
    transformers.SwinModel(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="SwinModel cannot look at images of 32 x 64 pixels .*image_size"):
        build_tower(str(tmp_path), image_size=(32, 64))  # its deepest grid is less than a window


def test_siglip2_of_any_aspect(tmp_path: Path) -> None:
    config = transformers.Siglip2VisionConfig(**TINY, num_patches=16, patch_size=8)
    model = noisy(transformers.Siglip2VisionModel(config))
    model.save_pretrained(tmp_path)
    tower = build_tower(str(tmp_path), image_size=48)
    pixels_NCHW = torch.randn(2, 3, 48, 48)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=36, do_resize=False)
    images = [((image + 3) * 20).byte() for image in pixels_NCHW]
    given = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    ours = tower(tower.normalise(torch.stack(images)))[0]
    # The processor rescales in another order than normalise, worth a few float32 roundings.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_only_the_vision_side_of_a_two_tower_checkpoint_is_loaded(kind: str, tmp_path: Path) -> None:
    names = {"clip": "CLIP", "siglip": "Siglip"}
    config = getattr(transformers, f"{names[kind]}Config")(
        vision_config={**TINY, "image_size": 32, "patch_size": 8}, text_config=TEXT
    )
    model = noisy(getattr(transformers, f"{names[kind]}Model")(config))
    model.save_pretrained(tmp_path)
    tower = build_tower(str(tmp_path))
    assert not [name for name, _ in tower.named_parameters() if "text" in name or "head" in name]
    assert "text_model" in tower.notes[0]
    pixels_NCHW = torch.randn(2, 3, 32, 32)
    *expected, last = hf_patches(kind, model.vision_model, pixels_NCHW)
    assert torch.equal(tower(pixels_NCHW, [-2])[0], expected[-2])
    assert torch.equal(tower(pixels_NCHW)[0], last)


@pytest.mark.parametrize(
    "model", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_timm_plain_vit(model: str) -> None:
    size = 56 if "14" in model else 64
    tower = build_tower(f"timm:{model}", "random:1", image_size=size)
    noisy(tower)
    grid = (4, 4)
    assert (tower.depth, tower.grid, len(tower.blocks)) == (12, grid, 12)
    pixels_NCHW = torch.randn(1, 3, size, size)
    with torch.no_grad():
        shallow, deep, last = tower(pixels_NCHW, [2, -2, -1])
        theirs = tower.trunk.forward_features(pixels_NCHW)[:, tower.trunk.num_prefix_tokens :]
        assert torch.equal(last, theirs)
        final, maps = tower.trunk.forward_intermediates(pixels_NCHW, indices=[2, 10], output_fmt="NLC")
        assert torch.equal(shallow, maps[0]) and torch.equal(deep, maps[1])
        assert torch.equal(tower(pixels_NCHW, [2])[0], shallow)


@pytest.mark.parametrize("size", [64, 96, 128, 224])
def test_tiny_vit_takes_any_size(size: int) -> None:
    tower = build_tower("timm:tiny_vit_5m_224", "random:1", image_size=size)
    grids = [(-(-size // stride),) * 2 for stride in (4, 8, 16, 32)]
    layers = [0, 1, 2, 3]
    assert tower.grids(layers) == grids and tower.widths(layers) == [64, 128, 160, 320]
    assert tower.block_layers == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3] and len(tower.blocks) == 12
    pixels_NCHW = torch.randn(1, 3, size, size)
    with torch.no_grad():
        features = tower(pixels_NCHW, layers)
        assert [tuple(f.shape[1:]) for f in features] == [
            (rows * columns, width) for (rows, columns), width in zip(grids, [64, 128, 160, 320], strict=True)
        ]
        theirs = tower.trunk.forward_features(pixels_NCHW)
        assert torch.equal(features[3], theirs.flatten(2).transpose(1, 2))
        assert torch.equal(tower(pixels_NCHW, [1])[0], features[1])


def test_fitted_windows_leave_out_the_padding_and_nothing_else() -> None:
    weights, size = "random:1", 64
    tower = build_tower("timm:tiny_vit_5m_224", weights, size, options={"fit_windows": True})
    padded = build_tower("timm:tiny_vit_5m_224", weights, size)
    block, old = tower.trunk.stages[2].blocks[0], padded.trunk.stages[2].blocks[0]
    with torch.no_grad():
        old.attn.attention_biases.normal_()
        biases_HLL = old.attn.attention_biases.unflatten(1, (14, 14))
        block.attn.attention_biases.copy_(biases_HLL[:, :4, :4].flatten(1))
        x_NTC = torch.randn(2, 16, 160)
        # The library's biases of 4 x 4 tokens in the corner of its 14 x 14 window.
        corner = (torch.arange(4)[:, None] * 14 + torch.arange(4)).flatten()
        idxs = old.attn.attention_bias_idxs[corner][:, corner]
        old.attn.attention_bias_idxs = idxs
        # The same operations on the same numbers.
        assert torch.equal(block.attn(x_NTC), old.attn(x_NTC))
    assert [tower.trunk.stages[i].blocks[0].window_size for i in (1, 2, 3)] == [4, 4, 2]
    whole = build_tower("timm:tiny_vit_5m_224", weights, options={"fit_windows": True})
    pixels_NCHW = torch.randn(1, 3, 224, 224)
    # At its own size nothing is padded, so nothing changes.
    assert torch.equal(whole(pixels_NCHW)[0], build_tower("timm:tiny_vit_5m_224", weights)(pixels_NCHW)[0])
    with pytest.raises(UserError, match="for TinyViT only"):
        build_tower("timm:vit_tiny_patch16_224", weights, options={"fit_windows": True})


def test_fitted_windows_keep_the_biases_of_a_file(tmp_path: Path) -> None:
    model = noisy(timm.create_model("tiny_vit_5m_224", num_classes=0))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tower = build_tower(
        "timm:tiny_vit_5m_224", f"file:{tmp_path / 'model.safetensors'}", 64, options={"fit_windows": True}
    )
    ours, theirs = (m.stages[2].blocks[1].attn for m in (tower.trunk, model))
    full_HSS = theirs.attention_biases[:, theirs.attention_bias_idxs]
    corner = (torch.arange(4)[:, None] * 14 + torch.arange(4)).flatten()
    assert torch.equal(ours.attention_biases[:, ours.attention_bias_idxs], full_HSS[:, corner][:, :, corner])


@pytest.mark.parametrize("model", ["swin_tiny_patch4_window7_224", "convnext_atto", "tf_efficientnet_lite0"])
def test_timm_hierarchies(model: str) -> None:
    tower = build_tower(f"timm:{model}", "random:1", image_size=96)
    pixels_NCHW = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        first, last = tower(pixels_NCHW, [0, -1])
        theirs = tower.trunk.forward_features(pixels_NCHW)
        theirs = theirs.permute(0, 3, 1, 2) if "swin" in model else theirs
    torch.testing.assert_close(last, theirs.flatten(2).transpose(1, 2), rtol=0, atol=0)
    assert tower.grids([0, -1]) == [(24, 24) if "lite0" not in model else (48, 48), (3, 3)]
    assert tower.width == last.shape[2] and first.shape[1] == tower.grids([0])[0][0] ** 2
    assert tower.used_blocks([0]) == [i for i, layer in enumerate(tower.block_layers) if layer == 0]


def test_loading_a_timm_file_is_strict(tmp_path: Path) -> None:
    model = noisy(timm.create_model("vit_tiny_patch16_224", num_classes=7))
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    tower = build_tower("timm:vit_tiny_patch16_224", f"file:{path}")
    assert torch.equal(
        tower(torch.ones(1, 3, 224, 224))[0], model.forward_features(torch.ones(1, 3, 224, 224))[:, 1:]
    )
    assert "head (2)" in tower.notes[0]
    state = model.state_dict()
    state["surplus"] = state.pop("blocks.3.mlp.fc1.bias")
    save_file(state, path)
    with pytest.raises(UserError, match=r"missing \(blocks.3.mlp.fc1.bias\).*unexpected \(surplus\)"):
        build_tower("timm:vit_tiny_patch16_224", f"file:{path}")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    build_tower("timm:vit_tiny_patch16_224", local_weights=tmp_path / "model.pt")
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(UserError, match="more than plain tensors"):
        build_tower("timm:vit_tiny_patch16_224", f"file:{tmp_path / 'whole.pt'}")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="no readable weight file"):
        build_tower("timm:vit_tiny_patch16_224", f"file:{path}")


def test_hf_weights_that_do_not_fit(tmp_path: Path) -> None:
    name, model = hf_folder("clip", tmp_path / "model")
    state = model.state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    pixels_NCHW = torch.randn(1, 3, 32, 32)
    assert torch.equal(build_tower(name, f"file:{path}")(pixels_NCHW)[0], build_tower(name)(pixels_NCHW)[0])
    key = next(name for name in state if name.endswith("layers.2.mlp.fc1.bias"))
    state["surplus.weight"] = state.pop(key)
    save_file(state, path)
    with pytest.raises(
        UserError, match=r"1 missing \(.*layers.2.mlp.fc1.bias\); 1 unexpected \(surplus.weight\)"
    ):
        build_tower(name, f"file:{path}")
    other, _ = hf_folder("siglip", tmp_path / "other")
    with pytest.raises(UserError, match="do not fit"):
        build_tower(name, f"file:{other}")
