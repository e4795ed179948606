"""Back Razor: bytes kept, forward to the bit, every gradient against its formula with sparse values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from vlm_adapt.adapt.back_razor import BackRazor
from vlm_adapt.adapt.place import Place
from vlm_adapt.adapt.saved_memory import saved_bytes
from vlm_adapt.adapt.sparse_saved import Keeper, Sparse, kept_of, largest, pack_bits, unpack_bits

torch.set_num_threads(1)
NEAR: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}  # float32, the same products in another order


class Part(nn.Module):
    """A part whose one block is given."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.blocks = [block]


def razored(block: nn.Module, sparsity: float = 0.9) -> BackRazor:
    method = BackRazor(sparsity)
    method.attach(Place("vision", Part(block)))
    return method


def masked(x: Tensor, sparsity: float, samples: int | None = None) -> Tensor:
    """m * x: of each sample the largest absolute values, as many as are kept."""
    flat = x.detach().reshape(samples or len(x), -1)
    kept = flat.shape[1] - math.floor(flat.shape[1] * sparsity + 1e-9)
    order = flat.abs().argsort(1, descending=True)[:, :kept]
    return (flat * torch.zeros_like(flat).scatter_(1, order, 1.0)).view_as(x)


# What is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1003])
def test_bits(count: int) -> None:
    flags = torch.rand(count) < 0.3
    bits = pack_bits(flags)
    assert bits.dtype == torch.uint8 and len(bits) == -(-count // 8)
    assert torch.equal(unpack_bits(bits, count), flags)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_paper(dtype: torch.dtype) -> None:
    """ceil(n / 8) + k c, exactly; 7.62 times fewer of float32 at 90 %."""
    values_SN = torch.randn(4, 25_007).to(dtype)
    sparse = Sparse(values_SN, largest(values_SN, 0.9))
    n, kept = values_SN.numel(), 4 * (25_007 - math.floor(25_007 * 0.9))
    assert sparse.nbytes == -(-n // 8) + kept * dtype.itemsize
    if dtype == torch.float32:
        assert round(values_SN.nbytes / sparse.nbytes, 2) == 7.62
    assert kept_of(10, 0.9) == 1 and kept_of(1000, 0.9) == 100 and kept_of(3, 0.99) == 1
    full = sparse.dense().view(4, -1)
    assert ((full != 0).sum(1) <= kept // 4).all()
    # bf16 has many equal values: which of them stay is open, their size is not
    assert torch.equal(full.abs().sort(1).values, masked(values_SN, 0.9).abs().sort(1).values)
    assert torch.equal(full[full != 0], values_SN[full != 0])


def test_each_sample_keeps_its_own() -> None:
    """One picture of large values does not take the other's places; layout and strides come back."""
    x_NTD = torch.randn(2, 6, 10) * torch.tensor([1.0, 1000.0])[:, None, None]
    keeper = Keeper(0.9)
    for tensor in (x_NTD, x_NTD.flatten(0, 1), x_NTD.transpose(1, 2)):
        got = keeper.keep(tensor, 2).tensor()
        assert got.shape == tensor.shape and got.stride() == tensor.stride()
        want = masked(x_NTD, 0.9)
        assert torch.equal(
            got, want.flatten(0, 1) if got.ndim == 2 else want.mT if got.shape[1] == 10 else want
        )
    row = torch.randn(2, 9, 4)  # two heads of texts of 2 and 7 tokens
    texts = keeper.keep(row, 1, [0, 2, 9]).tensor()
    for start, end in ((0, 2), (2, 9)):
        want = masked(row[:, start:end], 0.9, 1)
        assert torch.equal(texts[:, start:end], want)
    gaps = torch.randn(2, 5, 20)[:, :, ::2]
    assert torch.equal(keeper.keep(gaps, 2).tensor(), masked(gaps, 0.9))


def test_shared_memory_is_kept_once_while_it_lives() -> None:
    keeper = Keeper(0.5)
    x = torch.randn(4, 8)
    first = keeper.keep(x, 4)
    assert keeper.keep(x.view(2, 2, 8).flatten(0, 1), 4).sparse is first.sparse
    x.mul_(2)  # other values now
    second = keeper.keep(x, 4)
    assert second.sparse is not first.sparse
    pointer = x.data_ptr()
    del x
    for _ in range(20):  # whatever lies in that memory next is another tensor
        y = torch.randn(4, 8)
        assert keeper.keep(y, 4).sparse is not second.sparse
        if y.data_ptr() == pointer:
            break


# Gradients ---------------------------------------------------------------------------------------


def test_linear() -> None:
    """y to the bit, dx = g W, dW = g^T (m * x), db = sum of g."""
    layer = nn.Linear(24, 16)
    x_NTD, g_NTE = torch.randn(3, 5, 24, requires_grad=True), torch.randn(3, 5, 16)
    want = layer(x_NTD)
    want.backward(g_NTE)
    dx = x_NTD.grad
    x_NTD.grad = None
    layer.zero_grad()
    razored(layer)
    got = layer(x_NTD)
    got.backward(g_NTE)
    assert torch.equal(got, want) and torch.equal(x_NTD.grad, dx)
    m_x = masked(x_NTD, 0.9).flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad, g_NTE.flatten(0, 1).T @ m_x, **NEAR)
    torch.testing.assert_close(layer.bias.grad, g_NTE.sum((0, 1)), **NEAR)


def test_gelu_and_norms() -> None:
    """g gelu'(m x); LayerNorm with (m x - mean) / deviation of the true statistics; RMSNorm likewise."""
    x = torch.randn(2, 3, 16, requires_grad=True)
    g = torch.randn(2, 3, 16)
    gelu = nn.GELU()
    razored(gelu, 0.5)
    assert torch.equal(gelu(x), nn.functional.gelu(x))
    gelu(x).backward(g)
    z = masked(x, 0.5)
    slope = 0.5 * (1 + torch.erf(z / 2**0.5)) + z * torch.exp(-z * z / 2) / (2 * math.pi) ** 0.5
    torch.testing.assert_close(x.grad, g * slope, **NEAR)

    norm = nn.LayerNorm(16)
    nn.init.normal_(norm.weight)
    razored(norm, 0.5)
    x.grad = None
    norm(x).backward(g)
    mean = x.detach().mean(-1, keepdim=True)
    deviation = (x.detach().var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    hat, wg = (z - mean) / deviation, g * norm.weight.detach()
    want = (wg - wg.mean(-1, keepdim=True) - hat * (wg * hat).mean(-1, keepdim=True)) / deviation
    torch.testing.assert_close(x.grad, want, **NEAR)
    torch.testing.assert_close(norm.weight.grad, (g * hat).sum((0, 1)), **NEAR)

    rms: Any = transformers.models.llama.modeling_llama.LlamaRMSNorm(16)
    nn.init.normal_(rms.weight)
    razored(rms, 0.5)
    x.grad = None
    rms(x).backward(g)
    scale = (x.detach().pow(2).mean(-1, keepdim=True) + rms.variance_epsilon).rsqrt()
    wg = g * rms.weight.detach()
    # x * scale, scale = (mean(x^2) + eps)^-1/2: both products and the square keep m x
    want = wg * scale - scale**3 / 16 * (wg * z).sum(-1, keepdim=True) * z
    torch.testing.assert_close(x.grad, want, **NEAR)
    kept = masked(x * scale, 0.5)
    torch.testing.assert_close(rms.weight.grad, (g * kept).sum((0, 1)), **NEAR)


def test_attention() -> None:
    """Products and softmax with sparse q, k, v and probabilities; then the projections' dW."""
    config = transformers.ViTConfig(hidden_size=16, num_attention_heads=2)
    config._attn_implementation = "eager"
    attention: Any = transformers.models.vit.modeling_vit.ViTAttention(config).eval()
    holder = nn.ModuleDict({"attention": attention, "layernorm_before": nn.LayerNorm(16)})
    x = torch.randn(3, 5, 16, requires_grad=True)
    g = torch.randn(3, 5, 16)
    want = attention(x)[0]
    razored(holder, 0.5)
    got = attention(x)[0]
    assert torch.equal(got, want)
    got.backward(g)

    def heads(t: Tensor) -> Tensor:
        return t.view(3, 5, 2, 8).transpose(1, 2)

    with torch.no_grad():
        flat = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        q, k, v = (heads(t) for t in flat)
        p = (q @ k.mT * 8**-0.5).softmax(-1)
        mixed = (p @ v).transpose(1, 2).reshape(3, 5, 16)
        q_m, k_m, v_m = (heads(masked(t, 0.5)) for t in flat)
        p_m = masked(p, 0.5)
        d_mixed = g @ attention.o_proj.weight
        d_out = heads(d_mixed)
        d_v, d_p = p_m.mT @ d_out, d_out @ v_m.mT
        d_s = p_m * (d_p - (d_p * p_m).sum(-1, keepdim=True)) * 8**-0.5
        grads = [t.transpose(1, 2).reshape(15, 16) for t in (d_s @ k_m, d_s.mT @ q_m, d_v)]
        x_m = masked(x, 0.5).view(15, 16)
        dx = sum(
            d @ layer.weight
            for d, layer in zip(grads, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True)
        )
    for layer, d in zip((attention.q_proj, attention.k_proj, attention.v_proj), grads, strict=True):
        torch.testing.assert_close(layer.weight.grad, d.T @ x_m, **NEAR)
    mixed_m = masked(mixed, 0.5).view(15, 16)
    torch.testing.assert_close(attention.o_proj.weight.grad, g.view(15, 16).T @ mixed_m, **NEAR)
    torch.testing.assert_close(x.grad, dx.view(3, 5, 16), **NEAR)


def test_switched_off_and_after_an_error() -> None:
    """Exact gradients; and a layer that fails leaves nothing open."""
    layer = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    method = razored(layer)
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 9))
    assert not method._open
    x = torch.randn(4, 8)
    method.set_active(False)
    with saved_bytes(layer) as saved:
        layer(x).sum().backward()
    assert saved.sparse == 0 and saved.dense == 2 * x.nbytes
    torch.testing.assert_close(layer[0].weight.grad, (layer[1].weight.sum(0)[:, None] * x.sum(0)), **NEAR)
    method.set_active(True)
    with saved_bytes(layer) as saved:
        layer(x)
    assert saved.dense == 0 and saved.sparse > 0
