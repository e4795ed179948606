"""Frozen features: neighbours against brute force, the linear probe, and the verb `probe`."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tiny import sentence

from vlm_adapt.errors import UserError
from vlm_adapt.evaluate import neighbours


def brute_force(features_ND: torch.Tensor, labels: list[str], k: int) -> float:
    """Leave-one-out in plain Python: each pair's cosine, a stable sort, a count."""
    rows = features_ND.double().tolist()

    def cosine(a: list[float], b: list[float]) -> float:
        length = (sum(x * x for x in a) * sum(x * x for x in b)) ** 0.5
        return round(sum(x * y for x, y in zip(a, b, strict=True)) / length, 10) if length else 0.0

    right = 0
    for i, row in enumerate(rows):
        others = sorted((-cosine(row, other), j) for j, other in enumerate(rows) if j != i)[:k]
        votes = Counter(labels[j] for _, j in others)
        best = max(votes.values())
        chosen = next(labels[j] for _, j in others if votes[labels[j]] == best)
        right += chosen == labels[i]
    return right / len(rows)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_leave_one_out_is_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "VALUES_AT_ONCE", 150)  # several rows at a time, none of them all
    generator = torch.Generator().manual_seed(k)
    labels = [f"class {int(c)}" for c in torch.randint(4, (60,), generator=generator)]
    features = 0.5 * torch.randn(60, 5, generator=generator)
    features += torch.tensor([[float(label[-1]) == d for d in range(5)] for label in labels]).float()
    found = neighbours.leave_one_out(features, labels, k)
    assert found == brute_force(features, labels, k)
    assert 0.5 < found < 1


@pytest.mark.parametrize("k", [1, 2, 5])
def test_ties_go_to_the_lower_number(k: int) -> None:
    # Few different vectors, scaled: most neighbours are equally near.
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-1, 2, (40, 2), generator=generator).float()
    features *= torch.tensor([1.0, 3.0, 0.1, 7.0]).repeat(10)[:, None]
    labels = [str(int(c)) for c in torch.randint(3, (40,), generator=generator)]
    assert neighbours.leave_one_out(features, labels, k) == brute_force(features, labels, k)


def test_votes_weighted_like_dino() -> None:
    similar = torch.tensor([[0.9, 0.5, 0.5]]).double()
    labels = torch.tensor([[0, 1, 1]])
    assert neighbours.vote(similar, labels).tolist() == [1]
    # exp(0.9 / 0.07) is 300 times exp(0.5 / 0.07), and there are two of these
    assert neighbours.vote(similar, labels, 0.07).tolist() == [0]
    assert neighbours.vote(similar, torch.tensor([[2, 1, 0]])).tolist() == [2]  # a tie: the nearest


@pytest.mark.parametrize(
    ("features", "labels", "k", "said"),
    [
        (torch.ones(3, 2), [0, 1, 1], 3, "k 3 is not from 1 to 2"),
        (torch.ones(3, 2), [0, 1, 1], 0, "k 0 is not from 1"),
        (torch.full((3, 2), torch.nan), [0, 1, 1], 1, "not finite"),
        (torch.ones(3, 2), [0, 1], 1, "3 vectors and 2 labels"),
    ],
)
def test_neighbours_refuse(features: torch.Tensor, labels: list[int], k: int, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        neighbours.leave_one_out(features, labels, k)
    sentence(caught)
