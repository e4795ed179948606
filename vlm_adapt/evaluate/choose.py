"""Which of several checkpoints to begin from: the one whose eyes tell the new task's labels apart best.

Expert transfer: leave-one-out nearest neighbours over frozen features rank experts without training any of
them (Puigcerver et al. 2020, arXiv 2009.13239; Mustafa et al. 2020, arXiv 2010.06866). Knows checkpoints and
their pooled vision features (features.py), and the accuracy (neighbours.py); knows nothing about what was
adapted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.features import Label, open_pooled
from vlm_adapt.evaluate.neighbours import leave_one_out
from vlm_adapt.models.restore import find_checkpoint

Counting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@dataclass(frozen=True)
class Ranked:
    """A checkpoint and how well its features tell labels apart.

    Attributes:
        accuracy: of the nearest other images, 0 to 1.
        images, classes: that there were.
        refused: samples without image or label, by reason.
    """

    checkpoint: str
    accuracy: float
    images: int
    classes: int
    refused: dict[str, Any]


@contextmanager
def _silent(what: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def choose(
    checkpoints: Sequence[str | Path],
    shards: Sequence[str],
    label: str,
    k: int = 1,
    limit: int | None = None,
    batch_size: int = 32,
    counting: Counting = _silent,
) -> list[Ranked]:
    """Rank checkpoints for a new task, the best first; of equals the first given.

    Args:
        shards: images of the new task.
        label: the field of their records that is to be told apart; `labels.0` reaches inside.
        k: neighbours that vote.
        limit: only so many samples, spread evenly.
        counting: `counting(what, samples)` opens a progress display, which is told how many are done.

    Raises:
        UserError: no checkpoint, no shards, no sample with image and label, or one class alone.
    """
    folders = [find_checkpoint(path) for path in checkpoints]
    if not folders:
        raise UserError("choose needs checkpoints: checkpoint folders, adapters, or output folders of runs")
    there = ShardSet(tuple(shards))
    ranked = []
    for number, folder in enumerate(folders):
        pooled, _ = open_pooled(folder)
        with counting(f"{number + 1} of {len(folders)}", min(len(there), limit or len(there))) as tell:
            found = pooled.of(there, Label(path=label), batch_size, limit, tell=tell)
        classes = len(set(found.labels))
        if classes < 2:
            raise UserError(
                f"every sample's '{label}' is '{found.labels[0]}': nothing can be told apart; name another "
                "field"
            )
        vectors_ND = found.vectors[pooled.names[-1]]
        accuracy = leave_one_out(vectors_ND, found.labels, k)
        refused = found.account.to_dict()["refused"]
        ranked.append(Ranked(str(folder), accuracy, len(vectors_ND), classes, refused))
    return sorted(ranked, key=lambda one: -one.accuracy)
