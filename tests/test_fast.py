"""What is written by hand to be fast gives what the plain road gives, forward and backward.

Float64 throughout where it can be: 1e-10 then leaves room for the order of sums and for nothing else.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from vlm_adapt import attention
from vlm_adapt.adapt.lora_linear import FusedLinear, _Adapted, fuse
from vlm_adapt.language.loss import cross_entropy

torch.set_num_threads(1)
NEAR = {"atol": 1e-10, "rtol": 0.0}


def adapted(monkeypatch: pytest.MonkeyPatch, **more: Any) -> tuple[Any, list[int]]:
    """A linear layer under peft, with B away from zero, and a count of the fused forward passes."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 10)).double().requires_grad_(False)
    config = peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=6, **more)
    peft.inject_adapter_in_model(config, inner)
    for name, parameter in inner.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
    calls: list[int] = []
    apply = _Adapted.apply
    monkeypatch.setattr(_Adapted, "apply", lambda *given: calls.append(1) or apply(*given))
    return inner, calls


def results(inner: Any, x: Tensor) -> dict[str, Tensor]:
    """Output, gradient of the input, and gradients of what trains."""
    x = x.clone().requires_grad_(True)
    inner.zero_grad()
    out = inner(x)
    out.square().sum().backward()
    assert x.grad is not None
    trained = {name: p.grad.clone() for name, p in inner.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad} | trained


@pytest.mark.parametrize("shape", [(3, 6), (2, 5, 6)])
def test_fused_lora(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    inner, calls = adapted(monkeypatch)
    names = list(inner.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    want = results(inner, x)
    fuse(inner)
    assert type(inner[0]) is FusedLinear and not calls
    got = results(inner, x)
    assert calls == [1] and list(inner.state_dict()) == names and len(got) == 4
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, **NEAR, msg=name)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_other_kinds_keep_pefts_own_road(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    inner, calls = adapted(monkeypatch, **more)
    fuse(inner)
    inner.train()
    results(inner, torch.randn(3, 6, dtype=torch.float64))
    assert not calls


def test_watched_and_partitioned_layers_keep_pefts_own_road(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, calls = adapted(monkeypatch)
    fuse(inner)
    x = torch.randn(3, 6, dtype=torch.float64)
    hook = inner[0].lora_A["default"].register_forward_pre_hook(lambda *_: None)
    inner(x)
    hook.remove()
    inner[0].base_layer.weight.ds_id = 0  # what DeepSpeed's ZeRO-3 leaves on a parameter
    inner(x)
    del inner[0].base_layer.weight.ds_id
    inner[0].enable_adapters(False)
    inner(x)
    assert not calls
    inner[0].enable_adapters(True)
    inner(x)
    assert calls == [1]


class Layer:
    """What transformers hands over as the module."""

    is_causal = True
    num_key_value_groups = 2
    training = False


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = query @ key.transpose(2, 3) * 0.3 + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("length", [5, 128, 300])
@pytest.mark.parametrize("masked", ["causal", "float", "boolean"])
def test_attention(length: int, masked: str) -> None:
    """Two query heads to a key head; lengths below, at and above one piece; every kind of mask."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        made = torch.randn(2, heads, length, 4, generator=generator, dtype=torch.float64)
        return made.requires_grad_(True)

    inputs = [random(4), random(2), random(2)]
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    if masked != "causal":
        seen[1, :, :, : length // 2] = True
    lowest = torch.finfo(torch.float64).min
    floats = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, lowest)
    given = {"causal": None, "float": floats, "boolean": seen}[masked]
    got, _ = attention.attend(Layer(), *inputs, given, scaling=0.3)
    want = plain(*inputs, floats)
    torch.testing.assert_close(got, want, **NEAR)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (got, want)), strict=True)
    for first, second in pairs:
        torch.testing.assert_close(first, second, **NEAR)


@pytest.mark.parametrize("count", [1, 700])
def test_cross_entropy(count: int) -> None:
    """Several pieces of rows, the last one short. Sums are float32's: 1e-5 of losses near 10."""
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(count, 1000, generator=generator)).requires_grad_(True)
    targets = torch.randint(0, 1000, (count,), generator=generator)
    weight = torch.randn(count, generator=generator)
    got = cross_entropy(logits, targets)
    want = nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    first, second = (torch.autograd.grad((out * weight).sum(), logits)[0] for out in (got, want))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)  # exp of what rounds at 1e-6
