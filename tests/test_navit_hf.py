"""transformers' towers over packed images: the library's own output for each image alone, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_navit import gradients, together
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2ImageProcessor,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from vlm_adapt.data.patches import load
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import Native
from vlm_adapt.vision import build_tower
from vlm_adapt.vision.packing import Packed

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "siglip": (SiglipVisionConfig, SiglipVisionModel, {"image_size": 16}),
    "clip": (CLIPVisionConfig, CLIPVisionModel, {"image_size": 16}),
    "vit": (ViTConfig, ViTModel, {"image_size": 16}),
    "dinov2": (Dinov2Config, Dinov2Model, {"image_size": 16}),
    "registers": (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        {"image_size": 16, "num_register_tokens": 3},
    ),
    "dinov3": (
        DINOv3ViTConfig,
        DINOv3ViTModel,
        {"image_size": 16, "num_register_tokens": 2, "pos_embed_rescale": 2.0},
    ),
    "siglip2": (Siglip2VisionConfig, Siglip2VisionModel, {"num_patches": 16}),
}
INTERPOLATES = ("siglip", "clip", "vit")  # the others do it unasked
SIZES = ((12, 20), (4, 4), (16, 16), (12, 20), (28, 8))  # (height, width); 16 x 16 is the pretrained grid


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    for name, (config, model, more) in MODELS.items():
        made = tiny.seeded(model, config(**COMMON, intermediate_size=64, **more))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)  # class tokens and positions start at 0
        made.save_pretrained(folder / name)
    return folder


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, 3, *size, generator=generator) for size in SIZES]


def patches(image_1CHW: torch.Tensor, kept: torch.Tensor | None = None) -> Packed:
    _, channels, height, width = image_1CHW.shape
    rows, columns = height // 4, width // 4
    cut = image_1CHW[0].reshape(channels, rows, 4, columns, 4).permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)
    places = torch.arange(rows * columns) if kept is None else kept
    return Packed(cut[places], places, ((rows, columns),), (len(places),))


def theirs(name: str, model: Any, image_1CHW: torch.Tensor) -> torch.Tensor:
    """The library's last hidden state of one image, patches only."""
    if name == "siglip2":
        one = patches(image_1CHW)
        mask = torch.ones(1, one.lengths[0], dtype=torch.long)
        return model(one.pixels_TV[None], mask, torch.tensor(one.grids)).last_hidden_state[0]
    more = {"interpolate_pos_encoding": True} if name in INTERPOLATES else {}
    output = model(pixel_values=image_1CHW, output_hidden_states=True, **more)
    hidden = output.hidden_states[-1] if name == "clip" else output.last_hidden_state
    return hidden[0, -(image_1CHW.shape[2] // 4) * (image_1CHW.shape[3] // 4) :]


@pytest.mark.parametrize("attention", ["images", "dense"])
@pytest.mark.parametrize("name", list(MODELS))
def test_packed_is_the_librarys_own_output_for_each_image(folders: Path, name: str, attention: str) -> None:
    options = {"native": {"max_patches": 40, "attention": attention}}
    ours = build_tower(str(folders / name), options=options).train()
    model = MODELS[name][1].from_pretrained(folders / name).eval()
    alone = [patches(image) for image in pictures()]
    found = ours(together(alone))[0]
    expected = torch.cat([theirs(name, model, image) for image in pictures()])
    # The same sums in products of other shapes, after a final norm (CLIP's numbers, without one, reach 30).
    scale = max(1, expected.abs().max() / 4)
    assert (found - expected).abs().max() < 2e-6 * scale
    own = gradients(ours, [found])
    other = gradients(ours, [torch.cat([ours(one)[0] for one in alone])])
    assert set(own) == set(other) and len(own) > 20
    for key, gradient in own.items():
        # A gradient sums over all tokens: the same relative error on a larger number.
        assert (gradient - other[key]).abs().max() < 2e-6 * max(1, other[key].abs().max()), key


def test_dropped_patches_keep_their_positions(folders: Path) -> None:
    """The library's own embeddings, of which some rows are left out, through the library's own blocks."""
    ours = build_tower(str(folders / "vit"), options={"native": {"max_patches": 40}})
    model = ViTModel.from_pretrained(folders / "vit").eval()
    image, kept = pictures()[0], torch.tensor([1, 2, 8, 14])
    hidden = model.embeddings(image, interpolate_pos_encoding=True)[:, [0, *(kept + 1).tolist()]]
    for layer in model.layers:
        hidden = layer(hidden)
    expected = model.layernorm(hidden)[0, 1:]
    # As above.
    assert (ours(patches(image, kept))[0] - expected).abs().max() < 2e-6


def test_the_same_file_gives_the_same_features_as_the_library(folders: Path, tmp_path: Path) -> None:
    """SigLIP 2 NaFlex from the file on: its processor and model against our reading, patches and tower."""
    from PIL import Image

    ours = build_tower(
        str(folders / "siglip2"), options={"native": {"max_patches": 24, "resolution": "fill"}}
    )
    model = Siglip2VisionModel.from_pretrained(folders / "siglip2").eval()
    processor = Siglip2ImageProcessor(patch_size=4, max_num_patches=24)
    spec = ours.image_spec
    assert spec.native is not None
    spec = replace(spec, interpolation="bilinear")  # the processor's own
    for seed, (width, height) in enumerate([(40, 30), (25, 90), (64, 64)]):
        data = tiny.image(seed, width, height)
        (tmp_path / "a.png").write_bytes(data)
        inputs = processor(Image.open(tmp_path / "a.png"), return_tensors="pt")
        expected = model(**inputs).last_hidden_state[0]
        mine = load(data, spec)
        rows, columns = inputs["spatial_shapes"][0].tolist()
        assert mine.grid == (rows, columns)
        pixels = ours.normalise(torch.from_numpy(mine.patches_PV))
        # One grey level: both resize in uint8 and round.
        assert (pixels - inputs["pixel_values"][0, : len(pixels)]).abs().max() <= 2.01 / 255
        packed = Packed(
            inputs["pixel_values"][0, : len(pixels)],
            torch.from_numpy(mine.places_P),
            (mine.grid,),
            (len(pixels),),
        )
        # As above.
        assert (ours(packed)[0] - expected[: len(pixels)]).abs().max() < 2e-6


def test_fill_is_the_librarys_rule() -> None:
    """The library searches its scale to 1e-5, and so misses a patch once in two thousand images."""
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    generator, different = np.random.default_rng(0), 0
    for _ in range(1000):
        width, height, most = (int(generator.integers(1, top)) for top in (3000, 3000, 1024))
        rows, columns = Native(16, most, resolution="fill").grid(width, height)
        size = get_image_size_for_max_num_patches(height, width, 16, most)
        different += (rows * 16, columns * 16) != size
    assert different <= 3


def test_towers_that_cannot_say_so(folders: Path) -> None:
    with pytest.raises(UserError, match="'timm:vit_tiny_patch16_224' takes images of one size only"):
        build_tower("timm:vit_tiny_patch16_224", "random:", options={"native": {}})
    with pytest.raises(UserError, match="have no one image_size"):
        build_tower(str(folders / "vit"), image_size=32, options={"native": {}})
    with pytest.raises(UserError, match="unknown setting 'max_patch' of native"):
        build_tower(str(folders / "vit"), options={"native": {"max_patch": 9}})
