"""Attention of GPUs: what FlashAttention and FlexAttention are handed, and kernels tried before use.

What a card computes is tested where there is one; here the kernels are written out in plain arithmetic.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import language, layout, packed
from torch import Tensor

from vlm_adapt import attention
from vlm_adapt.attention import kernels
from vlm_adapt.errors import UserError

torch.set_num_threads(1)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def fake_varlen(calls: list[dict[str, Any]]) -> Any:
    """flash_attn_varlen_func in plain arithmetic."""

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        calls.append({"starts": cu_seqlens_q.tolist(), "longest": max_seqlen_q, "window": window_size})
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
        outs = []
        for start, end in zip(calls[-1]["starts"], calls[-1]["starts"][1:], strict=False):
            q1, k1, v1 = (x[start:end].transpose(0, 1) for x in (q, k, v))
            k1, v1 = (x.repeat_interleave(len(q1) // len(x), 0) for x in (k1, v1))
            back = torch.arange(end - start)[:, None] - torch.arange(end - start)
            near = (back <= window_size[0]) | (window_size[0] < 0)
            scores = (q1 @ k1.transpose(1, 2) * softmax_scale).masked_fill((back < 0) | ~near, float("-inf"))
            outs.append((scores.softmax(-1) @ v1).transpose(0, 1))
        return torch.cat(outs)

    return flash_attn_varlen_func


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "qwen2_sliding", "smollm3", "opt"])
def test_flash_attention_gets_the_texts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own road to FlashAttention, with the kernel written out: as with the whole mask."""
    from transformers import modeling_flash_attention_utils as utils

    calls: list[dict[str, Any]] = []
    varlen = fake_varlen(calls)
    process = utils._lazy_define_process_function(varlen)
    monkeypatch.setattr(
        utils,
        "lazy_import_flash_attention",
        lambda *_, **__: ((None, varlen, None, None, None), (process,) * 2),
    )
    of = layout("causal", [[5, 9, 3], [12]], length=20)
    model, reference = language(family, "flash_attention_2"), language(family, "sdpa")
    got = model.hidden(packed(of, model))
    assert calls[-1]["starts"] == [0, 5, 14, 17, 29] and calls[-1]["longest"] == 12
    want = reference.hidden(packed(of, reference))
    valid_BT = of.documents_BT > 0
    torch.testing.assert_close(got[valid_BT], want[valid_BT], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="takes no mask, which branches"):
        model.hidden(packed(layout("two-way", [[5, 6]]), model))


def test_flash_attention_without_its_keywords_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that hands no keywords on would let the flattened texts see each other."""
    model = language("llama", "flash_attention_2")
    layer = model.blocks[0].self_attn
    forward = layer.forward

    def forgetful(hidden_states: Tensor, position_embeddings: Any, attention_mask: Any, **_: Any) -> Any:
        return forward(hidden_states, position_embeddings, attention_mask)

    monkeypatch.setattr(layer, "forward", forgetful)
    model.packing_checked = True
    with pytest.raises(RuntimeError, match="dropped"):
        model.hidden(packed(layout("causal", [[5, 6]]), model))


@pytest.mark.parametrize("kind", ["causal", "two-way", "branches"])
@pytest.mark.parametrize("window", [0, 7])
def test_block_mask(kind: str, window: int) -> None:
    """FlexAttention's mask says what the table says, and leaves out the blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_mask

    of = layout(kind, [[5, 150, 1], [128, 129]], length=300)
    mask = of.block_mask(window)
    table = create_mask(mask.mask_mod, 2, None, 300, 300, device="cpu")[:, 0]
    back_BTT = of.positions_BT[:, :, None] - of.positions_BT[:, None]
    real_BTT = (of.documents_BT > 0)[:, None] & (of.documents_BT > 0)[:, :, None]
    want = of.allow_BTT & ((back_BTT < (window or 300)) | ~real_BTT)
    assert mask.shape == (2, 1, 300, 300) and torch.equal(table, want)
    assert mask.kv_num_blocks[1].flatten().tolist()[1:] == [1, 2]  # the second text sees nothing of the first


@pytest.mark.parametrize("kind", ["causal", "two-way", "branches"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flex_attention_gets_the_blocks(kind: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own road to FlexAttention, not compiled (torch 2.15 writes C++ for this mask that does
    not compile on CPUs): as with the whole mask."""
    from torch.nn.attention import flex_attention as module
    from transformers.integrations import flex_attention as road

    seen: list[Any] = []

    def plain(*parts: Tensor, training: bool, **more: Any) -> Any:
        seen.append(more["block_mask"])
        return module.flex_attention(*parts, **more)

    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(road, "compile_friendly_flex_attention", plain)
    of = layout(kind, [[5, 9, 3], [12]], length=20)
    model, reference = language(family, "flex_attention"), language(family, "sdpa")
    with torch.no_grad():
        got, want = (one.hidden(packed(of, one)) for one in (model, reference))
    assert len(seen) > 0 and all(isinstance(mask, module.BlockMask) for mask in seen)
    valid_BT = of.documents_BT > 0
    torch.testing.assert_close(got[valid_BT], want[valid_BT], atol=1e-5, rtol=0)


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial passes the right kernel and no other: not one that sees all, forgets windows, or is missing."""
    right = fake_varlen([])

    def good(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int
    ) -> Tensor:
        past = (window - 1, 0) if window else (-1, -1)
        return right(q, k, v, starts, starts, longest, longest, 0.0, scale, True, past)

    def leaky(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *more: Any) -> Tensor:
        return good(q, k, v, starts[[0, -1]], *more)

    def wide(*given: Any) -> Tensor:
        return good(*given[:-1], 0)

    def missing(*_: Any) -> Tensor:
        raise ImportError("no such package")

    shapes = (4, 2, 16, torch.bfloat16, torch.device("cpu"))
    tried = {"missing": missing, "leaky": leaky, "wide": wide, "good": good}
    monkeypatch.setattr(kernels, "KERNELS", tried)
    kernels.usable.cache_clear()
    assert kernels.usable(*shapes) == "wide" and kernels.usable(*shapes, True) == "good"
    monkeypatch.setattr(kernels, "KERNELS", {"missing": missing, "leaky": leaky})
    kernels.usable.cache_clear()
    assert kernels.usable(*shapes) is None
    kernels.usable.cache_clear()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", ["causal", "two-way", "branches"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_on_a_gpu(kind: str, family: str) -> None:
    """bf16 on the card, whichever kernel it takes, against float32 with the whole mask on the CPU."""
    reference = language(family, "sdpa")
    want = reference.hidden(packed(layout(kind, [[5, 150, 3], [120]], length=300), reference))
    model = language(family, attention.NAME).to("cuda", torch.bfloat16)
    of = layout(kind, [[5, 150, 3], [120]], length=300, device="cuda")
    got = model.hidden(packed(of, model))
    valid_BT = (of.documents_BT > 0).cpu()
    # bf16 through two layers: 1 % of the states' spread in the mean
    error = (got.float().cpu() - want)[valid_BT].abs().mean()
    assert error < 0.03 * want[valid_BT].std()


@pytest.mark.gpu
@needs_gpu
def test_kernels_of_this_gpu() -> None:
    """Torch brings one for bf16 from Ampere on, and FlexAttention."""
    shapes = (8, 2, 64, torch.bfloat16, torch.device("cuda"))
    assert kernels.usable(*shapes) is not None and kernels.usable(*shapes, True) is not None
    assert kernels.flex_usable(*shapes)
