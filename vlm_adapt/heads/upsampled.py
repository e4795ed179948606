"""A map of logits seen at the size of a mask, a few rows at a time: their losses, gradients and best labels.

The map is upsampled bilinearly with align_corners=True. What is as large as labels x mask is never held:
a few rows are upsampled, their softmax is taken, and their gradient brought back to the map at once. Knows
logits and targets; knows nothing about embeddings, labels or models.

    h, w rows and columns of the map; W columns of the mask; R rows at hand; L labels; P = R * W pixels
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Values held at once: of the map's rows at the mask's width, and of the softmax (which fits a core's cache).
WIDENED = {"cpu": 2**21, "cuda": 2**26}
SOFTMAX = {"cpu": 2**18, "cuda": 2**26}
LEAST = 1e-20  # below it a probability is too small to take its logarithm from


@dataclass(frozen=True)
class Rows:
    """Where rows of the mask lie between rows of the map.

    Attributes:
        upper, lower: for each row of the mask the rows of the map around it.
        shares: how much of it the lower one has.
    """

    upper: tuple[int, ...]
    lower: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def between(cls, height: int, out: int, dtype: torch.dtype) -> Rows:
        """All rows of a mask of `out` rows over a map of `height`; in `dtype`, rounded as torch does."""
        scale = torch.zeros((), dtype=dtype)
        if out > 1:
            scale = torch.tensor(height - 1, dtype=dtype) / (out - 1)
        places = scale * torch.arange(out, dtype=dtype)
        upper = places.long().clamp(max=height - 1)
        lower = (upper + 1).clamp(max=height - 1)
        return cls(tuple(upper.tolist()), tuple(lower.tolist()), tuple((places - upper).clamp(0, 1).tolist()))

    def part(self, start: int, stop: int, first: int = 0) -> Rows:
        """Rows start to stop of the mask, over a map that begins with row `first` of this one."""
        return Rows(
            tuple(row - first for row in self.upper[start:stop]),
            tuple(row - first for row in self.lower[start:stop]),
            self.shares[start:stop],
        )

    def __len__(self) -> int:
        return len(self.upper)

    @property
    def span(self) -> tuple[int, int]:
        """The map's rows that these lie between: first, and one behind the last."""
        return self.upper[0], self.lower[-1] + 1

    def weights(self, like: Tensor) -> Tensor:
        """weights_RS of the map's S rows in `span` for each of these rows."""
        begin, end = self.span
        places_R2 = torch.tensor([self.upper, self.lower], device=like.device).T - begin
        lower_R = torch.tensor(self.shares, dtype=like.dtype, device=like.device)
        shares_R2 = torch.stack([1 - lower_R, lower_R], 1)
        return like.new_zeros(len(self), end - begin).scatter_add_(1, places_R2, shares_R2)

    def groups(self, rows: int, of_map: bool) -> Iterator[tuple[int, int]]:
        """Cut into runs of at most `rows` rows (at least one), of the mask or `of_map`."""
        start = 0
        while start < len(self):
            stop = start + 1
            while stop < len(self) and (
                self.lower[stop] - self.upper[start] < rows if of_map else stop - start < rows
            ):
                stop += 1
            yield start, stop
            start = stop


def widen(logits_RwL: Tensor, width: int) -> Tensor:
    """Rows of the map to the mask's width, [R, W, L]."""
    if logits_RwL.shape[1] == width:
        return logits_RwL.contiguous()
    size = (len(logits_RwL), width)
    wide_1LRW = F.interpolate(logits_RwL.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=True)
    return wide_1LRW[0].permute(1, 2, 0).contiguous()


def narrow(grad_RWL: Tensor, width: int) -> Tensor:
    """`widen` backward: gradients of the map's rows, [R, w, L]."""
    rows, wide, labels = grad_RWL.shape
    if wide == width:
        return grad_RWL
    grad_1LRw = torch.ops.aten.upsample_bilinear2d_backward(
        grad_RWL.permute(2, 0, 1)[None], [rows, wide], [1, labels, rows, width], True
    )
    return grad_1LRw[0].permute(1, 2, 0)


def _at_once(table: dict[str, int], logits_hwL: Tensor, width: int) -> int:
    return max(1, table.get(logits_hwL.device.type, 2**26) // max(1, width * logits_hwL.shape[2]))


def losses_and_gradient(
    logits_hwL: Tensor, targets_RW: Tensor, rows: Rows, weights_RW: Tensor | None, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of every pixel, and the gradient of their sum with regard to the map.

    Args:
        logits_hwL: float32 or float64.
        targets_RW: label of each pixel, -1 for none.
        rows: where the mask's R rows lie in the map.
        weights_RW: of each pixel in the sum; None for 1.
        gradient: whether it is wanted.
    Returns:
        losses_RW, 0 where there is no label; gradient_hwL or None.
    """
    width = targets_RW.shape[1]
    losses_RW = logits_hwL.new_zeros(targets_RW.shape)
    gradient_hwL = torch.zeros_like(logits_hwL) if gradient else None
    valid_RW = targets_RW >= 0
    some, every = valid_RW.any(1).tolist(), valid_RW.all(1).tolist()
    # Two rows of the map at least, or each would be widened twice.
    for first, last in rows.groups(max(2, _at_once(WIDENED, logits_hwL, width)), of_map=True):
        if not any(some[first:last]):
            continue
        begin, end = rows.part(first, last).span
        wide_SWL = widen(logits_hwL[begin:end], width)
        grad_SWL = torch.zeros_like(wide_SWL) if gradient else None
        within = rows.part(first, last, begin)
        for start, stop in within.groups(_at_once(SOFTMAX, logits_hwL, width), of_map=False):
            here = slice(first + start, first + stop)
            if not any(some[here]):
                continue
            near = within.part(start, stop)
            weights_RS = near.weights(wide_SWL)
            logits_PL = (weights_RS @ wide_SWL[slice(*near.span)].flatten(1)).view(-1, wide_SWL.shape[2])
            targets_P1 = targets_RW[here].clamp(min=0).view(-1, 1)
            chances_PL = logits_PL.softmax(1)
            losses_RW[here] = _losses(logits_PL, chances_PL, targets_P1).view(-1, width)
            if grad_SWL is None:
                continue
            chances_PL.scatter_add_(1, targets_P1, chances_PL.new_full(targets_P1.shape, -1.0))
            if weights_RW is not None:
                chances_PL.mul_(weights_RW[here].reshape(-1, 1))
            if not all(every[here]):
                chances_PL.mul_(valid_RW[here].reshape(-1, 1))
            grad_SWL[slice(*near.span)].flatten(1).addmm_(weights_RS.T, chances_PL.view(stop - start, -1))
            del logits_PL, chances_PL  # before the next ones are made
        del wide_SWL
        if gradient_hwL is not None and grad_SWL is not None:
            gradient_hwL[begin:end] += narrow(grad_SWL, logits_hwL.shape[1])
            del grad_SWL
    return losses_RW.mul_(valid_RW), gradient_hwL


def _losses(logits_PL: Tensor, chances_PL: Tensor, targets_P1: Tensor) -> Tensor:
    """-log of the targets' probabilities; from the logits where these are too small."""
    chances_P = chances_PL.gather(1, targets_P1)[:, 0]
    small_P = chances_P < LEAST
    losses_P = -chances_P.log()
    if small_P.any():
        few_QL = logits_PL[small_P]
        losses_P[small_P] = few_QL.logsumexp(1) - few_QL.gather(1, targets_P1[small_P])[:, 0]
    return losses_P


def best_labels(logits_hwL: Tensor, rows: Rows, width: int) -> tuple[Tensor, Tensor]:
    """The best label of every pixel and its probability: classes_RW int64, chances_RW."""
    classes_RW = torch.empty(len(rows), width, dtype=torch.long, device=logits_hwL.device)
    chances_RW = logits_hwL.new_empty(len(rows), width)
    for first, last in rows.groups(max(2, _at_once(WIDENED, logits_hwL, width)), of_map=True):
        begin, end = rows.part(first, last).span
        wide_SWL = widen(logits_hwL[begin:end], width)
        within = rows.part(first, last, begin)
        for start, stop in within.groups(_at_once(SOFTMAX, logits_hwL, width), of_map=False):
            near = within.part(start, stop)
            logits_RV = near.weights(wide_SWL) @ wide_SWL[slice(*near.span)].flatten(1)
            logits_PL = logits_RV.view(-1, wide_SWL.shape[2])
            best_P, classes_P = logits_PL.max(1)
            here = slice(first + start, first + stop)
            classes_RW[here] = classes_P.view(-1, width)
            chances_RW[here] = (best_P - logits_PL.logsumexp(1)).exp_().view(-1, width)
    return classes_RW, chances_RW
