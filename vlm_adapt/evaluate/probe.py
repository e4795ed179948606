"""What frozen features know without fine-tuning: nearest neighbours, a linear probe, retrieval.

Knows vectors and labels; where they come from is in features.py, how neighbours vote in neighbours.py.

    knn        the k nearest vectors vote, weighted by exp(cosine / 0.07) as in DINO
    linear     softmax regression on standardised vectors, D C + C parameters, L-BFGS from zero on all of
               them at once, so that it comes out the same every time
    retrieval  of each test image the others of its label: recall@k (one among the k nearest), and mAP (the
               mean over queries of the mean precision at every image of the label)

    N vectors to learn from, M to test, D channels, C classes
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.features import Features
from vlm_adapt.evaluate.neighbours import TEMPERATURE, nearest, vote

WAYS = ("knn", "linear", "retrieval")
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 5  # every fifth vector chooses the penalty
ITERATIONS = 300


@dataclass
class Numbered:
    """Labels as numbers: those of the vectors learned from come first; -1 is a class that they lack."""

    classes: list[str]
    train_N: Tensor
    test_M: Tensor

    @classmethod
    def of(cls, train: Sequence[str], test: Sequence[str]) -> Numbered:
        """By the order of the alphabet."""
        classes = sorted(set(train))
        known = {name: number for number, name in enumerate(classes)}
        numbers = [torch.tensor([known.get(one, -1) for one in some]) for some in (train, test)]
        return cls(classes, *numbers)


def knn(
    train_ND: Tensor, test_MD: Tensor, labels: Numbered, ks: Sequence[int], alone: bool
) -> dict[int, float]:
    """Accuracy for each k.

    Args:
        alone: the two sets are the same, and no vector is its own neighbour.
    """
    right = dict.fromkeys(ks, 0)
    done = 0
    for similar_QK, found_QK in nearest(test_MD, train_ND, max(ks), alone):
        wanted_Q = labels.test_M[done : done + len(found_QK)]
        for k in ks:
            chosen_Q = vote(similar_QK[:, :k], labels.train_N[found_QK[:, :k]], TEMPERATURE)
            right[k] += int((chosen_Q == wanted_Q).sum())
        done += len(found_QK)
    return {k: count / done for k, count in right.items()}


def retrieval(
    gallery_ND: Tensor, queries_MD: Tensor, labels: Numbered, ks: Sequence[int], alone: bool
) -> dict[str, float]:
    """recall@k and mAP over the queries whose label is in the gallery; `queries` says how many those are."""
    hits, total, done, used = dict.fromkeys(ks, 0), 0.0, 0, 0
    for _, found_QN in nearest(queries_MD, gallery_ND, len(gallery_ND) - alone, alone):
        wanted_Q = labels.test_M[done : done + len(found_QN)]
        same_QN = labels.train_N[found_QN] == wanted_Q[:, None]
        counts_Q = same_QN.sum(1)
        there_Q = counts_Q > 0
        ranks_N = torch.arange(1, same_QN.shape[1] + 1, dtype=torch.float64)
        precision_QN = same_QN.double().cumsum(1) / ranks_N
        total += float(((precision_QN * same_QN).sum(1) / counts_Q.clamp_min(1)).sum())
        for k in ks:
            hits[k] += int(same_QN[:, :k].any(1).sum())
        used += int(there_Q.sum())
        done += len(found_QN)
    if not used:
        raise UserError("retrieval: no image has another one of its label")
    return {f"recall@{k}": count / used for k, count in hits.items()} | {"mAP": total / used, "queries": used}


@dataclass
class Linear:
    """A fitted probe: standardise by mean and deviation, then W x + b."""

    mean_D: Tensor
    deviation_D: Tensor
    weight_CD: Tensor
    bias_C: Tensor

    @property
    def parameters(self) -> int:
        """D C + C."""
        return self.weight_CD.numel() + self.bias_C.numel()

    def __call__(self, features_ND: Tensor) -> Tensor:
        """Logits [N, C]."""
        return functional.linear((features_ND - self.mean_D) / self.deviation_D, self.weight_CD, self.bias_C)


def fit_linear(features_ND: Tensor, labels_N: Tensor, classes: int, penalty: float) -> Linear:
    """Minimise mean cross-entropy + penalty / 2 * |W|^2 by L-BFGS from zero; the bias is not penalised."""
    mean_D, deviation_D = statistics(features_ND)
    made = Linear(mean_D, deviation_D, torch.zeros(classes, features_ND.shape[1]), torch.zeros(classes))
    inputs_ND = (features_ND - mean_D) / deviation_D
    learned = [made.weight_CD.requires_grad_(), made.bias_C.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        learned,
        max_iter=ITERATIONS,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits_NC = functional.linear(inputs_ND, *learned)
        value = functional.cross_entropy(logits_NC, labels_N) + penalty / 2 * learned[0].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    for parameter in learned:
        parameter.requires_grad_(False)
    return made


def statistics(features_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel, float32; the deviation of a constant one is not 0 but 1e-6."""
    deviation_D, mean_D = torch.std_mean(features_ND.double(), dim=0, correction=0)
    return mean_D.float(), deviation_D.clamp_min(1e-6).float()


def choose_penalty(features_ND: Tensor, labels_N: Tensor, classes: int) -> float:
    """The best by accuracy on every fifth vector, learned from the others; of equals the larger."""
    held_N = torch.arange(len(labels_N)) % HELD_OUT == HELD_OUT - 1
    if not held_N.any():
        return PENALTIES[len(PENALTIES) // 2]
    scores = []
    for penalty in PENALTIES:
        made = fit_linear(features_ND[~held_N], labels_N[~held_N], classes, penalty)
        right = made(features_ND[held_N]).argmax(1) == labels_N[held_N]
        scores.append((int(right.sum()), penalty))
    return max(scores)[1]


def probe(
    train: Features | None,
    test: Features,
    ways: Sequence[str],
    ks: Sequence[int],
    penalty: float | None = None,
    standardise: bool = False,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Every way on every vector of the two sets.

    Args:
        train: None for neighbours and retrieval among the test images themselves, each left out in turn.
        ks: neighbours; also the k of recall@k.
        penalty: of the linear probe; None chooses it on a fifth of `train`.
        standardise: neighbours are looked for among vectors whose channels have mean 0 and deviation 1 (over
            those to learn from): else cosines see mostly the channels with the largest values.
        tell: called with how many (vector, way) pairs are done.

    Returns:
        plain values: `classes`, `majority` (share of the test images whose label is the most common one to
        learn from), `unseen` (test images of a class that is not learned from: they count as wrong),
        `results`.

    Raises:
        UserError: too few vectors or classes.
    """
    alone, bank = train is None, train or test
    labels = Numbered.of(bank.labels, test.labels)
    if len(labels.classes) < 2:
        raise UserError(f"probe: every image has the label '{labels.classes[0]}': nothing can be told apart")
    if alone and "linear" in ways:
        raise UserError("probe: a linear probe learns from other images than it is tested on: give --train")
    most = len(bank.labels) - alone
    if {"knn", "retrieval"} & set(ways) and max(ks) > most:
        raise UserError(f"probe: k {max(ks)} is more than the {most} images to choose from: give smaller --k")
    common = Counter(bank.labels).most_common(1)[0][0]
    results: list[dict[str, Any]] = []
    done = 0
    for name, test_MD in test.vectors.items():
        bank_ND = bank.vectors[name]
        if standardise:
            mean_D, deviation_D = statistics(bank_ND)
            bank_ND, test_MD = ((some - mean_D) / deviation_D for some in (bank_ND, test_MD))
        about = {"features": name, "size": bank_ND.shape[1]}
        for way in ways:
            if way == "knn":
                for k, value in knn(bank_ND, test_MD, labels, ks, alone).items():
                    results.append(about | {"by": "knn", "k": k, "accuracy": value})
            elif way == "linear":
                chosen = penalty
                if chosen is None:
                    chosen = choose_penalty(bank_ND, labels.train_N, len(labels.classes))
                made = fit_linear(bank_ND, labels.train_N, len(labels.classes), chosen)
                value = float((made(test_MD).argmax(1) == labels.test_M).double().mean())
                more = {"accuracy": value, "penalty": chosen, "parameters": made.parameters}
                results.append(about | {"by": "linear"} | more)
            else:
                results.append(about | {"by": "retrieval"} | retrieval(bank_ND, test_MD, labels, ks, alone))
            done += 1
            tell(done)
    return {
        "classes": labels.classes,
        "majority": test.labels.count(common) / len(test.labels),
        "unseen": int((labels.test_M < 0).sum()),
        "results": results,
    }
