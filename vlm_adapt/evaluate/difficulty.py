"""How hard each training sample is for a checkpoint: EL2N and the norm of the last layer's gradient.

Knows how samples are shared out, batched and scored; knows nothing about what is done with the scores
(data/select.py). Paul et al. 2021, "Deep Learning on a Data Diet", arXiv:2107.07075. For a learned token
with probabilities p, target y (one-hot), state h before the head and head W:

    el2n    norm(p - y)
    grand   norm(d loss / d W) = norm(d loss / d logits) * norm(h); with a bias norm(h)^2 + 1 under the root
    loss    cross-entropy

A sample's score is the mean over its learned tokens; over several checkpoints it is the mean of theirs
(the paper takes the mean over starts). Every question and every caption of a sample counts, as in the
held-out loss: nothing is drawn, so the scores depend on the checkpoint and the sample alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_adapt import dist
from vlm_adapt.data.collate import collate
from vlm_adapt.data.encode import Encoded
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.reader import Reader
from vlm_adapt.errors import UserError
from vlm_adapt.language.language import Language
from vlm_adapt.models.build import Assembled

NAMES = ("el2n", "grand", "loss")
VALUES_AT_ONCE = {"cpu": 2**22, "cuda": 2**28}  # logits in float32: 16 MB, 1 GB
SORTED_BATCHES = 4


@torch.no_grad()
def token_scores(language: Language, hidden_ND: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
    """EL2N, last-layer gradient norm and loss of each token, float32 [N].

    Logits are made for a few rows at a time and dropped.

    Args:
        hidden_ND: states that predict the targets. targets_N: token ids.
    """
    vocabulary = language.model.get_output_embeddings().weight.shape[0]
    size = max(1, VALUES_AT_ONCE.get(hidden_ND.device.type, 2**26) // vocabulary)
    parts = [
        _chunk_scores(language, hidden_ND[start : start + size], targets_N[start : start + size])
        for start in range(0, len(targets_N), size)
    ]
    return {
        name: torch.cat([part[name] for part in parts]) if parts else torch.zeros(0, device=hidden_ND.device)
        for name in NAMES
    }


def _chunk_scores(language: Language, hidden_ND: Tensor, targets_N: Tensor) -> dict[str, Tensor]:
    head = language.model.get_output_embeddings()
    seen: dict[str, Tensor] = {}

    def cut(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"], seen["output"] = inputs[0], output.detach().requires_grad_()
        return seen["output"]

    handle = head.register_forward_hook(cut)
    try:
        with torch.enable_grad():  # only from the head's output on: a scale, a soft cap, or nothing
            logits_NV = language.logits(hidden_ND)
    finally:
        handle.remove()
    el2n_N, loss_N = errors(logits_NV.detach(), targets_N)
    slope_N = el2n_N
    if logits_NV is not seen["output"]:
        with torch.enable_grad():
            total = torch.nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
        (slope_NV,) = torch.autograd.grad(total, seen["output"])
        slope_N = torch.linalg.vector_norm(slope_NV.float(), dim=1)
    length_N = torch.linalg.vector_norm(seen["input"].float(), dim=1)
    if getattr(head, "bias", None) is not None:
        length_N = length_N.square().add(1).sqrt()
    return {"el2n": el2n_N, "grand": slope_N * length_N, "loss": loss_N}


def errors(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """norm(softmax(logits) - onehot(target)) and cross-entropy of each row, float32 [N].

    With e = exp(logits - max), s the sum of e without the target's and z that of all, the norm is
    sqrt(s^2 + sum of the others' e^2) / z: no difference of nearly equal numbers, so that a token with
    p = 1 - 1e-9 does not come out as 0.
    """
    top_N1 = logits_NV.amax(1, keepdim=True)
    chosen_N1 = logits_NV.gather(1, targets_N[:, None])
    e_NV = (logits_NV.float() - top_N1.float()).exp_()
    target_N = e_NV.gather(1, targets_N[:, None])[:, 0]
    e_NV.scatter_(1, targets_N[:, None], 0.0)
    others_N = e_NV.sum(1)
    z_N = others_N + target_N
    el2n_N = torch.hypot(others_N, torch.linalg.vector_norm(e_NV, dim=1)) / z_N
    return el2n_N, z_N.log() - (chosen_N1.float() - top_N1.float())[:, 0]


@dataclass
class Scored:
    """What a pass found.

    Attributes:
        reader: of the samples, numbered from 0.
        scores: name -> float64 [samples]; NaN where a sample was refused or not looked at.
        looked_at: numbers of the samples that the pass came to.
    """

    reader: Reader
    scores: dict[str, np.ndarray]
    looked_at: np.ndarray
    account: Account

    @property
    def count(self) -> int:
        """How many samples have scores."""
        return int(np.isfinite(self.scores["tokens"]).sum())

    def summary(self) -> dict[str, str]:
        """Of every score its spread over the samples, in words."""
        lines = {}
        for name, values in self.scores.items():
            low, first, middle, last, high = np.nanquantile(values, [0, 0.1, 0.5, 0.9, 1])
            lines[name] = f"{low:.4g} to {high:.4g}, median {middle:.4g}, 80 % in {first:.4g} to {last:.4g}"
        return lines


def score_samples(
    assembled: Assembled,
    reader: Reader,
    batch_size: int,
    limit: int | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    device: torch.device | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> Scored:
    """Score every sample of a reader; ranks share them, and every rank has all scores in the end.

    Args:
        limit: only so many samples, spread evenly.
        tell: called with how many samples all ranks have about done.

    Raises:
        UserError: no sample could be used.
    """
    numbers = np.arange(len(reader))
    if limit is not None and limit < len(numbers):
        numbers = np.arange(limit) * len(numbers) // limit
    scorer = _Pass(assembled, reader, batch_size, autocast, device or torch.device("cpu"))
    assembled.model.eval()
    rows: list[tuple[int, tuple[float, ...]]] = []
    mine = numbers[dist.rank() :: dist.world_size()].tolist()
    for done, found in scorer.run(mine):
        rows += found
        tell(min(len(numbers), done * dist.world_size()))
    account = Account()
    for part in dist.gather(scorer.account.to_dict()):
        account.merge(Account.from_dict(part))
    columns = {name: np.full(len(reader), np.nan) for name in (*NAMES, "tokens")}
    for part in dist.gather(rows):
        for number, values in part:
            for name, value in zip(columns, values, strict=True):
                columns[name][number] = value
    if not len(numbers) or np.isnan(columns["tokens"]).all():
        why = f": {account.named()}" if account.refusals else ""
        raise UserError(f"none of {len(numbers)} samples could be scored{why}")
    return Scored(reader, columns, numbers, account)


@dataclass
class _Item:
    number: int
    rows: list[Encoded]
    error: BadSample | None = None


@dataclass
class _Pass:
    """Batches of one rank."""

    assembled: Assembled
    reader: Reader
    batch_size: int
    autocast: Callable[[], AbstractContextManager[None]]
    device: torch.device
    account: Account = field(default_factory=Account)
    stopped: bool = False

    def run(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, tuple[float, ...]]]]]:
        """(samples done, the rows of scores of the next ones), batch by batch."""
        done = 0
        for items in self._several(numbers):
            good = [item for item in items if item.error is None]
            for item in items:
                if item.error is not None:
                    self.account.refuse(self.reader.key(item.number), item.error)
                else:
                    self.account.use(truncated=any(row.cut for row in item.rows))
            done += len(items) - len(good)
            # Like lengths together: less padding.
            good.sort(key=lambda item: (max(map(len, item.rows)), item.number))
            for start in range(0, len(good), self.batch_size):
                batch = good[start : start + self.batch_size]
                done += len(batch)
                yield done, self._score(batch)

    def _several(self, numbers: Sequence[int]) -> Iterator[list[_Item]]:
        """A few batches of samples at a time; the next ones are decoded while these are scored."""
        size = SORTED_BATCHES * self.batch_size
        parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        # One thread: a tokenizer must not be used by two at once.
        pool = ThreadPoolExecutor(1)
        try:
            coming = [pool.submit(self._read, part) for part in parts[:1]]
            for after in range(1, len(parts) + 1):
                items = coming.pop().result()
                coming += [pool.submit(self._read, part) for part in parts[after : after + 1]]
                yield items
        finally:
            self.stopped = True  # Ctrl-C need not wait for images that nobody will see
            pool.shutdown(cancel_futures=True)

    def _read(self, numbers: Sequence[int]) -> list[_Item]:
        items = []
        for number in numbers:
            if self.stopped:
                break
            try:
                sample, phrasing = self.reader.sample(number)
                items.append(_Item(number, self.reader.references(sample, phrasing)))
            except BadSample as error:
                items.append(_Item(number, [], error))
        return items

    @torch.no_grad()
    def _score(self, items: Sequence[_Item]) -> list[tuple[int, tuple[float, ...]]]:
        rows = [row for item in items for row in item.rows]
        owners = np.array([place for place, item in enumerate(items) for _ in item.rows])
        batch = collate(rows, **self.assembled.collate_options).to(self.device)
        model = self.assembled.model
        with self.autocast():
            hidden_BTD = model.language.hidden(model.inputs(batch))
            picked_ND = hidden_BTD.flatten(0, 1)[batch.predict_from_N]
            found = token_scores(model.language, picked_ND, batch.targets_N)
        owner_N = owners[(batch.predict_from_N // hidden_BTD.shape[1]).cpu().numpy()]
        tokens = np.bincount(owner_N, minlength=len(items))
        means = mean_by(owner_N, tokens, found)
        return [
            (item.number, (*(float(means[name][place]) for name in NAMES), float(tokens[place])))
            for place, item in enumerate(items)
        ]


def mean_by(owner_N: np.ndarray, counts: np.ndarray, found: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The mean of each owner's tokens, float64 [owners]."""
    return {
        name: np.bincount(owner_N, values.double().cpu().numpy(), len(counts)) / counts
        for name, values in found.items()
    }
