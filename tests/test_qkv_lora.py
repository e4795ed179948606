"""LoRA on chosen projections: the formula, the others to the bit, counts, torch's own attention, company."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from projecting import CLOSE, Part, on, update, vit
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_adapt.adapt.lora import Lora
from vlm_adapt.adapt.piggyback import Piggyback
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.qkv_lora import QkvLora
from vlm_adapt.errors import UserError

torch.set_num_threads(1)


def test_thirds_of_timm() -> None:
    """Wq x + s Bq Aq x, Wv x + s Bv Av x, and keys that are the base's own bits."""
    attention = vit().blocks[0].attn
    weight, bias = (p.detach().clone() for p in attention.qkv.parameters())
    x_NTD = torch.randn(2, 5, 32)
    method = on(Part(attention))
    q, k, v = attention.qkv(x_NTD).chunk(3, -1)
    base = F.linear(x_NTD, weight, bias).chunk(3, -1)
    torch.testing.assert_close(q, base[0] + update(method, "attn.qkv.q", x_NTD), **CLOSE)
    torch.testing.assert_close(v, base[2] + update(method, "attn.qkv.v", x_NTD), **CLOSE)
    assert torch.equal(k, base[1])
    assert {key: tuple(p.shape) for key, p in method.parameters.items()} == {
        f"attn.qkv.{letter}.lora_{side}": (4, 32) if side == "A" else (32, 4)
        for letter in "qv"
        for side in "AB"
    }
    before = attention(x_NTD)
    before.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters.values())
    method.set_active(False)
    assert torch.equal(attention.qkv(x_NTD), F.linear(x_NTD, weight, bias))
    method.set_active(True)
    method.merge()
    assert [name for name, _ in attention.qkv.named_parameters()] == ["weight", "bias"]
    assert torch.equal(attention.qkv.weight[32:64], weight[32:64])
    torch.testing.assert_close(attention(x_NTD), before, **CLOSE)
    assert not attention.qkv._forward_hooks


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_papers_count(library: str) -> None:
    """2 d r for each projection: of ViT-B, r 8 on q and v, 12 * 2 * 2 * 768 * 8 = 294,912."""
    with torch.device("meta"):
        if library == "timm":
            part = nn.Module()
            part.trunk = timm.create_model("vit_base_patch16_224", num_classes=0)
        else:
            part = Part(transformers.ViTModel(transformers.ViTConfig()))
    method = QkvLora(r=8)
    method.attach(Place("vision", part))
    assert sum(p.numel() for p in method.parameters.values()) == 294_912
    assert {p.device.type for p in method.parameters.values()} == {"meta"}
    assert method.bytes_stored() == 4 * 294_912


@pytest.mark.parametrize("first", [True, False])
def test_the_attention_of_torch(first: bool) -> None:
    """open_clip's: as if in_proj_weight itself were another; in training and by its own fast path."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 4, batch_first=first).eval()
    weight = attention.in_proj_weight.detach().clone()
    names = [name for name, _ in attention.named_parameters()]
    x = torch.randn(3, 5, 32)
    with torch.no_grad():
        before = attention(x, x, x, need_weights=False)[0]
    method = QkvLora(r=4, lora_alpha=6)
    method.attach(Place("vision", Part(attention)))
    with torch.no_grad():
        assert torch.equal(attention(x, x, x, need_weights=False)[0], before)
    for parameter in method.parameters.values():
        parameter.data.normal_(0, 0.3)
    assert set(method.parameters) == {f"attn.in_proj.{p}.lora_{s}" for p in "qv" for s in "AB"}
    factors = {key.split("in_proj.")[1]: p.detach() for key, p in method.parameters.items()}
    changed = weight.clone()
    changed[:32] += 1.5 * factors["q.lora_B"] @ factors["q.lora_A"]
    changed[64:] += 1.5 * factors["v.lora_B"] @ factors["v.lora_A"]
    assert torch.equal(attention.in_proj_weight[32:64], weight[32:64])
    torch.testing.assert_close(attention.in_proj_weight, changed, atol=1e-6, rtol=0)

    def run(projection: Tensor, query: Tensor) -> Tensor:
        one = query.transpose(0, 1) if first else query
        out = F.multi_head_attention_forward(
            *(one,) * 3,
            32,
            4,
            projection,
            attention.in_proj_bias,
            None,
            None,
            False,
            0.0,
            attention.out_proj.weight,
            attention.out_proj.bias,
            need_weights=False,
        )[0]
        return out.transpose(0, 1) if first else out

    for training in (False, True):
        attention.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], run(changed, x), **CLOSE)
    query = x.clone().requires_grad_()
    found = attention(query, query, query, need_weights=False)[0]
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in method.parameters.values())
    again = x.clone().requires_grad_()
    run(changed, again).square().sum().backward()
    torch.testing.assert_close(query.grad, again.grad, atol=1e-4, rtol=1e-4)
    method.set_active(False)
    with torch.no_grad():
        assert torch.equal(attention.eval()(x, x, x, need_weights=False)[0], before)
    method.set_active(True)
    method.merge()
    assert type(attention) is nn.MultiheadAttention
    assert [name for name, _ in attention.named_parameters()] == names
    torch.testing.assert_close(attention.in_proj_weight.detach(), changed, atol=1e-6, rtol=0)


def test_peft_around_it_is_merged_first_or_last() -> None:
    """Both are sums: peft must then find the base's own weight, not the changed one."""
    for first in (0, 1):
        part = Part(nn.MultiheadAttention(32, 4, batch_first=True).eval())
        part.requires_grad_(False)
        methods: list[Any] = [on(part, r=2), Lora(r=2, target_modules="attn")]
        methods[1].attach(Place("vision", part))
        for parameter in methods[1].parameters.values():
            parameter.data.normal_(0, 0.3)
        x_NTD = torch.randn(2, 3, 32)
        with torch.no_grad():
            before = part.attn(x_NTD, x_NTD, x_NTD, need_weights=False)[0]
            for method in methods[::-1] if first else methods:
                method.merge()
            assert type(part.attn) is nn.MultiheadAttention
            found = part.attn(x_NTD, x_NTD, x_NTD, need_weights=False)[0]
        torch.testing.assert_close(found, before, **CLOSE)


def test_dropout_of_the_input() -> None:
    """In training only, and of the update's input only."""
    attention = vit().blocks[0].attn
    method = on(Part(attention), lora_dropout=0.5)
    x_NTD = torch.randn(2, 5, 32)
    attention.train()
    q, k, _ = attention.qkv(x_NTD).chunk(3, -1)
    again = attention.qkv(x_NTD).chunk(3, -1)
    assert not torch.equal(q, again[0]) and torch.equal(k, again[1])
    attention.eval()
    assert torch.equal(attention.qkv(x_NTD), attention.qkv(x_NTD))
    assert method.joined[0].update.training is False


def test_beside_a_mask() -> None:
    """The mask is on the base's weight, the update beside it, whichever came first; merged in that order."""
    for order in (0, 1):
        part = Part(vit().blocks[0].attn)
        part.requires_grad_(False)
        weight, bias = (p.detach().clone() for p in part.attn.qkv.parameters())
        methods = [QkvLora(r=2), Piggyback("qkv")]
        for method in methods[::-1] if order else methods:
            method.attach(Place("vision", part))
            for parameter in method.parameters.values():
                parameter.data.normal_(0, 0.3)
        kept = (methods[1].parameters["attn.qkv.mask"] > 5e-3).float()
        x_NTD = torch.randn(2, 5, 32)
        want = F.linear(x_NTD, weight * kept, bias)
        found = part.attn.qkv(x_NTD)
        assert torch.equal(found[..., 32:64], want[..., 32:64])
        with pytest.raises(UserError, match="merge 'piggyback' first"):
            methods[0].merge()
        methods[1].merge()
        methods[0].merge()
        torch.testing.assert_close(part.attn.qkv(x_NTD), found, **CLOSE)
        assert type(part.attn.qkv) is nn.Linear


def test_bf16_base_float32_factors() -> None:
    """With autocast and without: close to float32 on the same rounded weights."""
    attention = vit().blocks[0].attn.bfloat16()
    method = on(Part(attention))
    x_NTD = torch.randn(2, 5, 32)
    want = attention.float()(x_NTD)
    attention.bfloat16()
    for parameter in method.parameters.values():
        parameter.data = parameter.data.float()
    plain = attention(x_NTD.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention(x_NTD.bfloat16())
    cast.float().sum().backward()
    assert plain.dtype == cast.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in method.parameters.values())
    for found in (plain, cast):  # 8 bits, sums of 32 terms
        torch.testing.assert_close(found.float(), want, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 0}, "qkv_lora's r is a whole number from 1, not 0"),
        ({"projections": []}, "projections are some of q, k and v, as .q, v., not .."),
        ({"projections": ["q", "q"]}, "projections are some of q, k and v"),
        ({"projections": "o"}, "projections are some of q, k and v"),
        ({"lora_dropout": 1}, "lora_dropout is a number from 0 to below 1, not 1"),
        ({"lora_alpha": "much"}, "lora_alpha is a number above 0, not 'much'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        QkvLora(**settings)
    assert "\n" not in str(caught.value)


def test_only_the_blocks_that_are_meant() -> None:
    part = nn.Module()
    part.trunk = vit()
    part.blocks = part.trunk.blocks
    method = QkvLora(r=1)
    method.attach(Place("vision", part, chosen=-1))
    assert {key.split(".attn")[0] for key in method.parameters} == {"blocks.1"}
