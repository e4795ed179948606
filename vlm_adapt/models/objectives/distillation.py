"""Learning from a teacher: its logits at the learned positions, and its features of the images.

Hinton et al. 2015, arXiv 1503.02531 (logits); Romero et al. 2015, FitNets, arXiv 1412.6550 (features). A
learned token of a text whose images' features are f, with student logits z and teacher logits y, has the loss

    language_weight CE(z, target)
    + distill_weight T^2 sum_v p_v (log p_v - log q_v)     p = softmax(y / T), q = softmax(z / T)
    + feature_weight mean over the text's images of mean((f_student - f_teacher)^2)

so that a step's loss is the same however its texts are spread over batches and ranks; a text without images
has no third term. Knows batches and a teacher (models/teacher.py); knows nothing about where that came from.

    N learned tokens, V vocabulary, I images, U tokens or patches of all images, X texts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm_adapt.connectors.packed import PackedFeatures
from vlm_adapt.data.collate import Batch
from vlm_adapt.language.language import LOGIT_ROWS_AT_ONCE
from vlm_adapt.language.loss import cross_entropy

VALUES_AT_ONCE = {"cpu": 2**18, "cuda": 2**27}  # float32 values: in the cache of a core; half a gigabyte


def distillation(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Sum over targets of the loss above (float32 scalar), and each target's own [N], detached."""
    teacher = model.teacher
    settings = teacher.settings
    features = model.seen(batch.images)
    tokens = model.connector(features)
    with torch.no_grad():
        its_features, its_tokens = teacher.sees(batch, tokens)
    losses_N = torch.zeros(len(batch.targets_N), device=batch.targets_N.device)
    unused = tokens.sum() * 0.0
    if settings.language_weight or settings.distill_weight:
        words_N, nothing = _of_words(model, batch, tokens, its_tokens)
        losses_N, unused = losses_N + words_N, unused + nothing
    if teacher.compares:
        mine = features if teacher.compares == "vision" else tokens
        errors_I = image_errors(mine, its_features, batch)
        unused = unused + errors_I.sum() * 0.0
        losses_N = losses_N + settings.feature_weight * _of_texts(errors_I, batch)
    return losses_N.sum() + unused.float(), losses_N.detach()


def _of_words(model: Any, batch: Batch, tokens: Tensor, its_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The first two terms of each target; and a zero through which a rank without targets goes backward."""
    teacher, settings = model.teacher, model.teacher.settings
    hidden_ND = _picked(model, batch, tokens)
    if not len(batch.targets_N):
        # Such a rank still runs the head, and backward through every block: ZeRO waits.
        return batch.targets_N.float(), model.language.logits(
            hidden_ND.sum(0, keepdim=True)
        ).float().sum() * 0.0
    its_hidden_ND = hidden_ND.detach()
    if settings.distill_weight:
        with torch.no_grad():
            its_hidden_ND = _picked(teacher.model, batch, its_tokens)

    def losses(hidden_ND: Tensor, its_hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        logits_NV = model.language.logits(hidden_ND)
        total_N = torch.zeros(len(targets_N), device=targets_N.device)
        if settings.language_weight:
            total_N = total_N + settings.language_weight * cross_entropy(logits_NV, targets_N)
        if settings.distill_weight:
            with torch.no_grad():
                its_NV = teacher.model.language.logits(its_hidden_ND)
            total_N = total_N + settings.distill_weight * divergence(logits_NV, its_NV, settings.temperature)
        return total_N

    parts = []
    for start in range(0, len(batch.targets_N), LOGIT_ROWS_AT_ONCE):
        rows = slice(start, start + LOGIT_ROWS_AT_ONCE)
        pieces = (hidden_ND[rows], its_hidden_ND[rows], batch.targets_N[rows])
        if len(batch.targets_N) > LOGIT_ROWS_AT_ONCE and torch.is_grad_enabled():
            parts.append(checkpoint(losses, *pieces, use_reentrant=False))
        else:
            parts.append(losses(*pieces))
    return torch.cat(parts), parts[0].new_zeros(())


def _picked(model: Any, batch: Batch, tokens: Tensor) -> Tensor:
    """The states that predict the targets, or any state of a batch without them."""
    hidden_BTD = model.language.hidden(model.inputs(batch, tokens))
    return hidden_BTD.flatten(0, 1)[batch.predict_from_N]


def divergence(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softmax(logits / T), float32 [N]; gradients for the student alone.

    Tables that were padded to different lengths are compared over the words of both.
    """
    words = min(student_NV.shape[1], teacher_NV.shape[1])
    return _Divergence.apply(student_NV[:, :words], teacher_NV[:, :words], temperature)


class _Divergence(torch.autograd.Function):
    """Few rows in float32 at a time, as in language/loss.py. d/dz of T^2 KL is T (q - p)."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student_NV, teacher_NV)
        ctx.temperature = temperature
        losses_N = torch.empty(len(student_NV), device=student_NV.device)
        for rows in _pieces(student_NV):
            log_q_RV = (student_NV[rows].float() / temperature).log_softmax(1)
            log_p_RV = (teacher_NV[rows].float() / temperature).log_softmax(1)
            p_RV = log_p_RV.exp()
            # A word that the teacher excludes (-inf) adds nothing, whatever the student says.
            terms_RV = torch.where(p_RV > 0, p_RV * (log_p_RV - log_q_RV), 0.0)
            losses_N[rows] = terms_RV.sum(1) * temperature**2
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        student_NV, teacher_NV = ctx.saved_tensors
        grad_NV = torch.empty_like(student_NV)
        for rows in _pieces(student_NV):
            q_RV = (student_NV[rows].float() / ctx.temperature).softmax(1)
            p_RV = (teacher_NV[rows].float() / ctx.temperature).softmax(1)
            grad_NV[rows] = ((q_RV - p_RV) * (ctx.temperature * grad_N[rows, None])).to(grad_NV.dtype)
        return grad_NV, None, None


def _pieces(logits_NV: Tensor) -> Iterator[slice]:
    count = max(1, VALUES_AT_ONCE.get(logits_NV.device.type, 2**27) // logits_NV.shape[1])
    for start in range(0, len(logits_NV), count):
        yield slice(start, start + count)


def image_errors(mine: Any, its: Any, batch: Batch) -> Tensor:
    """Mean square of the difference of each image's features, float32 [I]: over layers, places and channels.

    Args:
        mine, its: image tokens, [I, K, D] or packed [U, D]; or a tower's features of several layers.
    """
    if isinstance(mine, Tensor):
        if mine.ndim == 3:
            return _square(mine, its).mean(1)
        return _means(_square(mine, its), batch.image_lengths_I.tolist() or [len(mine)])
    if isinstance(mine, PackedFeatures):
        pairs = zip(mine.layers, its.layers, strict=True)
        return torch.stack([_means(_square(a, b), mine.lengths) for a, b in pairs]).mean(0)
    return torch.stack([_square(a, b).mean(1) for a, b in zip(mine, its, strict=True)]).mean(0)


def _square(mine: Tensor, its: Tensor) -> Tensor:
    return (mine.float() - its.float()).square().mean(-1)


def _means(values_U: Tensor, lengths: Sequence[int]) -> Tensor:
    counts_I = torch.tensor(lengths, device=values_U.device)
    image_of_U = torch.repeat_interleave(torch.arange(len(lengths), device=values_U.device), counts_I)
    return values_U.new_zeros(len(lengths)).index_add(0, image_of_U, values_U) / counts_I


def _of_texts(errors_I: Tensor, batch: Batch) -> Tensor:
    """The mean error of the images of each target's text, [N]."""
    rows, width = batch.ids_BT.shape
    device = batch.ids_BT.device
    documents = int(batch.documents_BT.max().clamp_min(1))
    first_B1 = torch.arange(rows, device=device)[:, None] * documents
    text_of_BT = batch.documents_BT.clamp_min(1) - 1 + first_B1
    if batch.decoder_ids_BU is None:
        text_of_N = text_of_BT.flatten()[batch.predict_from_N]
    else:  # one text a row
        text_of_N = batch.predict_from_N // batch.decoder_ids_BU.shape[1] * documents
    lengths_I = batch.image_lengths_I
    text_of_I = text_of_BT.flatten()[batch.image_positions_K[lengths_I.cumsum(0) - lengths_I]]
    counts_X = torch.bincount(text_of_I, minlength=rows * documents)
    sums_X = errors_I.new_zeros(rows * documents).index_add(0, text_of_I, errors_I[: len(text_of_I)])
    return (sums_X / counts_X.clamp_min(1))[text_of_N]
