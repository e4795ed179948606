"""Nearest neighbours by cosine: leave-one-out accuracy, and classes by the votes of neighbours.

Knows vectors and labels; knows nothing about models, images or files. Exact (every pair is compared), a
few rows at a time, so that N^2 similarities are never held together.

Ties: similarities are float64 rounded to 1e-10, so that equal vectors are equal whatever the order of
sums was. Of equally near neighbours the one with the lower number comes first. Of classes with equally many
votes the one whose nearest member is nearer wins. A vector of zeros has similarity 0 with all.

With a temperature votes weigh exp(similarity / temperature), as in DINO (Caron et al. 2021,
arXiv 2104.14294, after Wu et al. 2018), where it is 0.07; without, each neighbour has one vote.

    Q queries, N vectors of the bank, D dimensions, K neighbours
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor

from vlm_adapt.errors import UserError

VALUES_AT_ONCE = 2**23  # similarities in float64: 64 MB
DIGITS = 10
TEMPERATURE = 0.07  # DINO's

Labels = Tensor | Sequence[Hashable]


def leave_one_out(features_ND: Tensor, labels_N: Labels, k: int = 1) -> float:
    """Share of vectors whose k nearest others (one vote each) name its own label, 0 to 1.

    Args:
        features_ND: any floating type; their lengths do not matter.
        labels_N: numbers, or words.

    Raises:
        UserError: fewer than k + 1 vectors, other numbers of labels, or values that are not finite.
    """
    numbers_N = as_numbers(labels_N).to(features_ND.device)
    if len(numbers_N) != len(features_ND):
        raise UserError(f"neighbours: there are {len(features_ND)} vectors and {len(numbers_N)} labels")
    right, done = 0, 0
    for similar_QK, found_QK in nearest(features_ND, features_ND, k, others=True):
        chosen_Q = vote(similar_QK, numbers_N[found_QK])
        right += int((chosen_Q == numbers_N[done : done + len(chosen_Q)]).sum())
        done += len(chosen_Q)
    return right / done


def nearest(
    queries_QD: Tensor,
    bank_ND: Tensor,
    k: int,
    others: bool = False,
    tell: Callable[[int], None] = lambda done: None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(similarities_QK in float64, numbers_QK), the nearest first, for some queries at a time, in order.

    Args:
        others: queries and bank are the same vectors, and none is its own neighbour.
        tell: called with how many queries are done.

    Raises:
        UserError: k is not from 1 to the number of vectors, shapes differ, or values are not finite.
    """
    _check(queries_QD, bank_ND, k, others)
    bank_DN = torch.nn.functional.normalize(bank_ND.double(), dim=1).T
    rows = max(1, VALUES_AT_ONCE // bank_DN.shape[1])
    for start in range(0, len(queries_QD), rows):
        queries = torch.nn.functional.normalize(queries_QD[start : start + rows].double(), dim=1)
        similar_QN = (queries @ bank_DN).round_(decimals=DIGITS)
        if others:
            own = torch.arange(len(queries), device=similar_QN.device)
            similar_QN[own, own + start] = -torch.inf
        yield _largest(similar_QN, k)
        tell(start + len(queries))


def _largest(similar_QN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, the lower number first among equals (`topk` promises no order there)."""
    last_Q1 = similar_QN.topk(k, dim=1).values[:, -1:]
    above_QN = similar_QN > last_Q1
    equal_QN = similar_QN == last_Q1
    wanted_Q1 = k - above_QN.sum(1, keepdim=True)
    taken_QN = above_QN | (equal_QN & (equal_QN.cumsum(1) <= wanted_Q1))
    numbers_QK = taken_QN.nonzero()[:, 1].view(len(similar_QN), k)  # ascending in each row
    values_QK, order_QK = similar_QN.gather(1, numbers_QK).sort(dim=1, descending=True, stable=True)
    return values_QK, numbers_QK.gather(1, order_QK)


def vote(similar_QK: Tensor, labels_QK: Tensor, temperature: float | None = None) -> Tensor:
    """The label with most votes of each row's neighbours, the nearest first."""
    rows = max(1, VALUES_AT_ONCE // similar_QK.shape[1] ** 2)
    if len(similar_QK) > rows:
        pairs = zip(similar_QK.split(rows), labels_QK.split(rows), strict=True)
        return torch.cat([vote(*pair, temperature) for pair in pairs])
    weights_QK = torch.ones_like(similar_QK) if temperature is None else (similar_QK / temperature).exp()
    same_QKK = labels_QK[:, :, None] == labels_QK[:, None, :]
    votes_QK = (same_QKK * weights_QK[:, None, :]).sum(2)  # of each neighbour's own label
    best_QK = votes_QK == votes_QK.amax(1, keepdim=True)
    first_Q1 = best_QK.int().argmax(1, keepdim=True)  # argmax gives the first of equals
    return labels_QK.gather(1, first_Q1)[:, 0]


def as_numbers(labels: Labels) -> Tensor:
    """Labels as int64 numbers: tensors as they are, words by their first appearance."""
    if isinstance(labels, Tensor):
        return labels.long()
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(label, len(known)) for label in labels], dtype=torch.long)


def _check(queries_QD: Tensor, bank_ND: Tensor, k: int, others: bool) -> None:
    if queries_QD.ndim != 2 or bank_ND.ndim != 2 or queries_QD.shape[1] != bank_ND.shape[1]:
        raise UserError(
            f"neighbours: vectors of one length are compared, not {tuple(queries_QD.shape)} "
            f"with {tuple(bank_ND.shape)}"
        )
    most = len(bank_ND) - others
    if not 1 <= k <= most:
        raise UserError(f"neighbours: k {k} is not from 1 to {most}, the number of vectors to choose from")
    for vectors in (queries_QD, bank_ND):
        if not bool(torch.isfinite(vectors).all()):
            raise UserError("neighbours: some features are not finite: the model that made them is damaged")
