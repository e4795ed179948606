"""Held-out loss and scores of generated text, with the sample's own image and, on request, blind.

Knows how samples are shared out, batched, asked and scored; knows nothing about training. Blind means:
each sample is shown another sample's image, so everyone sees what the image is worth.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlm_adapt import dist
from vlm_adapt.config.schema import Data, Evaluate
from vlm_adapt.data.collate import collate
from vlm_adapt.data.encode import Encoded
from vlm_adapt.data.problems import Account, BadSample
from vlm_adapt.data.reader import Prompt, Reader
from vlm_adapt.errors import UserError
from vlm_adapt.evaluate.masks import Meant, answer_masks, masks_meant, score
from vlm_adapt.evaluate.scores import Scores, answer_metrics, loss_metrics, spread
from vlm_adapt.language.language import Generation
from vlm_adapt.models.build import Assembled
from vlm_adapt.models.mask_answer import answer
from vlm_adapt.models.objectives.language import language

SORTED_BATCHES = 4


@dataclass
class _Item:
    """A sample to score, encoded once: prompts, references, its own and another's pixels, and its masks."""

    number: int
    key: str
    prompts: list[Prompt]
    references: list[Encoded]
    own: list[Any]
    other: list[Any]
    meant: Meant


def evaluate(
    assembled: Assembled,
    data: Data,
    settings: Evaluate,
    limit: int | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    device: torch.device | None = None,
    synced: bool = False,
    seed: int = 0,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Scores:
    """Score a model on `data.evaluate`.

    Args:
        limit: only so many samples, spread evenly over the sources; the metrics name both numbers.
        autocast: context of the forward passes.
        synced: every rank runs as many batches as the busiest (for collectives inside the model).
        tell: called with batches done and in all.

    Raises:
        UserError: nothing is held out, or no sample could be used.
    """
    if not data.evaluate:
        raise UserError("there is nothing to evaluate on: give data.evaluate shards")
    reader = assembled.reader(data.evaluate, seed, data)
    chosen = spread(len(reader), limit)
    runner = _Runner(assembled, reader, settings, autocast, device or torch.device("cpu"), synced, tell)
    assembled.model.eval()
    rows = runner.run(chosen[dist.rank() :: dist.world_size()], chosen)
    rows = [row for part in dist.gather(rows) for row in part]
    rows.sort(key=lambda row: (row["number"], row["question_number"]))
    account = Account()
    for part in dist.gather(runner.account.to_dict()):
        account.merge(Account.from_dict(part))
    if not rows:
        raise UserError(
            f"none of {len(chosen)} held-out samples could be used: {account.to_dict()['refused']}"
        )
    metrics = answer_metrics(rows, settings) | answer_masks(rows)
    losses = [part for parts in dist.gather(runner.losses) for part in parts]
    metrics |= loss_metrics(losses)
    metrics |= {"samples": len(chosen), "samples_available": len(reader)}
    metrics |= {"samples_in_shards": sum(map(len, reader.sets)), "account": account.to_dict()}
    for row in rows:
        del row["question_number"]
    return Scores(metrics, rows)


class _Runner:
    """Batches of one rank."""

    def __init__(
        self,
        assembled: Assembled,
        reader: Reader,
        settings: Evaluate,
        autocast: Callable[[], AbstractContextManager[None]],
        device: torch.device,
        synced: bool,
        tell: Callable[[int, int], None],
    ):
        self.assembled, self.reader, self.settings = assembled, reader, settings
        self.autocast, self.device, self.synced, self.tell = autocast, device, synced, tell
        self.account = Account()
        self.losses: list[tuple[float, float, int]] = []  # (own, other, tokens) of each sample

    def run(self, mine: Sequence[int], everyone: Sequence[int]) -> list[dict[str, Any]]:
        """Score this rank's samples; a row a question."""
        size = self.settings.batch_size
        total = int(max(dist.gather(-(-len(mine) // size))))
        batches = self._batches(mine, everyone, size)
        rows: list[dict[str, Any]] = []
        for number in range(total):
            items = next(batches, [])  # a rank that is done still runs along, for ZeRO's collectives
            rows += self._answers(items)
            if self.settings.loss:
                self._losses(items)
            self.tell(number + 1, total)
        return rows

    def _batches(self, mine: Sequence[int], everyone: Sequence[int], size: int) -> Iterator[list[_Item]]:
        """Batches of samples of like length, sorted within a few batches: less padding, little memory."""
        for start in range(0, len(mine), SORTED_BATCHES * size):
            items = list(self._items(mine[start : start + SORTED_BATCHES * size], everyone))
            items.sort(key=lambda item: max((len(prompt.row) for prompt in item.prompts), default=0))
            for first in range(0, len(items), size):
                yield items[first : first + size]

    def _items(self, numbers: Sequence[int], everyone: Sequence[int]) -> Iterator[_Item]:
        for number in numbers:
            try:
                sample, phrasing = self.reader.sample(number)
                prompts = self.reader.prompts(sample, phrasing)
                references = self.reader.references(sample, phrasing)
                meant = Meant()
                if self.assembled.masks is not None:
                    meant = masks_meant(sample, prompts, self.reader.max_pixels)
            except BadSample as error:
                self.account.refuse(self.reader.key(number), error)
                continue
            self.account.use(truncated=any(row.cut for row in references))
            own = prompts[0].row.pixels if prompts else []
            other = self._other(number, own, everyone) if self.settings.blind and own else own
            yield _Item(number, sample.key, prompts, references, own, other, meant)

    def _other(self, number: int, own: Sequence[Any], everyone: Sequence[int]) -> list[Any]:
        """Pixels of another sample with as many images as `own`, about half the set away.

        Raises:
            UserError: there is no other sample to take images from.
        """
        place, half = bisect_left(everyone, number), max(1, len(everyone) // 2)
        for distance in range(half, half + len(everyone)):
            candidate = everyone[(place + distance) % len(everyone)]
            if candidate == number:
                continue
            try:
                sample, _ = self.reader.sample(candidate)
                if len(sample.images) == len(own):
                    return self.reader.pixels(sample, like=own)
            except BadSample:
                continue  # when its own turn comes it is counted
        raise UserError(
            f"blind scores need another sample with {len(own)} image(s) besides '{self.reader.key(number)}': "
            "hold out more samples, or leave evaluate.blind off"
        )

    def _answers(self, items: list[_Item]) -> list[dict[str, Any]]:
        own, drawn = self._generate(items, blind=False)
        blind = self._generate(items, blind=True)[0] if self.settings.blind else None
        rows = []
        for place, item in enumerate(items):
            questions = [question for prompt in item.prompts for question in prompt.asked.questions]
            for number, question in enumerate(questions):
                row = {
                    "number": item.number,
                    "question_number": number,
                    "key": item.key,
                    "id": question.id,
                    "question": question.text,
                    "answers": list(question.answers),
                    "prediction": own[place][number],
                    "kind": question.kind,
                }
                row |= score(drawn[place][number], number, item.meant, self.assembled)
                if blind is not None:
                    row["blind_prediction"] = blind[place][number]
                rows.append(row)
        return rows

    def _generate(self, items: list[_Item], blind: bool) -> tuple[list[list[str]], list[list[Any]]]:
        """For every item the answers to its questions and the masks of each, in order."""
        rows = [prompt.row for item in items for prompt in self._show(item, blind).prompts]
        if not rows and not self.synced:
            return [], []
        batch = collate(rows, **self.assembled.collate_options).to(self.device)
        settings = Generation(self.settings.max_new_tokens, synced=self.synced)
        with self.autocast():
            if blind:
                written = self.assembled.model.generate(batch, settings, self.assembled.stop_ids)
                masks: list[list[Any]] = [[] for _ in written]
            else:
                written, masks = answer(self.assembled.model, batch, settings, self.assembled.stop_ids)
        decode = self.assembled.tokenizer.decode
        texts = iter([decode(ids, skip_special_tokens=True).strip() for ids in written])
        counts = [sum(len(prompt.asked.questions) for prompt in item.prompts) for item in items]
        each = iter(masks)
        return [[next(texts) for _ in range(n)] for n in counts], [
            [next(each) for _ in range(n)] for n in counts
        ]

    @staticmethod
    def _show(item: _Item, blind: bool) -> _Item:
        pixels = item.other if blind else item.own
        for row in [*(prompt.row for prompt in item.prompts), *item.references]:
            row.pixels = pixels
        return item

    def _losses(self, items: list[_Item]) -> None:
        own = self._loss(items, blind=False)
        other = self._loss(items, blind=True) if self.settings.blind else [(math.nan, 0)] * len(own)
        self.losses += [(mine, its, count) for (mine, count), (its, _) in zip(own, other, strict=True)]

    def _loss(self, items: list[_Item], blind: bool) -> list[tuple[float, int]]:
        """Sum of token losses and number of learned tokens of each item's references."""
        rows = [row for item in items for row in self._show(item, blind).references]
        owners = np.array([place for place, item in enumerate(items) for _ in item.references])
        if not rows and not self.synced:
            return []
        batch = collate(rows, **self.assembled.collate_options).to(self.device)
        with torch.no_grad(), self.autocast():
            _, losses_N = language(self.assembled.model, batch)
        width = batch.ids_BT.shape[1] if batch.decoder_ids_BU is None else batch.decoder_ids_BU.shape[1]
        places = (batch.predict_from_N // width).cpu().numpy()
        sums, counts = np.zeros(len(items)), np.zeros(len(items), int)
        if len(places):
            np.add.at(sums, owners[places], losses_N.float().cpu().numpy())
            np.add.at(counts, owners[places], 1)
        return list(zip(sums.tolist(), counts.tolist(), strict=True))
