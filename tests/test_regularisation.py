"""Regularisation blocks against their formulas: counts, order and number of labels, the halo."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_adapt.errors import UserError
from vlm_adapt.heads.regularisation import ACTIVATIONS, Regularisation

KINDS = ["depthwise", "bottleneck"]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def formula(block: Regularisation, logits_NLhw: Tensor) -> Tensor:
    """Label by label, written out as in the paper's code: one convolution from one channel to one."""
    x = logits_NLhw
    for number in range(block.depth):
        top = x.max(dim=1, keepdim=True).values
        y = torch.stack(
            [
                F.conv2d(x[:, label, None], block.kernel.weight, block.kernel.bias, padding=1)[:, 0]
                for label in range(x.shape[1])
            ],
            dim=1,
        )
        y = y + top if block.kind == "bottleneck" else y
        x = y if number == block.depth - 1 else ACTIVATIONS[block.activation](y)
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_formula_and_gradients(kind: str, depth: int, activation: str) -> None:
    block = Regularisation(kind, depth, activation)
    logits = torch.randn(2, 5, 7, 6, requires_grad=True)
    learned = [logits, *block.parameters()]
    found, right = block(logits), formula(block, logits)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), learned),
        torch.autograd.grad(right.square().sum(), learned),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # sums over a few hundred places


@pytest.mark.parametrize("kind", KINDS)
def test_ten_parameters_whatever_the_labels(kind: str) -> None:
    block = Regularisation(kind, 3)
    assert sum(p.numel() for p in block.parameters()) == 10
    assert [name for name, _ in block.named_parameters()] == ["kernel.weight", "kernel.bias"]
    logits_NLhw = torch.randn(1, 6, 9, 8)
    order_L = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(block(logits_NLhw[:, order_L]), block(logits_NLhw)[:, order_L])
    for labels in (1, 3):
        assert block(logits_NLhw[:, :labels]).shape == (1, labels, 9, 8)
    if kind == "depthwise":  # there no label sees another
        torch.testing.assert_close(block(logits_NLhw[:, :2]), block(logits_NLhw)[:, :2])


@pytest.mark.parametrize("kind", KINDS)
def test_depth_is_the_halo(kind: str) -> None:
    """A change has influence `depth` pixels away and no further."""
    block = Regularisation(kind, 2, "tanh")
    before = torch.randn(1, 2, 11, 11)
    after = before.clone()
    after[:, :, 5, 5] += 1.0
    changed_hw = (block(before) - block(after)).abs().amax((0, 1)) > 0
    places = changed_hw.nonzero()
    assert places.min() == 3 and places.max() == 7


@pytest.mark.parametrize("kind", KINDS)
def test_labels_side_by_side_in_memory_are_no_matter(kind: str) -> None:
    block = Regularisation(kind, 2)
    logits_NLhw = torch.randn(2, 5, 7, 6)
    other = logits_NLhw.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(other), block(logits_NLhw))


def test_a_kernel_in_half_precision_serves_float32_logits() -> None:
    """A frozen head is in the compute dtype; logits are not."""
    block = Regularisation("bottleneck", 2).bfloat16()
    assert block(torch.randn(1, 2, 4, 4)).dtype == torch.float32


def test_weights_in_hand_outlive_the_module() -> None:
    """ZeRO-3 takes a parameter back after the call: what is in hand is a copy with its history."""
    block = Regularisation("depthwise", 1)
    blocks = block.blocks()
    kept = blocks.weight.detach().clone()
    block.kernel.weight.data.zero_()
    assert torch.equal(blocks.weight, kept)
    blocks(torch.randn(1, 2, 4, 4)).sum().backward()
    assert block.kernel.weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("bottlenek",), "did you mean 'bottleneck'"),
        (("depthwise", 0), "regularisation_depth"),
        (("depthwise", True), "regularisation_depth"),
        (("depthwise", 1, "gelu"), "head.regularisation_activation"),
    ],
)
def test_bad_settings(arguments: tuple[object, ...], word: str) -> None:
    with pytest.raises(UserError) as caught:
        Regularisation(*arguments)  # type: ignore[arg-type]
    assert word in tiny.sentence(caught)
