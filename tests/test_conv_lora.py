"""LoRA on convolutions: loralib's definition written out, its counts, and real encoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import tiny
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_adapt.adapt.conv_lora import ConvLora
from vlm_adapt.adapt.piggyback import Piggyback
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError
from vlm_adapt.vision import build_tower

torch.set_num_threads(1)
CLOSE = {"atol": 1e-6, "rtol": 1e-6}  # float32, sums of some hundred terms of about 0.1


class Part(nn.Module):
    """A part with one convolution in a block, and one before it."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.stem = nn.Conv2d(3, convolution.in_channels, 1)
        self.stages = nn.ModuleList([nn.Sequential(convolution)])

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.stages)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def attached(convolution: nn.Conv2d, moved: bool = True, **settings: Any) -> tuple[Part, ConvLora]:
    part = Part(convolution).requires_grad_(False)
    method = ConvLora(**({"r": 4, "target_modules": "stages.0.0"} | settings))
    method.attach(Place("vision", part))
    for parameter in method.parameters.values():
        parameter.requires_grad_(True)
        if moved:
            parameter.data.normal_(0, 0.1)
    return part, method


def written_out(a: Tensor, b: Tensor, shape: torch.Size, scale: float) -> Tensor:
    """(B A) read row by row into the weight's shape, an element at a time."""
    product = [
        sum(b[i, n] * a[n, j] for n in range(len(a))) for i in range(len(b)) for j in range(a.shape[1])
    ]
    found = torch.zeros(shape)
    places = [
        (o, i, u, v)
        for o in range(shape[0])
        for i in range(shape[1])
        for u in range(shape[2])
        for v in range(shape[3])
    ]
    for place, value in zip(places, product, strict=True):
        found[place] = value * scale
    return found


def test_the_papers_count() -> None:
    """r k^2 (in + out/g): 864 for in 8, out 16, k 3, r 4."""
    for groups, want in ((1, 864), (2, 4 * 9 * (8 + 8)), (8, 4 * 9 * (8 + 2))):
        part, method = attached(nn.Conv2d(8, 16, 3, groups=groups))
        assert sum(p.numel() for p in method.parameters.values()) == want
        assert [tuple(p.shape) for p in method.parameters.values()] == [(12, 24), (16 // groups * 3, 12)]
        assert list(method.parameters) == ["stages.0.0.lora_A", "stages.0.0.lora_B"]
        assert method.bytes_stored() == 4 * want
        assert sum(p.numel() for p in part.parameters() if p.requires_grad) == want


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_formula_gradients_and_merge(groups: int) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups)
    weight, bias = convolution.weight.detach().clone(), convolution.bias.detach().clone()
    names = [name for name, _ in Part(convolution).named_parameters()]
    part, method = attached(convolution, lora_alpha=6)
    a, b = (p.detach().clone().requires_grad_() for p in method.parameters.values())
    x_NCHW = torch.randn(2, 8, 7, 5)
    delta = written_out(a, b, weight.shape, 6 / 4)
    want = F.conv2d(x_NCHW, weight + delta, bias, 2, 1, 1, groups)
    got = part(x_NCHW)
    torch.testing.assert_close(got, want, **CLOSE)
    wanted = torch.autograd.grad(want.square().mean(), (a, b))
    got.square().mean().backward()
    for parameter, grad in zip(method.parameters.values(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, grad, **CLOSE)
    assert part.stages[0][0].bias.grad is None
    copied = copy.deepcopy(part)
    method.set_active(False)
    assert torch.equal(part(x_NCHW), F.conv2d(x_NCHW, weight, bias, 2, 1, 1, groups))
    assert torch.equal(copied(x_NCHW), got)  # a copy has changes of its own
    method.set_active(True)
    assert torch.equal(part(x_NCHW), got)
    method.merge()
    assert type(part.stages[0][0]) is nn.Conv2d
    assert [name for name, _ in part.named_parameters()] == names
    torch.testing.assert_close(part(x_NCHW), got, **CLOSE)


def test_kaiming_and_zero() -> None:
    torch.manual_seed(0)
    _, method = attached(nn.Conv2d(8, 16, 3), moved=False)
    a, b = method.parameters.values()
    bound = a.shape[1] ** -0.5  # kaiming's uniform bound with sqrt(5)
    assert 0.9 * bound < a.abs().max() <= bound and not b.any()
    assert method.scale == 2


@pytest.mark.parametrize("kind", [Conv2dSame, ScaledStdConv2d])
def test_special_convolutions_keep_their_forward(kind: Any) -> None:
    """Padding of TensorFlow, standardised weights: as if the base's weight itself were another."""
    torch.manual_seed(0)
    convolution = kind(8, 16, 3, stride=2)
    plain = copy.deepcopy(convolution)
    part, method = attached(convolution)
    a, b = method.parameters.values()
    plain.weight.data += written_out(a.detach(), b.detach(), plain.weight.shape, 2.0)
    x_NCHW = torch.randn(2, 8, 7, 5)
    torch.testing.assert_close(part(x_NCHW), plain(x_NCHW), **CLOSE)
    method.merge()
    assert type(part.stages[0][0]) is kind
    torch.testing.assert_close(part(x_NCHW), plain(x_NCHW), **CLOSE)


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "convnext_atto", "efficientnet_lite0"])
def test_encoders(name: str) -> None:
    """The identity at the start, a gradient everywhere, as many parameters as the formula says."""
    tower = build_tower(f"timm:{name}", "random:", 64)
    tower.requires_grad_(False)
    convolutions = {n: m for n, m in tower.trunk.named_modules() if isinstance(m, nn.Conv2d)}
    pixels_NCHW = torch.randn(1, 3, 64, 64)
    before = tower(pixels_NCHW)[0]
    method = ConvLora(r=2)
    method.attach(Place("vision", tower))
    assert {key.rpartition(".")[0] for key in method.parameters} == set(convolutions)
    want = sum(
        2 * m.kernel_size[0] ** 2 * (m.in_channels + m.out_channels // m.groups)
        for m in convolutions.values()
    )
    assert sum(p.numel() for p in method.parameters.values()) == want
    assert torch.equal(tower(pixels_NCHW)[0], before)
    for key, parameter in method.parameters.items():
        parameter.requires_grad_(True)
        if key.endswith("lora_B"):
            parameter.data.normal_(0, 0.01)
    found = tower(pixels_NCHW)[0]
    found.square().mean().backward()
    assert not [key for key, parameter in method.parameters.items() if parameter.grad is None]
    assert not torch.equal(found, before)
    method.merge()
    # Through some fifty layers of unit scale and their norms, in float32.
    torch.testing.assert_close(tower(pixels_NCHW)[0], found, atol=1e-4, rtol=1e-4)


def test_blocks_and_targets(tmp_path: Any) -> None:
    """Without `blocks` the stem counts too; with it only what is inside."""
    part = Part(nn.Conv2d(8, 8, 3))
    found = []
    for chosen, targets in ((None, "all-conv"), (0, "all-conv"), (None, ["stem"])):
        method = ConvLora(r=1, target_modules=targets)
        method.attach(Place("vision", copy.deepcopy(part), chosen=chosen))
        found.append([key.removesuffix(".lora_A") for key in method.parameters if key.endswith("A")])
    assert found == [["stem", "stages.0.0"], ["stages.0.0"], ["stem"]]
    tower = build_tower(str(tiny.vit(tmp_path / "vit")))
    method = ConvLora(r=1)
    method.attach(Place("vision", tower))
    assert all("patch_embed" in key for key in method.parameters)
    with pytest.raises(UserError, match="finds no convolution layer in 'vision'"):
        ConvLora().attach(Place("vision", tower, chosen=0))


def test_counts_without_weights() -> None:
    with torch.device("meta"):
        trunk = timm.create_model("convnext_base", num_classes=0)
    part = nn.Module()
    part.trunk = trunk
    method = ConvLora(r=4)
    method.attach(Place("vision", part))
    assert {p.device.type for p in method.parameters.values()} == {"meta"}
    want = sum(
        4 * m.kernel_size[0] ** 2 * (m.in_channels + m.out_channels // m.groups)
        for m in trunk.modules()
        if isinstance(m, nn.Conv2d)
    )
    assert sum(p.numel() for p in method.parameters.values()) == want


@pytest.mark.parametrize("first", ["update", "mask"])
def test_two_changes_of_one_weight(first: str) -> None:
    """An update and a mask: in the order they came; taken off in any order."""
    torch.manual_seed(0)
    part = Part(nn.Conv2d(8, 16, 3)).requires_grad_(False)
    weight, bias = (p.detach().clone() for p in part.stages[0][0].parameters())
    updates = [ConvLora(r=2, target_modules="stages.0.0") for _ in range(2)]
    mask = Piggyback(target_modules="stages.0.0")
    for method in [*updates, mask] if first == "update" else [mask, *updates]:
        method.attach(Place("vision", part))
        for parameter in method.parameters.values():
            parameter.data.normal_(0, 0.1)
    assert set(updates[0].parameters) == set(updates[1].parameters)
    delta = sum(
        written_out(*(p.detach() for p in one.parameters.values()), weight.shape, 2.0) for one in updates
    )
    kept = (next(iter(mask.parameters.values())) > 5e-3).float()
    want = (weight + delta) * kept if first == "update" else weight * kept + delta
    x_NCHW = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(part(x_NCHW), F.conv2d(x_NCHW, want, bias), **CLOSE)
    if first == "mask":
        with pytest.raises(UserError, match="merge 'piggyback' first"):
            updates[0].merge()
    for method in [*reversed(updates), mask] if first == "update" else [mask, *reversed(updates)]:
        method.merge()
    assert type(part.stages[0][0]) is nn.Conv2d
    torch.testing.assert_close(part(x_NCHW), F.conv2d(x_NCHW, want, bias), **CLOSE)


def test_a_failing_change_is_no_silence() -> None:
    """torch would hand out the unchanged weight where computing the changed one fails."""
    part, method = attached(nn.Conv2d(8, 16, 3))
    del method.changes[0][1].shape
    with pytest.raises(RuntimeError, match="the change of 'weight' failed"):
        part(torch.randn(1, 8, 5, 5))


def test_bf16_base() -> None:
    """Summed in float32 and rounded once, with autocast and without."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 16, 3).bfloat16()
    part, method = attached(convolution)
    a, b = (p.detach() for p in method.parameters.values())
    weight = (
        convolution._parameters["weight"].float() + written_out(a, b, torch.Size((16, 8, 3, 3)), 2.0)
    ).bfloat16()
    x_NCHW = torch.randn(1, 8, 5, 5).bfloat16()
    want = F.conv2d(x_NCHW, weight, convolution.bias)
    assert all(p.dtype == torch.float32 for p in method.parameters.values())
    assert torch.equal(part(x_NCHW), want)
    with torch.autocast("cpu", torch.bfloat16):
        found = part(x_NCHW)
    assert torch.equal(found, want)
    found.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "conv_lora's r is a whole number from 1, not 0"),
        ({"r": 2, "lora_alpha": 0}, "lora_alpha is a number above 0, not 0"),
        ({"r": 2, "target_modules": "stages.0.1"}, "'stages.0.1' of 'conv_lora' matches no layer"),
        ({"r": 2, "target_modules": "stage"}, "matches no layer"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        attached(nn.Conv2d(8, 16, 3), **settings)
    assert "\n" not in str(caught.value)


def test_filters_that_are_not_square() -> None:
    with pytest.raises(UserError, match="needs square filters, and 'stages.0.0' has 1 x 3"):
        attached(nn.Conv2d(8, 16, (1, 3)))
