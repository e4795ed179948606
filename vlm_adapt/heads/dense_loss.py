"""From embeddings of pixels and labels to losses, logits or labels of a mask's pixels, in bands of rows.

    logits = temperature * cosine, regularised if asked, upsampled bilinearly (align_corners=True) to the mask
    loss of a pixel = cross-entropy over the labels

LSeg, Li et al. 2022, arXiv 2201.03546. Knows embeddings, labels and targets; knows nothing about heads, text
or images. The gradient is taken together with the loss, band by band, for the usual case that all pixels
have the same weight in what is made of them; backward scales it. Where their weights differ, backward
computes it again. Nothing of labels x mask is held, and of labels x map only a band.

    N images, E channels, h x w pixels of the map, H x W of the mask, L labels, V pixels with a label
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_adapt.errors import UserError
from vlm_adapt.heads.bands import VALUES_AT_ONCE, Band, bands, product, regularised
from vlm_adapt.heads.regularisation import Blocks, Regularisation
from vlm_adapt.heads.upsampled import best_labels, losses_and_gradient

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclass
class _Gradients:
    """What the inputs have gathered so far; None for those that need none."""

    embeddings_Ehw: Tensor | None
    labels_LE: Tensor | None
    kernel: list[Tensor] | None

    def scaled(self, factor: Tensor | float) -> list[Tensor | None]:
        return [None if one is None else one * factor for one in self.all()]

    def all(self) -> list[Tensor | None]:
        return [self.embeddings_Ehw, self.labels_LE, *(self.kernel or (None, None))]


def _walk(
    inputs: Inputs,
    targets_HW: Tensor,
    blocks: Blocks | None,
    values: int,
    dtype: torch.dtype,
    weights_HW: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, _Gradients]:
    """losses_HW, and the gradients of their (weighted) sum that are needed: embeddings, labels, kernel."""
    embeddings_Ehw, labels_LE = inputs[0].to(dtype), inputs[1].to(dtype)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    found = _Gradients(
        torch.zeros(inputs[0].shape, dtype=exact, device=inputs[0].device) if needs[0] else None,
        torch.zeros(inputs[1].shape, dtype=exact, device=inputs[1].device) if needs[1] else None,
        [torch.zeros_like(one) for one in inputs[2:] if one is not None] if needs[2] else None,
    )
    losses_HW = torch.zeros(targets_HW.shape, dtype=exact, device=targets_HW.device)
    if blocks is not None:
        assert inputs[2] is not None and inputs[3] is not None
        leaves = [one.detach().requires_grad_(needs[2]) for one in inputs[2:] if one is not None]
        blocks = replace(blocks, weight=leaves[0], bias=leaves[1])
    height, width = embeddings_Ehw.shape[1:]
    for band in bands(height, width, len(labels_LE), len(targets_HW), blocks, values, exact):
        here = slice(band.start, band.stop)
        if bool((targets_HW[here] >= 0).any()):
            weights_RW = None if weights_HW is None else weights_HW[here]
            losses_HW[here] = _walk_band(
                band, embeddings_Ehw, labels_LE, targets_HW[here], weights_RW, blocks, needs, found
            )
    return losses_HW, found


def _walk_band(
    band: Band,
    embeddings_Ehw: Tensor,
    labels_LE: Tensor,
    targets_RW: Tensor,
    weights_RW: Tensor | None,
    blocks: Blocks | None,
    needs: tuple[bool, bool, bool],
    found: _Gradients,
) -> Tensor:
    """losses_RW of one band; its gradients are added to those found. What it makes is gone after it."""
    pixels_ERw = embeddings_Ehw[:, band.top : band.bottom]
    before_RwL = product(pixels_ERw, labels_LE)
    with torch.set_grad_enabled(blocks is not None and any(needs)):
        before_RwL.requires_grad_(torch.is_grad_enabled() and (needs[0] or needs[1]))
        after_RwL = regularised(before_RwL, blocks)[band.begin : band.end]
    losses_RW, grad_RwL = losses_and_gradient(
        after_RwL.detach().contiguous(), targets_RW, band.rows, weights_RW, any(needs)
    )
    if grad_RwL is None:
        return losses_RW
    if blocks is not None:
        learned = [blocks.weight, blocks.bias] if needs[2] else []
        wanted = [before_RwL] if before_RwL.requires_grad else []
        grads = torch.autograd.grad(after_RwL, [*wanted, *learned], grad_RwL)
        for sum_so_far, grad in zip(found.kernel or (), grads[len(wanted) :], strict=True):
            sum_so_far += grad
        if not wanted:
            return losses_RW
        grad_RwL = grads[0]
    grad_PL = grad_RwL.flatten(0, 1).to(labels_LE.dtype)
    if found.embeddings_Ehw is not None:
        grad_ERw = (labels_LE.T @ grad_PL.T).view(pixels_ERw.shape)
        found.embeddings_Ehw[:, band.top : band.bottom] += grad_ERw
    if found.labels_LE is not None:
        found.labels_LE += grad_PL.T @ pixels_ERw.flatten(1).T
    return losses_RW


class _DenseCrossEntropy(torch.autograd.Function):
    """(embeddings_Ehw, labels_LE, weight, bias) to losses_V."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings_Ehw: Tensor,
        labels_LE: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        targets_HW: Tensor,
        blocks: Blocks | None,
        values: int,
        dtype: torch.dtype,
    ) -> Tensor:
        inputs = (embeddings_Ehw, labels_LE, weight, bias)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], any(ctx.needs_input_grad[2:4]))
        with torch.autocast(embeddings_Ehw.device.type, enabled=False):
            losses_HW, found = _walk(inputs, targets_HW, blocks, values, dtype, None, needs)
        ctx.save_for_backward(*inputs, targets_HW, *found.all())
        ctx.settings = (blocks, values, dtype, needs)
        return losses_HW[targets_HW >= 0]

    @staticmethod
    def backward(ctx: Any, grad_V: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *inputs, targets_HW, embeddings_Ehw, labels_LE, weight, bias = ctx.saved_tensors
        blocks, values, dtype, needs = ctx.settings
        if not len(grad_V) or bool((grad_V == grad_V[0]).all()):
            found = _Gradients(embeddings_Ehw, labels_LE, None if weight is None else [weight, bias])
            grads = found.scaled(grad_V[0] if len(grad_V) else 0.0)
        else:
            weights_HW = torch.zeros(targets_HW.shape, dtype=grad_V.dtype, device=grad_V.device)
            weights_HW[targets_HW >= 0] = grad_V
            with torch.no_grad(), torch.autocast(targets_HW.device.type, enabled=False):
                _, found = _walk(tuple(inputs), targets_HW, blocks, values, dtype, weights_HW, needs)
            grads = found.all()
        grads = [
            None if grad is None else grad.to(value.dtype) for grad, value in zip(grads, inputs, strict=True)
        ]
        return (*grads, None, None, None, None)


def _in_hand(regularisation: Regularisation | Blocks | None) -> Blocks | None:
    return regularisation.blocks() if isinstance(regularisation, Regularisation) else regularisation


def dense_cross_entropy(
    embeddings_Ehw: Tensor,
    labels_LE: Tensor,
    targets_HW: Tensor,
    temperature: float | Tensor,
    regularisation: Regularisation | Blocks | None = None,
    values_at_once: int = VALUES_AT_ONCE,
) -> Tensor:
    """Cross-entropy of each pixel that has a label, in reading order: losses_V, float32.

    Under autocast the products of embeddings are taken in its dtype; all else is float32 (float64 where
    the embeddings are). What is held at most beside the inputs, their gradients and the losses:
    `bands.values_held`, which does not depend on how many rows map and mask have.

    Args:
        embeddings_Ehw: one image's, L2-normalised.
        labels_LE: L2-normalised.
        targets_HW: int64 on the embeddings' device; -1 for no label.
        temperature: what cosines are multiplied by.
        regularisation: blocks; as `Regularisation.blocks()` gives them, all images of a batch share one
            call of the module, so that ranks with different numbers of images call it equally often (ZeRO-3).
        values_at_once: how many values of labels x map a band may hold.
    Raises:
        UserError: a target beyond the labels, or no labels.
    """
    if not len(labels_LE):
        raise UserError("a mask needs at least one label: the list of labels is empty")
    highest = int(targets_HW.max()) if targets_HW.numel() else -1
    if highest >= len(labels_LE):
        raise UserError(
            f"a mask holds label {highest}, and there are {len(labels_LE)} labels, counted from 0"
        )
    blocks = _in_hand(regularisation)
    scaled_LE = labels_LE * temperature
    weight, bias = (blocks.weight, blocks.bias) if blocks else (None, None)
    if highest < 0:  # nothing to learn: a gradient of zeros reaches everything all the same
        inputs = [one for one in (embeddings_Ehw, scaled_LE, weight, bias) if one is not None]
        return torch.cat([one.flatten()[:0].float() for one in inputs])
    if not torch.is_grad_enabled():  # a function of torch's own does not see this by itself
        embeddings_Ehw, scaled_LE = embeddings_Ehw.detach(), scaled_LE.detach()
        weight, bias = (None, None) if blocks is None else (blocks.weight.detach(), blocks.bias.detach())
    device = embeddings_Ehw.device.type
    dtype = torch.promote_types(embeddings_Ehw.dtype, scaled_LE.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return _DenseCrossEntropy.apply(
        embeddings_Ehw, scaled_LE, weight, bias, targets_HW, blocks, values_at_once, dtype
    )


def dense_logits(
    embeddings_NEhw: Tensor,
    labels_LE: Tensor,
    temperature: float | Tensor,
    size: tuple[int, int],
    regularisation: Regularisation | Blocks | None = None,
) -> Tensor:
    """logits_NLHW of every pixel of a mask of `size` (H, W), in float32; differentiable, and held whole."""
    blocks = _in_hand(regularisation)
    with torch.autocast(embeddings_NEhw.device.type, enabled=False):
        scaled_LE = (labels_LE * temperature).float()
        logits_NLhw = torch.einsum("le,nehw->nlhw", scaled_LE, embeddings_NEhw.float())
        logits_NLhw = blocks(logits_NLhw) if blocks else logits_NLhw
        return F.interpolate(logits_NLhw, size, mode="bilinear", align_corners=True)


@torch.no_grad()
def dense_argmax(
    embeddings_NEhw: Tensor,
    labels_LE: Tensor,
    temperature: float | Tensor,
    size: tuple[int, int],
    regularisation: Regularisation | Blocks | None = None,
    values_at_once: int = VALUES_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """The best label of every pixel of a mask of `size` (H, W): classes_NHW int64, probabilities_NHW float32.

    In float32 also under autocast; no more than `bands.values_held` is held beside what comes out.
    """
    blocks = _in_hand(regularisation)
    classes_NHW = torch.empty(len(embeddings_NEhw), *size, dtype=torch.long, device=embeddings_NEhw.device)
    chances_NHW = torch.empty(classes_NHW.shape, device=embeddings_NEhw.device)
    height, width = embeddings_NEhw.shape[2:]
    with torch.autocast(embeddings_NEhw.device.type, enabled=False):
        scaled_LE = (labels_LE * temperature).float()
        for image, embeddings_Ehw in enumerate(embeddings_NEhw):
            for band in bands(height, width, len(labels_LE), size[0], blocks, values_at_once, torch.float32):
                logits_RwL = product(embeddings_Ehw[:, band.top : band.bottom].float(), scaled_LE)
                logits_RwL = regularised(logits_RwL, blocks)[band.begin : band.end].contiguous()
                found = best_labels(logits_RwL, band.rows, size[1])
                here = slice(band.start, band.stop)
                classes_NHW[image, here], chances_NHW[image, here] = found
    return classes_NHW, chances_NHW
