"""Scores of a segmenter on held-out images: the confusion of all pixels, and the loss.

Knows how samples are shared out and segmented; what is read off the counts is segment_scores.py's, windows
and scales are models/dense_inference.py's. Knows nothing about training.

Every image is segmented at its full size among the labels of its own set; counts are summed over all images
of a label set, over all ranks, before anything is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from vlm_adapt import dist
from vlm_adapt.config.schema import Data, Evaluate
from vlm_adapt.data.mask_reader import MaskReader, WholeMask
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.pace import Paced
from vlm_adapt.evaluate.scores import spread
from vlm_adapt.evaluate.segment_scores import SegmentScores, gathered, handicaps, scores_of
from vlm_adapt.metrics.segment import Confusion, NamedConfusion
from vlm_adapt.models.assembled import AssembledModel
from vlm_adapt.models.dense_inference import DenseInference

SHOWN = 6  # images of a label set that are drawn beside their masks


def evaluate(
    assembled: AssembledModel,
    data: Data,
    settings: Evaluate,
    limit: int | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    device: torch.device | None = None,
    synced: bool = False,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> SegmentScores:
    """Score a segmenter on `data.evaluate`.

    Args:
        limit: only so many samples, spread evenly over the sources; the metrics name both numbers.
        autocast: context of the forward passes.
        synced: every rank makes as many passes as the busiest (for collectives inside the model).
        tell: called with batches done and in all.

    Raises:
        UserError: nothing is held out, no sample could be used, an unseen label is none of theirs, or blind
            scores are asked for, which are of answers in words.
    """
    if settings.blind:
        raise UserError("blind scores are of answers in words, and a segmenter gives masks: leave it out")
    if not data.evaluate:
        raise UserError("there is nothing to evaluate on: give data.evaluate shards")
    # The loss is of images that are brought to the tower's size as they are, whatever training does to them.
    reader: MaskReader = assembled.reader(data.evaluate, seed, data.model_copy(update={"augment": None}))
    count = len(reader)
    chosen = spread(count, limit)
    runner = _Runner(assembled, reader, settings, autocast, device or torch.device("cpu"), synced, tell)
    assembled.model.eval()
    runner.run(chosen[dist.rank() :: dist.world_size()], len(chosen))
    account = Account()
    for part in dist.gather(runner.account.to_dict()):
        account.merge(Account.from_dict(part))
    confusions = gathered(runner.confusions, reader.names)
    if not confusions:
        raise UserError(f"none of {len(chosen)} held-out samples could be used: {account.named()}")
    rows = sorted((row for part in dist.gather(runner.rows) for row in part), key=lambda row: row["number"])
    loss, pixels = dist.total([runner.loss, runner.pixels])
    scores = scores_of(confusions, settings.unseen, loss / pixels if pixels else None, rows)
    scores.shown = runner.shown
    scores.metrics |= {"samples": len(chosen), "samples_available": count}
    scores.metrics |= {"samples_in_shards": sum(map(len, reader.sets)), "account": account.to_dict()}
    return scores


class _Runner:
    """The images of one rank."""

    def __init__(
        self,
        assembled: AssembledModel,
        reader: MaskReader,
        settings: Evaluate,
        autocast: Callable[[], AbstractContextManager[None]],
        device: torch.device,
        synced: bool,
        tell: Callable[[int, int], None],
    ):
        self.assembled, self.reader, self.settings = assembled, reader, settings
        self.autocast, self.device, self.synced, self.tell = autocast, device, synced, tell
        self.paced = Paced(assembled.model, device) if synced else None
        self.inference = DenseInference(
            self.paced or assembled.model,
            window=settings.window,
            scales=settings.scales,
            flip=settings.flip,
            base_size=settings.base_size,
        )
        self.account = Account()
        self.account.lose_all(reader.problems if dist.is_main() else [])
        self.confusions: dict[str, NamedConfusion] = {}
        self.rows: list[dict[str, Any]] = []
        self.shown: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
        self.loss, self.pixels = 0.0, 0

    def run(self, numbers: list[int], of_all: int) -> None:
        """Segment these samples; ranks that have fewer run along if synced."""
        size = self.settings.batch_size
        longest = math.ceil(of_all / dist.world_size())
        batches = math.ceil((longest if self.synced else len(numbers)) / size)
        for batch in range(batches):
            part = numbers[batch * size : (batch + 1) * size]
            if self.settings.loss:
                self._losses(part)
            for number, whole in self._read(part):
                self._segment(number, whole)
            if self.paced:
                with self.autocast(), torch.no_grad():
                    self.paced.finish()
            self.tell(batch + 1, batches)

    def _read(self, numbers: list[int]) -> Iterator[tuple[int, WholeMask]]:
        for number in numbers:
            name = self.reader.source_of(number)
            try:
                whole = self.reader.whole(number)
            except BadSample as error:
                self.account.refuse(self.reader.key(number), error, name)
                continue
            self.account.use(False, name, int(np.count_nonzero(whole.mask_HW >= 0)))
            yield number, whole

    def _segment(self, number: int, whole: WholeMask) -> None:
        with self.autocast():
            handicap = handicaps(whole.labels, self.settings.unseen, self.settings.handicap)
            classes_HW, _ = self.inference.classes(whole.pixels_HWC, whole.labels, handicap)
        name = self.reader.source_of(number)
        self.confusions.setdefault(name, NamedConfusion()).add(classes_HW, whole.mask_HW, whole.labels)
        if dist.is_main() and len(kept := self.shown.setdefault(tuple(whole.labels), [])) < SHOWN:
            kept.append((whole.pixels_HWC, whole.mask_HW, classes_HW, whole.key))
        one = Confusion(len(whole.labels))
        one.add(classes_HW, whole.mask_HW)
        figures = {"miou": one.miou(), "pixel_accuracy": one.pixel_accuracy()}
        self.rows.append({"number": number, "key": whole.key, "source": name} | figures)

    def _losses(self, numbers: list[int]) -> None:
        rows = []
        for number in numbers:
            try:
                rows.append(self.reader.row(number, 0, 0))
            except BadSample:
                continue  # counted where it is segmented, or too little is labelled at this size for a loss
        if not rows and not self.synced:
            return
        batch = self.assembled.collate(rows, **self.assembled.collate_options).to(self.device)
        with torch.no_grad(), self.autocast():
            if self.paced:
                self.paced.know([name for labels in batch.labels for name in labels])
            _, losses_V = self.assembled.model(batch)  # the sum holds penalties too
        self.loss += float(losses_V.double().sum())
        self.pixels += len(losses_V)
