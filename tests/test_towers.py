"""What every tower promises, open_clip's towers, image specifications, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import CLIP_MEAN, ImageSpec
from vlm_adapt.vision import build_tower
from vlm_adapt.vision.openclip import _usual_preprocessing
from vlm_adapt.vision.tower import Tower

VISION = {"image_size": 32, "layers": 4, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 4}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def openclip_folder(tmp_path: Path) -> tuple[str, nn.Module]:
    """A folder in open_clip's format with random weights, and its visual tower."""
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": list(CLIP_MEAN), "interpolation": "bilinear", "resize_mode": "squash"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    return str(tmp_path), model.visual


def clip_folder(folder: Path, **sizes: int) -> str:
    config = transformers.CLIPVisionConfig(**{**TINY, "image_size": 32, "patch_size": 8, **sizes})
    transformers.CLIPVisionModel(config).save_pretrained(folder)
    return str(folder)


def test_open_clip_features_are_the_librarys(openclip_folder: tuple[str, nn.Module]) -> None:
    name, visual = openclip_folder
    tower = build_tower(name)
    assert (tower.depth, tower.width, tower.grid, len(tower.blocks)) == (4, 64, (4, 4), 4)
    assert tower.image_spec == ImageSpec((32, 32), CLIP_MEAN, tower.image_spec.std, "squash", "bilinear")
    pixels_NCHW = torch.randn(2, 3, 32, 32)
    visual.output_tokens = True
    with torch.no_grad():
        _, tokens = visual(pixels_NCHW)
        maps = visual.forward_intermediates(pixels_NCHW, indices=[0, 2], output_fmt="NLC")[
            "image_intermediates"
        ]
        assert torch.equal(tower(pixels_NCHW)[0], tokens)
        early, late = tower(pixels_NCHW, [0, -2])
        assert torch.equal(early, maps[0]) and torch.equal(late, maps[1])
        bare = build_tower(name, options={"final_norm": False})
        last = visual.forward_intermediates(pixels_NCHW, indices=[3], output_fmt="NLC")[
            "image_intermediates"
        ][0]
        assert torch.equal(bare(pixels_NCHW)[0], last)


def test_open_clip_size_and_file(openclip_folder: tuple[str, nn.Module], tmp_path: Path) -> None:
    name, visual = openclip_folder
    larger = build_tower(name, image_size=48)
    assert larger.grid == (6, 6)
    weights = f"file:{tmp_path / 'open_clip_model.safetensors'}"
    same = build_tower(name, weights, image_size=48)
    pixels_NCHW = torch.randn(1, 3, 48, 48)
    assert torch.equal(same(pixels_NCHW)[0], larger(pixels_NCHW)[0])
    assert "text_projection (1)" in same.notes[0]
    save_file(visual.state_dict(), tmp_path / "visual.safetensors")
    alone = build_tower(name, f"file:{tmp_path / 'visual.safetensors'}", image_size=48)
    assert torch.equal(alone(pixels_NCHW)[0], larger(pixels_NCHW)[0])
    with pytest.raises(UserError, match="not a multiple of the patch size 8"):
        build_tower(name, image_size=50)


def test_open_clip_takes_timms_trunks(tmp_path: Path) -> None:
    vision = {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "map",
        "timm_proj": "none",
        "image_size": 224,
    }
    config = {"model_cfg": {"embed_dim": 192, "vision_cfg": vision, "text_cfg": TEXT}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    tower = build_tower(str(tmp_path))
    assert type(tower).__name__ == "TimmTower" and tower.grid == (14, 14)
    pixels_NCHW = torch.randn(1, 3, 224, 224)
    theirs = model.visual.trunk.forward_features(pixels_NCHW)
    assert torch.equal(tower(pixels_NCHW)[0], theirs[:, model.visual.trunk.num_prefix_tokens :])
    same_file = f"file:{tmp_path / 'open_clip_model.safetensors'}"
    same = build_tower(str(tmp_path), same_file)
    assert torch.equal(same(pixels_NCHW)[0], tower(pixels_NCHW)[0])
    smaller, same = (build_tower(str(tmp_path), weights, image_size=64) for weights in ("hub:", same_file))
    assert smaller.grid == same.grid == (4, 4)
    assert torch.equal(smaller(pixels_NCHW[..., :64, :64])[0], same(pixels_NCHW[..., :64, :64])[0])


def test_open_clip_file_of_a_built_in_model_gets_its_own_statistics() -> None:
    assert _usual_preprocessing("ViT-B-32-SigLIP2-256")["mean"] == (0.5, 0.5, 0.5)
    assert _usual_preprocessing("ViT-B-32")["mean"] == CLIP_MEAN


@pytest.fixture(params=["hf", "timm", "open_clip", "tiny_vit"])
def tower(request: pytest.FixtureRequest, tmp_path: Path, openclip_folder: tuple[str, nn.Module]) -> Tower:
    if request.param == "hf":
        return build_tower(clip_folder(tmp_path / "clip"))
    if request.param == "open_clip":
        return build_tower(openclip_folder[0])
    name = "vit_tiny_patch16_224" if request.param == "timm" else "tiny_vit_5m_224"
    return build_tower(f"timm:{name}", "random:0", image_size=64)


def test_layers_that_are_not_there(tower: Tower) -> None:
    pixels_NCHW = torch.zeros(1, 3, *tower.image_spec.size)
    for layer in (tower.depth, -tower.depth - 1):
        with pytest.raises(
            UserError, match=f"layer {layer} does not exist: this tower has {tower.depth} layers"
        ):
            tower(pixels_NCHW, [layer])
    with pytest.raises(UserError, match="at least one layer"):
        tower(pixels_NCHW, [])
    with pytest.raises(UserError, match="got \\(80, 80\\)"):
        tower(torch.zeros(1, 3, 80, 80))


def test_only_used_parameters_get_gradients(tower: Tower) -> None:
    for layers in ([-1], [-2], [0]):
        tower.zero_grad()
        for checkpointing in (False, True):
            tower.set_activation_checkpointing(checkpointing)
            features = tower(torch.randn(2, 3, *tower.image_spec.size), layers)
            sum((f * torch.randn_like(f)).sum() for f in features).backward()
        unused = tuple(f"{name}." for name in tower.unused_modules(layers))
        blocks = {tower.block_names[index] for index in tower.used_blocks(layers)}
        assert not blocks & set(tower.unused_modules(layers))
        for name, parameter in tower.named_parameters():
            idle = name.startswith(unused) if unused else False
            # Beyond the deepest stage also what joins two stages is idle.
            idle = idle or (".downsample." in name and parameter.grad is None and layers != [-1])
            assert (parameter.grad is None) == idle, (layers, name)


def test_checkpointing_changes_no_gradient(tower: Tower) -> None:
    pixels_NCHW = torch.randn(2, 3, *tower.image_spec.size)
    gradients = []
    for enabled in (False, True):
        tower.set_activation_checkpointing(enabled)
        tower.train().zero_grad()
        tower(pixels_NCHW, [-1])[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in tower.parameters() if p.grad is not None])
    for without, with_ in zip(*gradients, strict=True):
        assert torch.equal(without, with_)


def test_training_mode_changes_no_feature(tower: Tower) -> None:
    pixels_NCHW = torch.randn(2, 3, *tower.image_spec.size)
    buffers = {name: value.clone() for name, value in tower.named_buffers()}
    expected = tower.eval()(pixels_NCHW)[0]
    assert torch.equal(tower.train()(pixels_NCHW)[0], expected)
    assert all(torch.equal(value, buffers[name]) for name, value in tower.named_buffers())


def test_stochastic_depth_is_switched_off_and_said() -> None:
    tower = build_tower("timm:swin_tiny_patch4_window7_224", "random:0", image_size=64).train()
    pixels_NCHW = torch.randn(1, 3, 64, 64)
    assert torch.equal(tower(pixels_NCHW)[0], tower(pixels_NCHW)[0])
    assert "switched off" in tower.notes[-1]


def test_a_block_can_be_wrapped(tower: Tower) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
            return self.inner(*args, **kwargs) * 2

    pixels_NCHW = torch.randn(1, 3, *tower.image_spec.size)
    layer = tower.block_layers[0]
    last = max(index for index, own in enumerate(tower.block_layers) if own == layer)
    (plain,) = tower(pixels_NCHW, [layer])
    tower.set_block(last, Doubled(tower.blocks[last]))
    assert torch.equal(tower(pixels_NCHW, [layer])[0], plain * 2)


def test_blocks_after_the_deepest_layer_do_not_run(tower: Tower) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a block ran that no wanted layer needs")

    deepest = tower.depth - 2
    for index in set(range(len(tower.blocks))) - set(tower.used_blocks([deepest])):
        tower.blocks[index].register_forward_pre_hook(refuse)
    pixels_NCHW = torch.randn(1, 3, *tower.image_spec.size)
    tower(pixels_NCHW, [0, -2])
    with pytest.raises(AssertionError, match="a block ran"):
        tower(pixels_NCHW, [-1])


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(tower: Tower, autocast: bool) -> None:
    pixels_NCHW = torch.randint(0, 256, (1, 3, *tower.image_spec.size), dtype=torch.uint8)
    expected = tower(tower.normalise(pixels_NCHW), [1])[0]
    tower.to(torch.bfloat16)
    normalised = tower.normalise(pixels_NCHW)
    assert normalised.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = tower(normalised, [1])[0]
    assert features.dtype == torch.bfloat16
    # bf16 has 8 bits of mantissa; a few per cent after two blocks is its noise, 1.0 would be nonsense.
    assert (features.float() - expected).norm() / expected.norm() < 0.05


def test_normalise_is_exact(tower: Tower) -> None:
    pixels_NCHW = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tower.image_spec.mean, tower.image_spec.std))
    # Scaling by 255 first or last: float32 rounding of numbers up to 3.
    torch.testing.assert_close(
        tower.normalise(pixels_NCHW), (pixels_NCHW / 255 - mean) / std, rtol=1e-5, atol=1e-6
    )


def test_image_spec_from_the_preprocessor_file(tmp_path: Path) -> None:
    name = clip_folder(tmp_path)
    assert build_tower(name).image_spec == ImageSpec(
        (32, 32), CLIP_MEAN, build_tower(name).image_spec.std, "crop"
    )
    settings = {
        "size": {"height": 40, "width": 40},
        "image_mean": [0.1] * 3,
        "image_std": [0.2] * 3,
        "resample": 2,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    expected = ImageSpec((40, 40), (0.1,) * 3, (0.2,) * 3, "squash", "bilinear")
    assert build_tower(name).image_spec == expected
    settings = {
        "size": {"shortest_edge": 36},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert build_tower(name).image_spec.size == (32, 32) and build_tower(name).image_spec.resize == "crop"
    with pytest.raises(UserError, match="unknown resize"):
        ImageSpec((8, 8), resize="stretch")


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("timm:vit_tinyy_patch16_224", "hub:", "did you mean 'vit_tiny_patch16_224'"),
        ("open_clip:ViT-B-33", "hub:x", "did you mean 'ViT-B-"),
        ("open_clip:ViT-B-32", "hub:", "needs the name of its weights"),
        ("tmm:vit", "hub:", "unknown vision library 'tmm', did you mean 'timm'"),
        ("nowhere/at/all", "hub:", "unknown vision tower"),
        ("timm:vit_tiny_patch16_224", "package:x", "unknown weight source"),
        ("timm:vit_tiny_patch16_224", "file:nowhere", "does not exist"),
        ("timm:vit_tiny_patch16_224", "random:x", "whole number"),
    ],
)
def test_bad_names(model: str, weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tower(model, weights)
    with pytest.raises(UserError, match="unknown option 'final_nrom'"):
        build_tower("timm:vit_tiny_patch16_224", "random:", options={"final_nrom": True})


@pytest.mark.parametrize(
    "model", ["hf:no-such/model", "timm:vit_tiny_patch16_224", "open_clip:hf-hub:no-such/model"]
)
def test_an_unreachable_hub_is_one_sentence(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="cannot get the weights of '.*check the name and the connection"):
        build_tower(model)


def test_the_tables_import_no_torch() -> None:
    code = "import sys, vlm_adapt.vision, vlm_adapt.connectors; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
