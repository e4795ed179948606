"""Piggyback: the mask and its gradient written out, one bit a weight in the file, every kind of layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import rows
import tiny
import tiny_languages
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_adapt.adapt.bits import pack, unpack
from vlm_adapt.adapt.lora import Lora
from vlm_adapt.adapt.piggyback import LATENT, Piggyback
from vlm_adapt.adapt.place import Place
from vlm_adapt.config.schema import Adapt
from vlm_adapt.errors import UserError
from vlm_adapt.language.causal import CausalLanguage

torch.set_num_threads(1)
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


class Part(nn.Module):
    """A convolution and a linear layer in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.line = nn.Linear(5, 7)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.line(self.conv(x_NCHW).mean((2, 3)))


def attached(part: nn.Module, moved: bool = True, where: str = "vision", **settings: Any) -> Piggyback:
    part.requires_grad_(False)
    method = Piggyback(**settings)
    method.attach(Place(where, part))
    for parameter in method.parameters.values():
        parameter.requires_grad_(True)
        if moved:
            parameter.data += 0.01 * torch.randn(parameter.shape)
    return method


def save(method: Piggyback, folder: Path, latent: bool = False) -> None:
    tensors = {key: p.detach() for key, p in method.parameters.items()}
    method.save(folder, tensors)
    if latent:
        method.save_latent(folder, tensors)


def test_formula_gradient_and_merge() -> None:
    """W * 1[m > 0.005]; the gradient of m is that of the masked weight times W; biases stay frozen."""
    torch.manual_seed(0)
    part = Part()
    weights = [part.conv.weight.detach().clone(), part.line.weight.detach().clone()]
    names = [name for name, _ in part.named_parameters()]
    method = attached(part)
    masks = [p.detach().clone() for p in method.parameters.values()]
    masked = [(w * (m > 5e-3)).requires_grad_() for w, m in zip(weights, masks, strict=True)]
    x_NCHW = torch.randn(2, 3, 6, 6)
    want = F.linear(F.conv2d(x_NCHW, masked[0], part.conv.bias).mean((2, 3)), masked[1], part.line.bias)
    got = part(x_NCHW)
    torch.testing.assert_close(got, want, **CLOSE)
    grads = torch.autograd.grad(want.square().sum(), masked)
    got.square().sum().backward()
    for parameter, grad, weight in zip(method.parameters.values(), grads, weights, strict=True):
        torch.testing.assert_close(parameter.grad, grad * weight, atol=1e-5, rtol=1e-5)
        assert 0.1 < (parameter > 5e-3).float().mean() < 0.95
    own = {id(p) for p in method.parameters.values()}
    assert not [
        n for n, p in part.named_parameters() if id(p) not in own and (p.requires_grad or p.grad is not None)
    ]
    method.set_active(False)
    plain = F.linear(F.conv2d(x_NCHW, weights[0], part.conv.bias).mean((2, 3)), weights[1], part.line.bias)
    assert torch.equal(part(x_NCHW), plain)
    method.set_active(True)
    method.merge()
    assert [name for name, _ in part.named_parameters()] == names
    assert type(part.conv) is nn.Conv2d and type(part.line) is nn.Linear
    assert torch.equal(part(x_NCHW), got)


def test_the_start_masks_nothing() -> None:
    part = Part()
    x_NCHW = torch.randn(2, 3, 6, 6)
    before = part(x_NCHW)
    method = attached(part, moved=False)
    assert torch.equal(part(x_NCHW), before)
    assert all(torch.equal(p, torch.full(p.shape, 0.01)) for p in method.parameters.values())
    assert set(method.parameters) == {"conv.mask", "line.mask"}


def test_one_bit_a_weight(tmp_path: Path) -> None:
    """ceil(numel / 8) bytes a layer; masks read from bits do what the trained ones did."""
    torch.manual_seed(0)
    part = Part()
    weights = [p.detach().clone() for p in part.parameters()]
    method = attached(part)
    save(method, tmp_path / "bits")
    written = load_file(tmp_path / "bits" / "model.safetensors")
    assert {key: (t.dtype, t.numel()) for key, t in written.items()} == {
        "conv.mask": (torch.uint8, math.ceil(135 / 8)),
        "line.mask": (torch.uint8, math.ceil(35 / 8)),
    }
    assert method.bytes_stored() == 17 + 5 == sum(t.numel() for t in written.values())
    x_NCHW = torch.randn(2, 3, 6, 6)
    want = part(x_NCHW)
    other = Part()
    for parameter, value in zip(other.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    again = attached(other)
    read = again.read(tmp_path / "bits")
    for key, parameter in again.parameters.items():
        parameter.data.copy_(read[key])
    assert torch.equal(other(x_NCHW), want)
    # With the floats beside them, training goes on from where it was.
    save(method, tmp_path / "both", latent=True)
    latent = again.read(tmp_path / "both")
    assert all(torch.equal(latent[key], p) for key, p in method.parameters.items())
    assert (tmp_path / "both" / LATENT).is_file()


def test_bits() -> None:
    """The first flag is the highest bit; the last byte is filled with zeros."""
    flags = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]).bool()
    assert pack(flags).tolist() == [0b10000001, 0b10000000]
    assert torch.equal(unpack(pack(flags), flags.shape), flags)


def test_counts_without_weights() -> None:
    """Linear layers of ViT-B/16: 12 * 12 * 768^2 bits, 10,616,832 bytes; its patches 73,728."""
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig())
    part = nn.Module()
    part.model, part.blocks = model, model.layers
    method = Piggyback()
    method.attach(Place("vision", part))
    patches = 768 * 3 * 16 * 16
    assert sum(p.numel() for p in method.parameters.values()) == 12 * 12 * 768**2 + patches
    assert method.bytes_stored() == 10_616_832 + patches // 8
    assert {p.device.type for p in method.parameters.values()} == {"meta"}


def test_the_attention_of_torch() -> None:
    """Both of its weights, one of which it reads from a layer that it never calls."""
    torch.manual_seed(0)
    part = nn.Module()
    part.attn = attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    weights = [attention.in_proj_weight.detach().clone(), attention.out_proj.weight.detach().clone()]
    method = attached(part)
    assert set(method.parameters) == {"attn.in_proj.mask", "attn.out_proj.mask"}
    x_NTD = torch.randn(2, 3, 8)
    found = attention(x_NTD, x_NTD, x_NTD, need_weights=False)[0]
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters.values())
    plain = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    plain.load_state_dict({k: v for k, v in attention.state_dict().items() if "mask" not in k})
    masks = list(method.parameters.values())
    plain.in_proj_weight.data, plain.out_proj.weight.data = (
        w * (m > 5e-3) for w, m in zip(weights, masks, strict=True)
    )
    with torch.no_grad():
        torch.testing.assert_close(found, plain(x_NTD, x_NTD, x_NTD, need_weights=False)[0], **CLOSE)


@pytest.mark.parametrize("masks_first", [True, False])
def test_beside_lora(masks_first: bool) -> None:
    """peft's layer around the masked one, in either order: (W * mask) x + s B A x, with the same keys."""
    language = CausalLanguage(tiny_languages.model("llama"))
    layer = language.model.model.layers[0].self_attn.q_proj
    weight = layer.weight.detach().clone()
    mask, update = Piggyback("q_proj"), Lora(r=2, target_modules="q_proj")
    for method in (mask, update) if masks_first else (update, mask):
        method.attach(Place("language", language))
        for parameter in method.parameters.values():
            parameter.data += 0.01 * torch.randn(parameter.shape)
    key = "model.layers.0.self_attn.q_proj"
    assert set(mask.parameters) == {f"model.layers.{n}.self_attn.q_proj.mask" for n in (0, 1)}
    a, b = (p for name, p in update.parameters.items() if key in name)
    x_TD = torch.randn(3, 32)
    masked = weight * (mask.parameters[f"{key}.mask"] > 5e-3)
    want = x_TD @ masked.T + 2 * x_TD @ a.T @ b.T
    found = language.model.model.layers[0].self_attn.q_proj(x_TD)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)  # terms of size 5
    mask.merge()
    after = language.model.model.layers[0].self_attn.q_proj(x_TD)
    torch.testing.assert_close(after, want, atol=1e-5, rtol=1e-5)


def test_merged_before_what_is_around_it(tmp_path: Path) -> None:
    """A plan puts masks inside of LoRA's layers in whatever order it lists them, and merging undoes that."""
    ours = rows.assemble(tiny.vit(tmp_path / "vit"), tiny.llama(tmp_path / "llama"))
    lines = [{"method": name, "where": "language"} for name in ("houlsby", "piggyback", "lora")]
    plan = ours.adapt([[Adapt.model_validate(line) for line in lines]])
    masks = next(item.method for item in plan.attached if item.method.name == "piggyback")
    assert [key.split("layers.0.")[1] for key in masks.parameters if "layers.0." in key] == [
        *(f"self_attn.{name}_proj.mask" for name in "qkvo"),
        *(f"mlp.{name}_proj.mask" for name in ("gate", "up", "down")),
    ]
    for item in plan.attached:
        for parameter in item.method.parameters.values():
            parameter.data += 0.01 * torch.randn(parameter.shape)
    batch = rows.batch(ours, [rows.conversation(ours, "no", "yes")])
    before = ours.model.logits(batch)
    folds = [item.method for item in reversed(plan.attached) if item.method.mergeable]
    with pytest.raises(UserError, match="merge 'piggyback' first"):
        next(method for method in folds if method.name == "lora").merge()
    for method in folds:
        method.merge()
    torch.testing.assert_close(
        ours.model.logits(batch), before, atol=1e-4, rtol=1e-4
    )  # sums in another order


def test_conv1d_of_gpt2() -> None:
    language = CausalLanguage(tiny_languages.model("gpt2"))
    before = language.model(input_ids=torch.tensor([[5, 6, 7]])).logits
    method = attached(language, moved=False, where="language")
    assert torch.equal(language.model(input_ids=torch.tensor([[5, 6, 7]])).logits, before)
    assert method.parameters["transformer.h.0.attn.c_attn.mask"].shape == (32, 96)
    language.model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().sum().backward()
    assert all(p.grad is not None for p in method.parameters.values())


def test_bf16_base_float32_masks() -> None:
    part = Part().bfloat16()
    method = attached(part)
    x_NCHW = torch.randn(2, 3, 6, 6).bfloat16()
    plain = part(x_NCHW)
    with torch.autocast("cpu", torch.bfloat16):
        cast = part(x_NCHW)
    assert plain.dtype == cast.dtype == torch.bfloat16
    cast.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters.values())


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    part = Part()
    method = attached(part)
    save(method, tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    save_file(whole | {"line.mask": torch.zeros(6, dtype=torch.uint8)}, path)
    with pytest.raises(UserError, match="'line.mask' has 6 bytes and the model needs 5"):
        method.read(tmp_path)
    save_file({"line.mask": whole["line.mask"]}, path)
    with pytest.raises(UserError, match="lacks 1 and has 0 unknown tensors .conv.mask.") as caught:
        method.read(tmp_path)
    tiny.sentence(caught)
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match="is cut off or is no safetensors file"):
        method.read(tmp_path)


def test_targets() -> None:
    assert set(attached(Part(), target_modules="line").parameters) == {"line.mask"}
    with pytest.raises(UserError, match="'lime' of 'piggyback' matches no layer, did you mean 'line'"):
        attached(Part(), target_modules=["conv", "lime"])
    with pytest.raises(UserError, match="finds no linear or convolution layer in 'connector'") as caught:
        attached(nn.Sequential(nn.LayerNorm(3)), where="connector")
    tiny.sentence(caught)
