"""Cross-entropy that holds few rows in float32 at a time, forward and backward.

Knows logits and targets; knows nothing about models. The usual road holds three float32 copies of the
logits (themselves, their log-probabilities, their gradient); at 32,000 words that is what a small
model's step waits for (docs/log.md). The arithmetic is the same, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

VALUES_AT_ONCE = {"cpu": 2**18, "cuda": 2**27}  # float32 values: in the cache of a core; half a gigabyte


class _CrossEntropy(torch.autograd.Function):
    """logits [N, V], targets [N] to losses [N]: log(sum(exp(logits))) - logits[target]."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        tops_N = logits_NV.amax(1).float()
        norms_N = torch.empty_like(tops_N)
        for rows, scratch_RV in _pieces(logits_NV):
            torch.sub(logits_NV[rows], tops_N[rows, None], out=scratch_RV)
            norms_N[rows] = scratch_RV.exp_().sum(1).log_().add_(tops_N[rows])
        ctx.save_for_backward(logits_NV, targets_N, norms_N)
        return norms_N - logits_NV.gather(1, targets_N[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits_NV, targets_N, norms_N = ctx.saved_tensors
        out_NV = torch.empty_like(logits_NV)
        for rows, scratch_RV in _pieces(logits_NV):
            torch.sub(logits_NV[rows], norms_N[rows, None], out=scratch_RV).exp_()
            words_R1 = targets_N[rows, None]
            scratch_RV.scatter_add_(1, words_R1, scratch_RV.new_full(words_R1.shape, -1.0))
            out_NV[rows] = scratch_RV.mul_(grad_N[rows, None])
        return out_NV, None


def _pieces(logits_NV: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, with one float32 place for all of them: fresh memory costs more than the sums."""
    count = min(len(logits_NV), _rows(logits_NV))
    scratch_RV = torch.empty(count, logits_NV.shape[1], device=logits_NV.device)
    for start in range(0, len(logits_NV), count):
        rows = slice(start, min(len(logits_NV), start + count))
        yield rows, scratch_RV[: rows.stop - start]


def _rows(logits_NV: Tensor) -> int:
    return max(1, VALUES_AT_ONCE.get(logits_NV.device.type, 2**27) // logits_NV.shape[1])


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Loss of each row in float32, as `torch.nn.functional.cross_entropy(..., reduction="none")`."""
    return _CrossEntropy.apply(logits_NV, targets_N)
