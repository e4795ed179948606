"""Bi-AdaptFormer: one bit a weight, by the paper's formula, with the small file that it promises."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_parts import attach, blocks_of, count, shake, tiny_vit, vit_base
from tiny import sentence
from torch import Tensor

from vlm_adapt.adapt.binary_adapter import BinaryAdapter
from vlm_adapt.adapt.one_bit import OneBitLinear
from vlm_adapt.errors import UserError

torch.set_num_threads(1)
QUARTILE = NormalDist().inv_cdf(0.75)


def rounded(weight: Tensor) -> Tensor:
    """The centre of its half for each z-score, back in the weight's own scale."""
    scores = (weight - weight.mean()) / weight.std()
    return torch.where(scores > 0, QUARTILE, -QUARTILE) * weight.std() + weight.mean()


def test_bytes_of_the_paper() -> None:
    """ViT-B, h = 32: 12 blocks of two layers, each of 768 * 32 bits, and a mean and a deviation."""
    method = attach(BinaryAdapter(bottleneck=32), vit_base())
    assert method.bytes_stored() == 12 * 2 * (768 * 32 // 8 + 2 * 4) == 73_920
    assert count(method) == 12 * 2 * 768 * 32  # no biases


def test_a_block_written_out() -> None:
    """1e-6 of the largest value: float32's 7 digits."""
    part = tiny_vit()
    method = attach(BinaryAdapter(bottleneck=8, scale=0.1), part)
    shake(method)
    block: Any = part.blocks[0]
    down, up = (
        rounded(method.parameters[f"layers.0.binary_adapter.mlp.{leaf}.weight"]) for leaf in ("down", "up")
    )
    assert down.shape == (8, 32) and len(down.unique()) == 2
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        got = block(x)
        method.set_active(False)
        middle = x + block.attention(block.layernorm_before(x))[0]
        want = block(x) + 0.1 * torch.relu(middle @ down.T) @ up.T
        torch.testing.assert_close(got / want.abs().max(), want / want.abs().max(), atol=1e-6, rtol=0)


def test_the_gradient_goes_straight_through() -> None:
    """As if the rounding r of the z-scores z were r + z - (z held fixed), in closed form, float64.

    dz_j/dw_i = ((i = j) - 1/n)/(s + e) - z_j/(s + e) ds/dw_i, and ds/dw_i = (w_i - m)/((n - 1) s).
    """
    torch.manual_seed(0)
    linear = OneBitLinear(6, 4, torch.device("cpu")).double()
    linear.weight.data.normal_(0.3, 2.0)
    given = torch.randn(4, 6, dtype=torch.float64)
    linear(torch.eye(6, dtype=torch.float64)).backward(given.T.contiguous())
    w = linear.weight.detach()
    n, m, s, e = w.numel(), w.mean(), w.std(), 1e-5
    z, r = (w - m) / (s + e), torch.where(w > m, QUARTILE, -QUARTILE)
    of_s = (w - m) / ((n - 1) * s)
    of_z = (given - given.mean()) / (s + e) - (given * z).sum() / (s + e) * of_s
    want = s * of_z + (given * r).sum() * of_s + given.mean()
    torch.testing.assert_close(linear.weight.grad, want, atol=1e-9, rtol=0)


def test_files(tmp_path: Path) -> None:
    """Bits without the floats give the same outputs; with them, going on gives the same floats."""
    part, run, _ = blocks_of("llama")
    method = attach(BinaryAdapter(bottleneck=8), part, "language")
    shake(method)
    tensors = {key: p.detach() for key, p in method.parameters.items()}
    method.save(tmp_path, tensors)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) == method.bytes_stored()
    size = (tmp_path / "model.safetensors").stat().st_size
    assert (
        method.bytes_stored() == 2 * 2 * (8 * 32 // 8 + 8) < size < method.bytes_stored() + 300 * len(stored)
    )
    with torch.no_grad():
        want = run()
        read = method.read(tmp_path)
        for key, parameter in method.parameters.items():
            assert read[key].dtype == torch.float32 and not torch.equal(read[key], tensors[key])
            parameter.copy_(read[key])
        # Mean and deviation of the two values are those of the floats but for float32's rounding.
        torch.testing.assert_close(run(), want, atol=1e-5, rtol=1e-5)
    method.save_latent(tmp_path, tensors)
    again = method.read(tmp_path)
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_a_file_of_another_size(tmp_path: Path) -> None:
    part, _, _ = blocks_of("llama")
    small = attach(BinaryAdapter(bottleneck=4), part, "language")
    small.save(tmp_path, {key: p.detach() for key, p in small.parameters.items()})
    other = attach(BinaryAdapter(bottleneck=8), blocks_of("llama")[0], "language")
    with pytest.raises(UserError, match="has 16 bytes and the model needs 32") as caught:
        other.read(tmp_path)
    sentence(caught)
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="cut off or is no safetensors file"):
        other.read(tmp_path)


def test_start_switch_and_recomputing() -> None:
    """Up starts at a thousandth: near the identity. Off is the base; recomputed gradients are the same."""
    grads = []
    for again in (False, True):
        part, run, _ = blocks_of("t5")
        with torch.no_grad():
            before = run()
        method = attach(BinaryAdapter(bottleneck=8), part, "language")
        if again:
            part.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            part.train()
        after = run()
        assert 0 < (after - before).norm() < 0.02 * before.norm()
        after.square().mean().backward()
        grads.append({key: p.grad for key, p in method.parameters.items()})
        method.set_active(False)
        part.eval()
        with torch.no_grad():
            assert torch.equal(run(), before)
    for key, grad in grads[0].items():
        assert grad is not None and grad.abs().max() > 0
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6, rtol=1e-4)  # sums in another order
