"""What is written by hand to be fast gives what the plain road gives, forward and backward.

Float64 throughout where it can be: 1e-10 then leaves room for the order of sums and for nothing else.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vlm_adapt import attention
from vlm_adapt.language.loss import cross_entropy

torch.set_num_threads(1)
NEAR = {"atol": 1e-10, "rtol": 0.0}


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
