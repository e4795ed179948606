"""Compacter: counts of the paper, Kronecker products written out, and one shared factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_parts import T5_BASE, attach, blocks_of, count, shake, t5_base, tiny_vit
from tiny import sentence
from torch import Tensor, nn
from torch.nn import functional

from vlm_adapt.adapt.compacter import Compacter, CompacterPlusPlus, PHMLinear, Rule
from vlm_adapt.errors import UserError

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("kind", "adapters", "share"), [(Compacter, 48, 0.073), (CompacterPlusPlus, 24, 0.047)]
)
def test_counts_of_the_paper(kind: Any, adapters: int, share: float) -> None:
    """T5-base, n = 4, b = 24: factors of rank 1, biases, the A_i once, and the LayerNorms."""
    d, b, n = 768, 24, 4
    method = attach(kind(layer_norms=True), t5_base(), "language")
    factors = n * (d // n + b // n) * 2
    assert count(method) == adapters * (factors + b + d) + n**3 + 62 * d
    assert round(100 * count(method) / T5_BASE, 3) == share
    assert len([key for key in method.parameters if "rule" in key]) == 1
    assert not [key for key in method.parameters if "layer.1.EncDecAttention" in key]


def weight_of(method: Any, prefix: str, rule: Tensor) -> Tensor:
    """sum_i A_i kron (s_i t_i), a factor at a time."""
    left, right = (method.parameters[f"{prefix}.{leaf}"] for leaf in ("left_NiR", "right_NRo"))
    products = [torch.kron(rule[i], left[i] @ right[i]) for i in range(len(rule))]
    return torch.stack(products).sum(0)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_block_written_out(rank: int) -> None:
    """A block of a ViT with torch's own Kronecker product. 1e-6 of the largest value: float32's 7 digits."""
    part = tiny_vit()
    method = attach(Compacter(bottleneck=8, division=4, rank=rank), part)
    shake(method)
    block: Any = part.blocks[1]
    rule = method.parameters["layers.0.compacter.rule.weight_Nab"]

    def adapter(place: str, h: Tensor) -> Tensor:
        prefix = f"layers.1.compacter.{place}"
        down, up = (weight_of(method, f"{prefix}.{layer}", rule) for layer in ("down", "up"))
        assert down.shape == (32, 8) and up.shape == (8, 32)
        inner = functional.gelu(h @ down + method.parameters[f"{prefix}.down.bias_O"])
        return inner @ up + method.parameters[f"{prefix}.up.bias_O"]

    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        got = block(x)
        method.set_active(False)
        attended = block.attention(block.layernorm_before(x))[0]
        middle = x + attended + adapter("attention", attended)
        fed = block.mlp(block.layernorm_after(middle))
        want = middle + fed + adapter("mlp", fed)
        torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), atol=1e-6, rtol=0)


def test_one_rule_for_all() -> None:
    """Every layer's gradient reaches the one parameter, and their sum is the whole's; recomputed too."""
    part, run, _ = blocks_of("llama")
    method = attach(Compacter(bottleneck=8), part, "language")
    shake(method)
    rules = [module for module in part.modules() if isinstance(module, Rule)]
    assert len(rules) == 1 and len([m for m in part.modules() if isinstance(m, PHMLinear)]) == 8
    (rule,) = rules
    given: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        output.retain_grad()
        given.append(output)

    rule.register_forward_hook(keep)
    run().square().mean().backward()
    whole = rule.weight_Nab.grad
    assert whole is not None and len(given) == 8
    shares = [output.grad for output in given]
    assert all(share is not None and share.abs().max() > 0 for share in shares)
    torch.testing.assert_close(torch.stack(shares).sum(0), whole, atol=1e-5, rtol=1e-4)  # type: ignore[arg-type]
    rule.weight_Nab.grad = None
    part.train()
    part.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    run().square().mean().backward()
    torch.testing.assert_close(rule.weight_Nab.grad, whole, atol=1e-5, rtol=1e-4)  # sums in another order


def test_the_rule_is_handed_out_as_a_copy() -> None:
    """ZeRO-3 frees a module's weights when its call ends: what was handed out must not be freed with them."""
    rule = Rule(3, torch.device("cpu"))
    given = rule()
    assert given.data_ptr() != rule.weight_Nab.data_ptr()
    linear = PHMLinear(6, 9, 1, rule, torch.device("cpu"))
    assert [name for name, _ in linear.named_parameters()] == ["left_NiR", "right_NRo", "bias_O"]


def test_start_is_near_the_identity() -> None:
    """As in the paper's code, A_i are small: what is added is below a hundredth of what it is added to."""
    part, run, _ = blocks_of("llama")
    with torch.no_grad():
        before = run()
        attach(CompacterPlusPlus(bottleneck=8), part, "language")
        after = run()
    assert 0 < (after - before).norm() < 0.01 * before.norm()


def test_bf16_and_switched() -> None:
    part, run, _ = blocks_of("t5")
    part.to(torch.bfloat16)
    with torch.no_grad():
        before = run()
    method = attach(Compacter(bottleneck=8), part, "language")
    shake(method)
    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        cast = run()
    assert plain.dtype == torch.bfloat16 and not torch.equal(plain, before)
    assert (plain - cast).float().norm() < 0.05 * cast.float().norm()  # 8 bits of mantissa, four blocks
    method.set_active(False)
    with torch.no_grad():
        assert torch.equal(run(), before)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bottleneck": 10}, "compacter's bottleneck 10 is no multiple of division 4"),
        ({"division": 0}, "compacter's division is a whole number from 1, not 0"),
        ({"rank": True}, "compacter's rank is a whole number from 1, not True"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        Compacter(**settings)
    sentence(caught)


def test_width_that_does_not_divide() -> None:
    part = tiny_vit()
    with pytest.raises(
        UserError, match="division 5 does not divide the width 32: choose a divisor"
    ) as caught:
        attach(Compacter(bottleneck=10, division=5), part)
    sentence(caught)
    assert not [m for m in part.modules() if isinstance(m, Rule | nn.ModuleDict)]
