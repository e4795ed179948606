"""Visual prompts: the paper's counts, and tokens put in by hand between each library's own blocks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import tiny
import torch
from safetensors.torch import save_file
from test_navit import together
from test_navit_hf import MODELS, patches
from torch import nn

from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.visual_prompt import VisualPrompt
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.vision import build_tower
from vlm_adapt.vision.timm import TimmTower
from vlm_adapt.vision.tower import Tower

torch.set_num_threads(1)
COMMON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
TIMM = {
    "vit": "vit_tiny_patch16_224",
    "registers": "vit_small_patch14_reg4_dinov2",
    "eva02": "eva02_tiny_patch14_224",
    "dinov3": "vit_small_patch16_dinov3",
    "rope_mixed": "vit_small_patch16_rope_mixed_224",
}
TOWERS = [*(f"hf:{name}" for name in MODELS), *(f"timm:{name}" for name in TIMM), "open_clip"]
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved models of all families of transformers, and one of open_clip."""
    folder = tmp_path_factory.mktemp("towers")
    for name, (config, model, more) in MODELS.items():
        made = tiny.seeded(model, config(**COMMON, intermediate_size=64, initializer_range=0.2, **more))
        made.save_pretrained(folder / name)
    vision = {"image_size": 16, "layers": 3, "width": 32, "head_width": 8, "patch_size": 4}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    (folder / "open_clip").mkdir()
    path = folder / "open_clip" / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}))
    model = open_clip.create_model(f"local-dir:{path.parent}", load_weights=False)
    save_file(model.state_dict(), path.parent / "open_clip_model.safetensors")
    return folder


def tower_of(folder: Path, name: str) -> Tower:
    """A tower of three blocks, of width 32, on images of 4 x 4 patches."""
    library, _, which = name.partition(":")
    if library != "timm":
        return build_tower(str(folder / (which or library)), image_size=16).requires_grad_(False)
    torch.manual_seed(0)
    trunk = timm.create_model(TIMM[which], **SMALL)
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # layer scales are all but zero
    return TimmTower(trunk, ImageSpec((16, 16))).eval().requires_grad_(False)


def attach(tower: Tower, blocks: Any = None, unused: set[str] | None = None, **settings: Any) -> VisualPrompt:
    torch.manual_seed(1)
    method = VisualPrompt(**{"tokens": 3, **settings})
    method.attach(Place("vision", tower, unused or set(), blocks))
    return method


def by_hand(tower: Tower, prompts: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """The patches after each block of a tower without prompts, which are put in here as the paper says."""
    seen: list[Any] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
        for block in tower.blocks
    ]
    with torch.no_grad():
        tower(PIXELS)
    for hook in hooks:
        hook.remove()
    blocks = copy.deepcopy(tower.blocks)
    (hidden_NTD, *_), _ = seen[0]
    prefix, here = hidden_NTD.shape[1] - 16, 0
    found = []
    for number, block in enumerate(blocks):
        if number in prompts:
            first, rest = hidden_NTD[:, :prefix], hidden_NTD[:, prefix + here :]
            here = len(prompts[number])
            hidden_NTD = torch.cat([first, prompts[number].expand(len(first), -1, -1), rest], dim=1)
        for module in block.modules():
            if hasattr(module, "num_prefix_tokens"):  # timm's rotary attention leaves as many unturned
                module.num_prefix_tokens = prefix + here
        (_, *args), kwargs = seen[number]
        output = block(hidden_NTD, *args, **kwargs)
        hidden_NTD = output[0] if isinstance(output, tuple) else output
        found.append(hidden_NTD[:, prefix + here :])
    return found


@pytest.mark.parametrize(
    ("deep", "blocks", "chosen"), [(True, None, [0, 1, 2]), (False, "1:", [1]), (True, [0, 2], [0, 2])]
)
@pytest.mark.parametrize("name", TOWERS)
def test_the_formula(folder: Path, name: str, deep: bool, blocks: Any, chosen: list[int]) -> None:
    """Tokens between prefix and patches, replaced at each chosen block; gradients reach them alone."""
    tower = tower_of(folder, name)
    base = copy.deepcopy(tower)
    before = base(PIXELS, [0, 1, 2])
    method = attach(tower, blocks, deep=deep)
    given = list(method.parameters.values())
    assert [key.split(".")[-3] for key in method.parameters] == [str(number) for number in chosen]
    expected = by_hand(base, dict(zip(chosen, given, strict=True)))
    found = tower(PIXELS, [0, 1])
    found.append(tower(PIXELS, [2])[0])
    expected[2] = last_norm(base)(expected[2])
    for ours, hand, plain in zip(found, expected, before, strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, hand, atol=1e-6, rtol=1e-6)  # the same sums in the same order
    assert (found[2] - before[2]).abs().max() > 1e-3
    sum((feature * torch.randn_like(feature)).sum() for feature in found).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in given)
    assert all(p.grad is None for p in tower.parameters() if not any(p is one for one in given))
    method.set_active(False)
    for ours, plain in zip(tower(PIXELS, [0, 1, 2]), before, strict=True):
        assert torch.equal(ours, plain)
    method.set_active(True)
    assert torch.equal(tower(PIXELS)[0], found[2])


def last_norm(tower: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    if isinstance(tower, TimmTower):
        return tower.trunk.norm
    if hasattr(tower, "visual"):
        return tower.visual.ln_post
    return tower.model.get_submodule(tower.family.norm) if tower.final_norm else nn.Identity()


@pytest.mark.parametrize("name", ["hf:clip", "hf:dinov3", "timm:vit", "timm:eva02", "open_clip"])
def test_recomputed_blocks_give_the_same_gradients(folder: Path, name: str) -> None:
    gradients = []
    for enabled in (False, True):
        tower = tower_of(folder, name)
        method = attach(tower, "1:")
        tower.train().set_activation_checkpointing(enabled)
        tower(PIXELS)[0].square().sum().backward()
        gradients.append([p.grad for p in method.parameters.values()])
    for without, with_ in zip(*gradients, strict=True):
        assert torch.equal(without, with_)


def meta(name: str) -> Tower:
    with torch.device("meta"):
        return build_tower(name, "random:")


def test_counts() -> None:
    """p d shallow, L p d deep: ViT-B/16 with ten prompts has 7,680 and 92,160 (VPT, section 3.2)."""
    for settings, count in (({"deep": False}, 7_680), ({}, 92_160), ({"tokens": 50}, 460_800)):
        method = VisualPrompt(**settings)
        method.attach(Place("vision", meta("timm:vit_base_patch16_224")))
        assert sum(p.numel() for p in method.parameters.values()) == count
        assert method.bytes_stored() == 4 * count
        assert {p.device.type for p in method.parameters.values()} == {"meta"}
    method = VisualPrompt(tokens=10)
    method.attach(Place("vision", meta("open_clip:ViT-L-14"), chosen="-4:"))
    assert sum(p.numel() for p in method.parameters.values()) == 4 * 10 * 1024
    assert list(method.parameters)[0] == "transformer.resblocks.20.visual_prompt.prompts"


def test_the_start() -> None:
    """Uniform within sqrt(6 / (3 P^2 + d)), as the paper's code draws it."""
    torch.manual_seed(0)
    tower = build_tower("timm:vit_tiny_patch16_224", "random:0", image_size=64)
    drawn = torch.cat([p.detach().flatten() for p in attach(tower, tokens=40).parameters.values()])
    bound = math.sqrt(6 / (3 * 16 * 16 + 192))
    assert 0.999 * bound < drawn.abs().max() <= bound
    # The deviation of a uniform draw is bound / sqrt(3); of 92,160 numbers it is off by 0.3 %.
    assert abs(float(drawn.std()) / (bound / math.sqrt(3)) - 1) < 0.01


def test_dropout_is_of_what_trains(folder: Path) -> None:
    tower = tower_of(folder, "hf:vit")
    method = attach(tower, dropout=0.5)
    still = tower(PIXELS)[0]
    tower.train()
    first, second = tower(PIXELS)[0], tower(PIXELS)[0]
    assert not torch.equal(first, second) and not torch.equal(first, still)
    for parameter in method.parameters.values():
        parameter.requires_grad_(False)  # in a later stage
    assert torch.equal(tower(PIXELS)[0], still)


def test_several_lines_stand_in_their_order(folder: Path) -> None:
    """A later line's prompts are nearer to the patches, wherever they come in; each can be left out."""
    tower = tower_of(folder, "timm:eva02")
    base = copy.deepcopy(tower)
    one, two = attach(tower, "1:"), attach(tower, tokens=2)
    a, b = list(one.parameters.values()), list(two.parameters.values())
    both = {0: b[0], 1: torch.cat([a[0], b[1]]), 2: torch.cat([a[1], b[2]])}
    for active, prompts in (
        ((True, True), both),
        ((True, False), {1: a[0], 2: a[1]}),
        ((False, True), dict(enumerate(b))),
    ):
        one.set_active(active[0])
        two.set_active(active[1])
        hand = base.trunk.norm(by_hand(base, prompts)[2])
        torch.testing.assert_close(tower(PIXELS)[0], hand, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attention", ["images", "dense"])
@pytest.mark.parametrize("name", ["vit", "clip", "dinov3", "siglip2", "navit"])
def test_packed_images_have_prompts_of_their_own(folder: Path, name: str, attention: str) -> None:
    """Each image in a sequence is what it is alone; one of 4 x 4 patches what the tower of one size gives."""
    options = {"native": {"max_patches": 40, "attention": attention}}
    if name == "navit":
        more = {"width": 32, "depth": 3, "heads": 4, "patch": 4}
        tower = build_tower("navit:tiny", "random:0", options=options | more)
    else:
        tower = build_tower(str(folder / name), options=options)
    tower.requires_grad_(False)
    first, second = attach(tower, "1:"), attach(tower, [0, 2], tokens=2)
    generator = torch.Generator().manual_seed(3)
    alone = [
        patches(torch.randn(1, 3, *size, generator=generator))
        for size in ((12, 20), (4, 4), (28, 8), (12, 20))
    ]
    alone.append(patches(PIXELS[:1]))
    every = tower(together(alone), [1, 2])
    apart = zip(*(tower(one, [1, 2]) for one in alone), strict=True)
    for found, parts in zip(every, apart, strict=True):
        # The same sums in products of other shapes.
        assert (found - torch.cat(parts)).abs().max() < 2e-6 * max(1, found.abs().max() / 4)
    if name != "navit":
        sized = tower_of(folder, f"hf:{name}")
        twins = attach(sized, "1:"), attach(sized, [0, 2], tokens=2)
        for twin, own in zip(twins, (first, second), strict=True):
            for here, there in zip(twin.parameters.values(), own.parameters.values(), strict=True):
                assert torch.equal(here, there)  # one seed
        expected = sized(PIXELS[:1])[0][0]
        assert (every[1][-16:] - expected).abs().max() < 2e-6 * max(1, expected.abs().max() / 4)
    gradients = []
    for enabled in (False, True):
        tower.zero_grad()
        tower.set_activation_checkpointing(enabled)
        tower(together(alone))[0].square().sum().backward()
        gradients.append([p.grad for m in (first, second) for p in m.parameters.values()])
    for without, with_ in zip(*gradients, strict=True):
        assert without.abs().sum() > 0 and torch.equal(without, with_)
