"""Attention text by text: products against plain arithmetic, and masks that cannot get lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layouts import language, layout, packed, seen
from torch import Tensor

from vlm_adapt import attention
from vlm_adapt.attention import products
from vlm_adapt.attention.guard import texts_must_arrive
from vlm_adapt.attention.texts import TextMask
from vlm_adapt.errors import UserError
from vlm_adapt.language.layout import Layout, attention_mask
from vlm_adapt.language.packing import check_packing

torch.set_num_threads(1)
NEAR = {"atol": 1e-10, "rtol": 0.0}  # float64: room for the order of sums and for nothing else


class Layer:
    """What transformers hands over as the module."""

    is_causal = True
    num_key_value_groups = 2
    training = False


def inputs(count: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, count, 16) for heads in (4, 2, 2)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(device, dtype).requires_grad_(True) for x in made]


def plain(query: Tensor, key: Tensor, value: Tensor, allow: Tensor) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ key.transpose(2, 3) * 0.25).masked_fill(~allow, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("kind", ["causal", "two-way", "branches"])
@pytest.mark.parametrize(("window", "kept"), [(0, 2048), (7, 2048), (150, 2048), (7, 128)])
def test_text_by_text(kind: str, window: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts shorter and longer than a piece, two rows, padding: outputs and gradients of every input.

    Probabilities of texts longer than `kept` are computed again.
    """
    monkeypatch.setattr(products, "KEPT", kept)
    of = layout(kind, [[5, 300, 1], [128, 129]], length=400)
    parts = inputs(len(of.places_N))
    mask = of.text_mask(torch.float64, window)
    got, _ = attention.attend(Layer(), *parts, mask, scaling=0.25)
    want = plain(*parts, seen(of, window))
    torch.testing.assert_close(got, want, **NEAR)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((out * weight).sum(), parts) for out in (got, want))
    for first, second in zip(mine, theirs, strict=True):
        torch.testing.assert_close(first, second, **NEAR)
    assert torch.equal(mask.dense() == 0, seen(of, window))


def test_hidden_keys_are_not_computed() -> None:
    """A window of 10 in a text of 600: no piece reaches further back than it must."""
    text = layout("causal", [[600]]).text_mask(torch.float32, 10).texts[0]
    reach = [piece.rows.start - piece.keys.start for piece in text.pieces]
    assert len(text.pieces) == 5 and reach == [0, 9, 9, 9, 9]


def test_dropout() -> None:
    """The gradient is that of what was computed, and the mean over many draws is that without dropout."""
    of = layout("two-way", [[9, 4]])
    texts, parts = of.text_mask(torch.float64).texts, inputs(13)

    def drawn(*given: Tensor) -> Tensor:
        torch.manual_seed(3)
        return products.by_text(*given, texts, 0.25, 0.3)

    assert torch.autograd.gradcheck(drawn, tuple(parts), fast_mode=True)
    with torch.no_grad():
        mean = torch.stack([products.by_text(*parts, texts, 0.25, 0.3) for _ in range(500)]).mean(0)
        whole = products.by_text(*parts, texts, 0.25)
    # 500 draws of a sum whose deviation is below 1: 0.04, five times over
    torch.testing.assert_close(mean, whole, atol=0.2, rtol=0)
    assert not torch.allclose(drawn(*parts), whole, atol=0.2)


@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask.clone(),
        lambda mask: mask[:, :, :, :60],
        lambda mask: mask.to(torch.float64),
        lambda mask: mask.expand(1, 4, -1, -1),
        lambda mask: mask + 0,
    ],
    ids=["clone", "slice", "to", "expand", "sum"],
)
def test_a_changed_mask_is_still_the_mask(change: Any) -> None:
    """Whatever a model makes of it is a tensor of numbers that keeps the texts apart."""
    of = layout("two-way", [[20, 40]])
    mask = of.text_mask(torch.float64)
    changed = change(mask)
    # `to` the dtype it has gives the same object; anything else the numbers.
    assert changed is mask or type(changed) is Tensor
    parts = inputs(60)
    got, _ = attention.attend(Layer(), *parts, changed, scaling=0.25)
    torch.testing.assert_close(got, plain(*parts, seen(of, 0)), **NEAR)
    sdpa, _ = attention.attend(Layer(), *parts, changed, scaling=0.25, position_bias=torch.zeros(1).double())
    torch.testing.assert_close(sdpa, plain(*parts, seen(of, 0)), **NEAR)


def test_the_mask_holds_no_memory() -> None:
    """A million tokens: the table would be a terabyte."""
    mask = TextMask([], [0, 2**20], 0, lambda: torch.zeros(1), torch.bfloat16, torch.device("cpu"))
    assert mask.shape == (1, 1, 2**20, 2**20) and "1 texts, 1048576 tokens" in repr(mask)


@pytest.mark.parametrize("drop", ["mask", "call"])
def test_a_dropped_mask_is_no_leak(drop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that forgets its mask, or computes attention past our function, stops."""
    model = language("llama", attention.NAME)
    layer = model.blocks[0].self_attn
    forward = layer.forward
    if drop == "mask":
        monkeypatch.setattr(layer, "forward", lambda *a, **k: forward(*a, **(k | {"attention_mask": None})))
        match = "dropped the mask"
    else:
        for block in model.blocks:
            monkeypatch.setattr(
                block.self_attn, "forward", lambda hidden_states, **_: (hidden_states * 0, None)
            )
        match = "no attention layer was handed"
    model.packing_checked = True
    with pytest.raises(RuntimeError, match=match), torch.no_grad():
        model.hidden(packed(layout("causal", [[5, 6]]), model))


def test_the_guard_is_silent_outside() -> None:
    parts = inputs(4)
    attention.attend(Layer(), *parts, None)
    with pytest.raises(RuntimeError, match="dropped"), texts_must_arrive():
        attention.attend(Layer(), *parts, None)


@pytest.mark.parametrize("name", ["sdpa", "eager", attention.NAME])
def test_a_model_is_tried_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture that lets texts reach each other, or moves positions, is refused in a sentence."""
    model = language("llama", name)
    check_packing(model)
    block = model.blocks[0]
    forward = block.forward

    def leaky(hidden_states: Tensor, **more: Any) -> Tensor:
        return forward(hidden_states, **more) + hidden_states.mean(1, keepdim=True)

    def moved(hidden_states: Tensor, **more: Any) -> Tensor:
        cos, sin = more["position_embeddings"]  # as a model that counts along the row
        turned = torch.linspace(0, 1, cos.shape[1])[None, :, None]
        return forward(hidden_states + turned, **more)

    for broken, match in ((leaky, "reaches another"), (moved, "otherwise than alone")):
        monkeypatch.setattr(block, "forward", broken)
        with pytest.raises(UserError, match=f"cannot read several texts a row: .*{match}"):
            model.packing_checked = False
            model.hidden(packed(layout("causal", [[5, 6]]), model))


def test_tables_agree() -> None:
    """The layout's table is the mask's."""
    of = layout("branches", [[7, 4], [9]], length=12)
    assert torch.equal(of.allow_BTT, attention_mask(of.documents_BT, of.blocks_BT, of.branches_BT))
    assert of.starts == [0, 7, 11, 20] and of.longest == 9 and not of.causal and of.packed
    assert layout("causal", [[7, 4]]).causal and not layout("causal", [[7]]).packed
    with pytest.raises(ValueError, match="one after another"):
        documents_BT = torch.tensor([[1, 2, 1]])
        _ = Layout(documents_BT, documents_BT, documents_BT, documents_BT, plain=False).starts
