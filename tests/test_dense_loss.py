"""The loss of a mask's pixels in bands of rows against the plain formula: values, gradients, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_adapt.errors import UserError
from vlm_adapt.heads import upsampled
from vlm_adapt.heads.bands import bands, values_held
from vlm_adapt.heads.dense_loss import dense_argmax, dense_cross_entropy, dense_logits
from vlm_adapt.heads.regularisation import Regularisation

# labels, channels, map, mask: larger, equal, smaller, one row or column, odd
SHAPES = [
    (7, 16, (12, 9), (25, 17)),
    (5, 8, (6, 6), (6, 6)),
    (4, 8, (9, 9), (5, 3)),
    (3, 8, (5, 4), (1, 1)),
    (3, 8, (1, 6), (9, 7)),
    (3, 8, (6, 1), (8, 5)),
    (2, 4, (3, 5), (6, 1)),
    (1, 4, (5, 6), (10, 12)),
]
WHOLE, ROWS = 2**24, 1  # values at once: all rows in one band, and as few as a band can have


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def made(shape: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    labels, channels, size, mask = shape
    embeddings_Ehw = F.normalize(torch.randn(channels, *size, dtype=dtype), dim=0).requires_grad_()
    labels_LE = F.normalize(torch.randn(labels, channels, dtype=dtype), dim=1).requires_grad_()
    targets_HW = torch.randint(-1, labels, mask)
    targets_HW[0, 0] = 0  # at least one pixel counts; none at all is a test of its own
    return embeddings_Ehw, labels_LE, targets_HW


def plain_logits(
    embeddings_Ehw: Tensor, labels_LE: Tensor, size: Any, factor: Any, block: Callable[..., Tensor] | None
) -> Tensor:
    logits_1Lhw = factor * torch.einsum("le,ehw->lhw", labels_LE, embeddings_Ehw)[None]
    logits_1Lhw = block(logits_1Lhw) if block else logits_1Lhw
    return F.interpolate(logits_1Lhw, size, mode="bilinear", align_corners=True)


def plain(
    embeddings_Ehw: Tensor, labels_LE: Tensor, targets_HW: Tensor, factor: Any, block: Any = None
) -> Tensor:
    logits_1LHW = plain_logits(embeddings_Ehw, labels_LE, targets_HW.shape, factor, block)
    losses_1HW = F.cross_entropy(logits_1LHW, targets_HW[None], ignore_index=-1, reduction="none")
    return losses_1HW[0][targets_HW >= 0]


def assert_same(found: Any, right: Any, tolerance: float = 1e-5) -> None:
    for one, other in zip(found, right, strict=True):
        # Relative to the largest: entries are sums of many terms that cancel.
        scale = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [None, "depthwise", "bottleneck"])
@pytest.mark.parametrize("values", [WHOLE, ROWS])
@pytest.mark.parametrize("even", [True, False])
def test_values_and_all_gradients(shape: Any, kind: str | None, values: int, even: bool) -> None:
    """Float32; all pixels of one weight in the sum, or each of its own (then backward computes again)."""
    inputs = made(shape)
    factor = torch.tensor(14.3, requires_grad=True)
    block = Regularisation(kind, 2) if kind else None
    learned = [*inputs[:2], factor, *(block.parameters() if block else ())]
    right_V = plain(*inputs, factor, block)
    found_V = dense_cross_entropy(*inputs, factor, block, values)
    weights_V = torch.full_like(right_V, 0.2) if even else torch.rand(len(right_V))
    assert_same([found_V], [right_V])
    assert_same(
        torch.autograd.grad((found_V * weights_V).sum(), learned),
        torch.autograd.grad((right_V * weights_V).sum(), learned),
    )


@pytest.mark.parametrize("kind", [None, "bottleneck"])
def test_exact_in_double(kind: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands, runs of rows and softmax in many pieces: equal to rounding."""
    monkeypatch.setitem(upsampled.WIDENED, "cpu", 1)
    monkeypatch.setitem(upsampled.SOFTMAX, "cpu", 1)
    inputs = made((9, 16, (13, 11), (31, 23)), torch.float64)
    block = Regularisation(kind, 3).double() if kind else None
    learned = [*inputs[:2], *(block.parameters() if block else ())]
    right_V, found_V = plain(*inputs, 14.3, block), dense_cross_entropy(*inputs, 14.3, block, 1)
    assert_same([found_V], [right_V], 1e-12)
    # The kernel hands itself out in float32: its gradient is rounded once.
    tolerance = 1e-6 if kind else 1e-12
    assert_same(
        torch.autograd.grad(found_V.sum(), learned), torch.autograd.grad(right_V.sum(), learned), tolerance
    )


def test_tiny_probabilities_keep_their_loss() -> None:
    """A temperature at which a wrong label's probability is no float32 any more."""
    inputs = made((3, 4, (4, 4), (8, 8)))
    right_V, found_V = plain(*inputs, 400.0), dense_cross_entropy(*inputs, 400.0)
    assert float(right_V.detach().max()) > 150
    torch.testing.assert_close(found_V, right_V, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "depthwise"])
def test_no_valid_pixel_gives_a_gradient_of_zeros(kind: str | None) -> None:
    embeddings_Ehw, labels_LE, targets_HW = made((4, 8, (5, 5), (9, 9)))
    block = Regularisation(kind) if kind else None
    factor = torch.tensor(14.3, requires_grad=True)
    losses_V = dense_cross_entropy(embeddings_Ehw, labels_LE, torch.full_like(targets_HW, -1), factor, block)
    assert losses_V.shape == (0,) and losses_V.dtype == torch.float32
    losses_V.sum().backward()
    for one in (embeddings_Ehw, labels_LE, factor, *(block.parameters() if block else ())):
        assert one.grad is not None and not one.grad.any()


def test_frozen_labels_and_kernel_get_none() -> None:
    embeddings_Ehw, labels_LE, targets_HW = made((4, 8, (5, 5), (9, 9)))
    block = Regularisation("bottleneck", 1).requires_grad_(False)
    labels_LE = labels_LE.detach()
    right_V = plain(embeddings_Ehw, labels_LE, targets_HW, 14.3, block)
    found_V = dense_cross_entropy(embeddings_Ehw, labels_LE, targets_HW, 14.3, block)
    assert_same(
        torch.autograd.grad(found_V.sum(), embeddings_Ehw), torch.autograd.grad(right_V.sum(), embeddings_Ehw)
    )
    assert labels_LE.grad is None and block.kernel.weight.grad is None


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    inputs = made((4, 8, (5, 5), (9, 9)))
    with torch.no_grad():
        losses_V = dense_cross_entropy(*inputs, 14.3, Regularisation("bottleneck"))
    assert not losses_V.requires_grad


def test_only_the_kernel_learns() -> None:
    """Embeddings and labels are data: the gradient of the ten parameters alone."""
    embeddings_Ehw, labels_LE, targets_HW = (one.detach() for one in made((4, 8, (5, 5), (9, 9))))
    block = Regularisation("depthwise", 2)
    right_V = plain(embeddings_Ehw, labels_LE, targets_HW, 14.3, block)
    found_V = dense_cross_entropy(embeddings_Ehw, labels_LE, targets_HW, 14.3, block, 1)
    learned = list(block.parameters())
    assert_same(torch.autograd.grad(found_V.sum(), learned), torch.autograd.grad(right_V.sum(), learned))


def test_under_autocast_only_the_products_are_coarse() -> None:
    inputs = made((7, 16, (12, 9), (25, 17)))
    with torch.autocast("cpu", torch.bfloat16):
        found_V = dense_cross_entropy(*inputs, 14.3)
    assert found_V.dtype == torch.float32
    coarse = [one.detach().bfloat16() for one in inputs[:2]]
    right_V = plain(coarse[0].float(), (inputs[1] * 14.3).bfloat16().float(), inputs[2], 1.0)
    # One rounding of each logit (up to 14) to bf16, a 256th of it.
    torch.testing.assert_close(found_V, right_V, rtol=0, atol=14 / 128)
    grad = torch.autograd.grad(found_V.sum(), inputs[0])[0]
    assert grad.dtype == torch.float32
    right = torch.autograd.grad(plain(*inputs, 14.3).sum(), inputs[0])[0]
    assert F.cosine_similarity(grad.flatten(), right.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("kind", [None, "bottleneck"])
@pytest.mark.parametrize("values", [WHOLE, ROWS])
@pytest.mark.parametrize("shape", SHAPES)
def test_argmax_and_logits(shape: Any, kind: str | None, values: int) -> None:
    labels, channels, size, mask = shape
    embeddings_NEhw = F.normalize(torch.randn(2, channels, *size), dim=1)
    labels_LE = F.normalize(torch.randn(labels, channels), dim=1)
    block = Regularisation(kind, 2).requires_grad_(False) if kind else None
    right_NLHW = torch.cat([plain_logits(one, labels_LE, mask, 14.3, block) for one in embeddings_NEhw])
    found_NLHW = dense_logits(embeddings_NEhw, labels_LE, 14.3, mask, block)
    assert_same([found_NLHW], [right_NLHW])
    classes_NHW, chances_NHW = dense_argmax(embeddings_NEhw, labels_LE, 14.3, mask, block, values)
    assert_same([chances_NHW], [right_NLHW.softmax(1).amax(1)])
    best_NHW = right_NLHW.gather(1, classes_NHW[:, None])[:, 0]
    assert_same([best_NHW], [right_NLHW.amax(1)])  # the label itself may differ where two are equal


def test_bad_labels_are_named() -> None:
    embeddings_Ehw, labels_LE, targets_HW = made((4, 8, (5, 5), (9, 9)))
    with pytest.raises(UserError) as caught:
        dense_cross_entropy(embeddings_Ehw, labels_LE, targets_HW.clamp(min=0) + 4, 14.3)
    assert "4 labels" in tiny.sentence(caught)
    with pytest.raises(UserError) as caught:
        dense_cross_entropy(embeddings_Ehw, labels_LE[:0], targets_HW, 14.3)
    assert "at least one label" in tiny.sentence(caught)


def test_bands_cover_every_row_once() -> None:
    block = Regularisation("depthwise", 2).blocks()
    for height, out in ((7, 15), (9, 4), (1, 6), (20, 1)):
        cut = list(bands(height, 5, 3, out, block, 1, torch.float32))
        assert [row for band in cut for row in range(band.start, band.stop)] == list(range(out))
        for band in cut:
            assert 0 <= band.top <= band.bottom <= height
            assert band.rows.span == (0, band.end - band.begin)
            # The halo is there, or the map's own edge is.
            assert band.begin == 2 or band.top == 0
            assert band.bottom - band.top - band.end == 2 or band.bottom == height


def peak(step: Callable[[], Any]) -> int:
    """The most float32 values that live at once among those a step makes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most // 4


@pytest.mark.parametrize(("kind", "depth"), [(None, 0), ("depthwise", 1), ("bottleneck", 3)])
def test_memory_is_bounded(kind: str | None, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docstring's formula says, whatever the rows; the plain way holds many times as much."""
    monkeypatch.setitem(upsampled.WIDENED, "cpu", 2**12)
    monkeypatch.setitem(upsampled.SOFTMAX, "cpu", 2**12)
    block = Regularisation(kind, depth) if kind else None
    found = []
    for rows in (12, 24):
        shape: Any = (200, 16, (rows, 32), (2 * rows, 64))
        embeddings_Ehw, labels_LE, targets_HW = made(shape)

        def step(inputs: Any = (embeddings_Ehw, labels_LE, targets_HW)) -> None:
            dense_cross_entropy(*inputs, 14.3, block, 2**14).sum().backward()

        step()  # the gradients' own places
        # The embeddings' gradient is made, scaled and added; losses and targets are of the mask's size.
        besides = 3 * embeddings_Ehw.numel() + 4 * targets_HW.numel()
        bound = values_held(200, 32, 64, depth, 2**14)
        found.append(peak(step))
        assert found[-1] <= bound + besides
        seen = (embeddings_Ehw[None].detach(), labels_LE.detach(), 14.3, targets_HW.shape, block)
        assert peak(lambda seen=seen: dense_argmax(*seen, 2**14)) <= bound + besides
    assert peak(lambda: plain(*made(shape), 14.3, block).sum().backward()) > 3 * found[-1]
