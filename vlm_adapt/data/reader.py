"""One sample of the stream made ready: read, decoded, phrased and encoded, or refused with a reason.

Knows shards, phrasing and encoding; knows nothing about ranks, batches or the order of samples.
Picklable, so that worker processes can carry it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from vlm_adapt.config.schema import Data, Source
from vlm_adapt.data.encode import Encoded, Encoder
from vlm_adapt.data.images import load_image
from vlm_adapt.data.phrase import Asked, Phrasing, questions_of
from vlm_adapt.data.problems import Account, BadSample, Problem
from vlm_adapt.data.sample import Sample, parse_sample
from vlm_adapt.data.shards import ShardSet
from vlm_adapt.errors import UserError
from vlm_adapt.image_spec import ImageSpec
from vlm_adapt.sentence import Sentence
from vlm_adapt.template import Template


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt and what it is scored against."""

    row: Encoded
    asked: Asked
    key: str


class Reader:
    """Samples by number over all sources.

    Args:
        sources: the configuration's sources.
        encoder, template, system: how text becomes ids.
        image_spec: how images are resized.
        seed: of the draws among captions and questions.
        max_pixels: larger images are refused.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: Encoder,
        template: Template,
        system: str | None,
        image_spec: ImageSpec,
        seed: int = 0,
        max_pixels: int = Data().max_pixels,
    ):
        self.encoder, self.image_spec, self.seed, self.max_pixels = encoder, image_spec, seed, max_pixels
        self.sets = [ShardSet(source.shards) for source in sources]
        branches = template.prompt_is_causal and not encoder.seq2seq
        self.phrasings = [
            Phrasing(
                template,
                system,
                source.prompt,
                source.questions_per_image,
                source.questions_per_kind,
                branches,
            )
            for source in sources
        ]
        self.limits = [
            min(len(one), source.limit or len(one)) for one, source in zip(self.sets, sources, strict=True)
        ]
        self.starts = [0, *accumulate(self.limits)]  # samples are numbered within the limits

    def __len__(self) -> int:
        """Samples of all sources, within their limits."""
        return self.starts[-1]

    @property
    def problems(self) -> list[Problem]:
        """What the shards' indexes found wrong."""
        return [problem for one in self.sets for problem in one.problems]

    def counts(self, source: int) -> tuple[int, ...]:
        """Samples of each shard of a source; its limit keeps the first ones."""
        ends = accumulate(self.sets[source].counts)
        limit = self.limits[source]
        return tuple(
            max(0, count - max(0, end - limit))
            for end, count in zip(ends, self.sets[source].counts, strict=True)
        )

    def sample(self, number: int) -> tuple[Sample, Phrasing]:
        """The sample and its source's phrasing.

        Raises:
            BadSample: its bytes or record cannot be used.
        """
        source = next(i for i in range(len(self.sets)) if number < self.starts[i + 1])
        key, members = self.sets[source].read(number - self.starts[source])
        return parse_sample(key, members), self.phrasings[source]

    def key(self, number: int) -> str:
        """The key of a sample, without reading it."""
        source = next(i for i in range(len(self.sets)) if number < self.starts[i + 1])
        return self.sets[source].ref(number - self.starts[source]).key

    def training(self, number: int, epoch: int, position: int, account: Account) -> list[Encoded]:
        """Rows to learn from; a refused sample gives none and an entry in the account."""
        try:
            sample, phrasing = self.sample(number)
            generator = _generator(self.seed, epoch, position)
            sentences = _clear(phrasing.training, sample.record, len(sample.images), generator)
            rows = self.rows(sample, sentences)
        except BadSample as error:
            account.refuse(self.key(number), error)
            return []
        account.use(truncated=any(row.cut for row in rows))
        return rows

    def references(self, sample: Sample, phrasing: Phrasing) -> list[Encoded]:
        """Rows that hold every reference of a sample, for its held-out loss."""
        if "messages" in sample.record:
            sentences = phrasing.training(sample.record, len(sample.images), _generator(0, 0, 0))
            return self.rows(sample, sentences)
        questions = questions_of(sample.record, phrasing.prompt)
        captions = "caption" in sample.record or "captions" in sample.record
        pairs = (
            [(phrasing.prompt, caption) for caption in questions[0].answers]
            if captions
            else [(question.text, question.answer) for question in questions]
        )
        everything = {"questions": [{"question": q, "answer": a} for q, a in pairs]}
        whole = replace(phrasing, questions_per_image=None, questions_per_kind=None)
        state = {"state": sample.record["state"]} if "state" in sample.record else {}
        return self.rows(sample, whole.training(everything | state, len(sample.images), _generator(0, 0, 0)))

    def prompts(
        self, sample: Sample, phrasing: Phrasing, images: Sequence[bytes] | None = None
    ) -> list[Prompt]:
        """Every question of a sample, encoded up to where its answer begins.

        Args:
            images: shown in place of the sample's own (for the blind score).
        """
        pixels = self.pixels(sample if images is None else replace(sample, images=list(images)))
        prompts = []
        for asked in _clear(phrasing.evaluation, sample.record, len(sample.images)):
            row = _clear(self.encoder.encode, asked.sentence, len(sample.images), sample.key, learn=False)
            if row.cut:
                raise BadSample("the questions on one image are too long for max_length")
            row.pixels = pixels
            prompts.append(Prompt(row, asked, sample.key))
        return prompts

    def rows(self, sample: Sample, sentences: Sequence[Sentence]) -> list[Encoded]:
        """Encode sentences of a sample and attach its pixels."""
        rows = [_clear(self.encoder.encode, s, len(sample.images), sample.key) for s in sentences]
        pixels = self.pixels(sample)
        for row in rows:
            row.pixels = pixels
        return rows

    def pixels(self, sample: Sample) -> list[np.ndarray]:
        """The sample's images as uint8 [C, H, W], resized for the tower."""
        return [load_image(data, self.image_spec, self.max_pixels) for data in sample.images]


def _clear(call: Any, *arguments: Any, **named: Any) -> Any:
    """Call something that blames the user for a bad sample; the sample is refused, the run goes on."""
    try:
        return call(*arguments, **named)
    except UserError as error:
        reason = "messages or images do not fit together"
        raise BadSample(reason, str(error)) from error


def _generator(*words: int) -> np.random.Generator:
    digest = hashlib.blake2b(repr(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
