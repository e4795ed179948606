"""LoRA of one bit a number: the rounding and its gradient written out, the paper's bytes, files, merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_languages
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_adapt.adapt.binary_lora import BinaryLora
from vlm_adapt.adapt.bits import CENTRE, binarised, latent, statistics
from vlm_adapt.adapt.one_bit import STATISTICS
from vlm_adapt.adapt.piggyback import LATENT
from vlm_adapt.adapt.place import Place
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage

torch.set_num_threads(1)
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


class Part(nn.Module):
    """Two linear layers in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def attached(part: nn.Module, where: str = "vision", **settings: Any) -> BinaryLora:
    part.requires_grad_(False)
    method = BinaryLora(**({"r": 4} | settings))
    method.attach(Place(where, part))
    for parameter in method.parameters.values():
        parameter.requires_grad_(True)
        parameter.data.normal_(0.05, 0.3)
    return method


def two_values(w: Tensor) -> Tensor:
    """The paper's code, line by line: the z-score's sign times the centre, with mean and deviation again."""
    mean, std = w.mean(), w.std()
    z = (w - mean) / (std + 1e-5)
    rounded = torch.sign(z) * torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.75))
    return (rounded.detach() + z - z.detach()) * std + mean


def test_the_rounding_and_its_gradient() -> None:
    torch.manual_seed(0)
    w = torch.randn(7, 9, dtype=torch.float64).mul_(0.1).add_(0.02).requires_grad_()
    again = w.detach().clone().requires_grad_()
    found, want = binarised(w), two_values(again)
    torch.testing.assert_close(found, want, atol=1e-8, rtol=0)  # the centre has float32's digits there
    assert len(found.detach().mul(1e9).round().unique()) == 2
    weight = torch.randn(7, 9, dtype=torch.float64)
    (found * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(w.grad, again.grad, atol=1e-6, rtol=0)
    assert w.grad.abs().min() > 0
    assert abs(CENTRE - 0.67448975) < 1e-8


def test_formula_gradients_and_merge() -> None:
    """W x + (lora_alpha / r) b(B) b(A) x."""
    torch.manual_seed(0)
    part = Part()
    weights = {name: p.detach().clone() for name, p in part.named_parameters()}
    method = attached(part, lora_alpha=6)
    mine = list(method.parameters.values())
    a1, b1, a2, b2 = (p.detach().clone().requires_grad_() for p in mine)
    assert list(method.parameters) == [f"{n}.lora_{s}" for n in ("up", "down") for s in "AB"]
    x_ND = torch.randn(5, 6)
    hidden = F.linear(x_ND, weights["up.weight"], weights["up.bias"])
    hidden = (hidden + 1.5 * x_ND @ two_values(a1).T @ two_values(b1).T).relu()
    want = hidden @ weights["down.weight"].T + 1.5 * hidden @ two_values(a2).T @ two_values(b2).T
    got = part(x_ND)
    torch.testing.assert_close(got, want, **CLOSE)
    grads = torch.autograd.grad(want.square().mean(), (a1, b1, a2, b2))
    got.square().mean().backward()
    for parameter, grad in zip(mine, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4)
    method.set_active(False)
    plain = F.linear(F.linear(x_ND, weights["up.weight"], weights["up.bias"]).relu(), weights["down.weight"])
    assert torch.equal(part(x_ND), plain)
    method.set_active(True)
    method.merge()
    assert [name for name, _ in part.named_parameters()] == list(weights)
    assert not part.up._forward_hooks and not list(part.up.children())
    torch.testing.assert_close(part(x_ND), got, **CLOSE)


def test_the_start() -> None:
    """Near the base, as in the paper's code: B has a deviation of 0.001, since 0 has no sign."""
    torch.manual_seed(0)
    part = Part()
    x_ND = torch.randn(5, 6)
    before = part(x_ND)
    method = BinaryLora()
    method.attach(Place("vision", part))
    b = method.parameters["up.lora_B"]
    assert b.abs().max() <= 0.002 and 0.0005 < b.std() < 0.0015
    after = part(x_ND)
    assert not torch.equal(after, before) and (after - before).abs().max() < 0.05
    assert method.scale == 1 and method.r == 32


@pytest.mark.parametrize(("targets", "want"), [("q_proj", 73_920), (["q_proj", "v_proj"], 147_840)])
def test_the_papers_bytes(targets: Any, want: int) -> None:
    """ViT-B, 32 ranks: 12 pairs of 768 x 32 take 73,920 bytes: a bit a number and two floats a factor."""
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig())
    part = nn.Module()
    part.model, part.blocks = model, model.layers
    method = BinaryLora(target_modules=targets)
    method.attach(Place("vision", part))
    assert method.bytes_stored() == want
    assert {p.device.type for p in method.parameters.values()} == {"meta"}


def test_files(tmp_path: Path) -> None:
    """As many bytes as promised; from bits the same outputs, from floats the same parameters."""
    torch.manual_seed(0)
    part = Part()
    state = {name: p.detach().clone() for name, p in part.named_parameters()}
    method = attached(part)
    tensors = {key: p.detach() for key, p in method.parameters.items()}
    method.save(tmp_path / "bits", tensors)
    written = load_file(tmp_path / "bits" / "model.safetensors")
    assert (
        sum(t.numel() * t.element_size() for t in written.values())
        == method.bytes_stored()
        == 5 + 3 + 5 + 3 + 32
    )
    x_ND = torch.randn(5, 6)
    want = part(x_ND)
    other = Part()
    other.load_state_dict(state)
    again = attached(other)
    read = again.read(tmp_path / "bits")
    for key, parameter in again.parameters.items():
        parameter.data.copy_(read[key])
    torch.testing.assert_close(other(x_ND), want, **CLOSE)
    method.save(tmp_path / "both", tensors)
    method.save_latent(tmp_path / "both", tensors)
    floats = again.read(tmp_path / "both")
    assert (tmp_path / "both" / LATENT).is_file()
    assert all(torch.equal(floats[key], tensors[key]) for key in tensors)
    path = tmp_path / "bits" / "model.safetensors"
    save_file(written | {"up.lora_A": torch.zeros(9, dtype=torch.uint8)}, path)
    with pytest.raises(UserError, match="'up.lora_A' has 9 bytes and the model needs 3"):
        method.read(tmp_path / "bits")
    del written["up.lora_A" + STATISTICS]
    save_file(written, path)
    with pytest.raises(
        UserError, match="lacks 1 and has 0 unknown tensors .up.lora_A.mean_and_deviation."
    ) as caught:
        method.read(tmp_path / "bits")
    tiny.sentence(caught)


@pytest.mark.parametrize("share", [0.5, 0.03, 0.0, 1.0])
def test_what_bits_say_of_a_weight(share: float) -> None:
    """Signs, mean and deviation give a weight with the same two values, however many signs are equal."""
    torch.manual_seed(0)
    flags = torch.rand(40, 30) < share
    weight = (
        torch.where(flags, 1.0, -0.2) * torch.rand(40, 30) + 3.0
        if 0 < share < 1
        else torch.full((40, 30), 3.0)
    )
    found = latent(weight >= weight.mean(), statistics(weight))
    torch.testing.assert_close(statistics(found), statistics(weight), atol=2e-6, rtol=0)
    torch.testing.assert_close(binarised(found), binarised(weight), atol=2e-6, rtol=0)


def test_languages_and_the_attention_of_torch() -> None:
    """GPT-2's transposed layers; torch's attention, of which two weights are read and none is called."""
    language = CausalLanguage(tiny_languages.model("gpt2"))
    method = attached(language, "language")
    ids_BT = torch.tensor([[5, 6, 7]])
    before = language.model(input_ids=ids_BT).logits
    before.square().sum().backward()
    assert all(p.grad is not None for p in method.parameters.values())
    method.merge()
    torch.testing.assert_close(language.model(input_ids=ids_BT).logits, before, atol=1e-3, rtol=1e-4)
    part = nn.Module()
    part.attn = attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    method = attached(part)
    assert {key.rpartition(".")[0] for key in method.parameters} == {"attn.in_proj", "attn.out_proj"}
    x_NTD = torch.randn(2, 3, 8)
    found = attention(x_NTD, x_NTD, x_NTD, need_weights=False)[0]
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters.values())
    method.merge()
    assert type(attention) is nn.MultiheadAttention
    torch.testing.assert_close(
        attention(x_NTD, x_NTD, x_NTD, need_weights=False)[0], found, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(
        UserError, match="'attn.in_proj' is multiplied by its whole weight at once, so binary_lora"
    ):
        attached(part, lora_dropout=0.1)


def test_bf16_base_float32_factors() -> None:
    part = Part().bfloat16()
    method = attached(part)
    x_ND = torch.randn(5, 6).bfloat16()
    plain = part(x_ND)
    with torch.autocast("cpu", torch.bfloat16):
        cast = part(x_ND)
    assert plain.dtype == cast.dtype == torch.bfloat16
    cast.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 1.5}, "binary_lora's r is a whole number from 1, not 1.5"),
        ({"lora_dropout": -0.1}, "binary_lora's lora_dropout is a number from 0 to below 1"),
        ({"target_modules": "dawn"}, "'dawn' of 'binary_lora' matches no layer, did you mean 'down'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        attached(Part(), **settings)
    tiny.sentence(caught)
