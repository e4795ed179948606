"""Samples by number over all sources: which there are, where each lies, and its checked members.

Knows shards, selections and keys; knows nothing about text, pixels' sizes for a tower, or what is learned.
Readers of text (`reader.py`) and of masks (`mask_reader.py`) build on it. Picklable, so that worker
processes can carry it.
"""

from __future__ import annotations

import copy
import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from vlm_adapt.config.schema import Data, Source
from vlm_adapt.data.masks import check_mask
from vlm_adapt.data.problems import BadSample, Problem, source_names
from vlm_adapt.data.sample import Sample, parse_sample
from vlm_adapt.data.select import selection
from vlm_adapt.data.shards import SampleRef, ShardSet
from vlm_adapt.data.sizes import seen_size
from vlm_adapt.data.storage import is_local
from vlm_adapt.errors import UserError

Self = TypeVar("Self", bound="Samples")


class Samples:
    """The samples of a configuration's sources, numbered through those that were chosen.

    Args:
        sources: the configuration's sources.
        seed: of whatever a reader draws.
        data: limits of images, and where remote shards are kept.
    """

    def __init__(self, sources: Sequence[Source], seed: int = 0, data: Data | None = None):
        data = data or Data()
        self.seed, self.max_pixels = seed, data.max_pixels
        cache, limit = data.cache_dir, round(data.cache_gb * 1e9)
        self.sets = [ShardSet(source.shards, cache, limit) for source in sources]
        self.names = source_names(sources)
        self.selections = [selection(source, one) for source, one in zip(sources, self.sets, strict=True)]
        self.chosen = [
            (range(len(one)) if kept is None else kept.kept)[: source.limit]
            for source, one, kept in zip(sources, self.sets, self.selections, strict=True)
        ]
        self.starts = [0, *accumulate(map(len, self.chosen))]

    def __len__(self) -> int:
        """Samples of all sources: those that their settings leave in."""
        return self.starts[-1]

    @property
    def problems(self) -> list[Problem]:
        """What the shards' indexes found wrong."""
        return [problem for one in self.sets for problem in one.problems]

    @property
    def remote(self) -> bool:
        """Whether some shards are not local files."""
        return not all(is_local(index.path) for one in self.sets for index in one.indexes)

    def counts(self, source: int) -> tuple[int, ...]:
        """Samples of each shard of a source, as far as its settings leave them in."""
        ends = [0, *accumulate(self.sets[source].counts)]
        chosen = self.chosen[source]
        if isinstance(chosen, range):
            places = [min(end, len(chosen)) for end in ends]
        else:
            places = np.searchsorted(chosen, ends).tolist()
        return tuple(high - low for low, high in zip(places[:-1], places[1:], strict=True))

    def mark(self, source: int) -> str:
        """16 letters that differ when a source's samples would: their keys, and which of them are in."""
        digest = hashlib.blake2b(digest_size=8)
        for index in self.sets[source].indexes:
            digest.update(index.key_text)
        chosen = self.chosen[source]
        digest.update(repr(chosen).encode() if isinstance(chosen, range) else chosen.tobytes())
        return digest.hexdigest()

    def locate(self, number: int) -> tuple[int, int]:
        """(source, number of the sample in that source's shards)."""
        source = bisect_right(self.starts, number) - 1
        return source, int(self.chosen[source][number - self.starts[source]])

    def raw(self, number: int) -> Sample:
        """The sample as it lies in its shard; masks have the size of the first image.

        Raises:
            BadSample: its bytes or record cannot be used.
        """
        source, local = self.locate(number)
        sample = parse_sample(*self.sets[source].read(local))
        masks = [mask for mask in (sample.mask, *sample.masks.values()) if mask is not None]
        if masks and sample.images:
            size = seen_size(sample.images[0], self.max_pixels)
            for mask in masks:
                check_mask(mask, size)
        return sample

    def key(self, number: int) -> str:
        """The key of a sample, without reading it."""
        return self._ref(number).key

    def place(self, number: int) -> str:
        """A sample in words: its key and shard."""
        ref = self._ref(number)
        return f"'{ref.key}' of {ref.shard}"

    def source_of(self, number: int) -> str:
        """The name of a sample's source."""
        return self.names[self.locate(number)[0]]

    def _ref(self, number: int) -> SampleRef:
        source, local = self.locate(number)
        return self.sets[source].ref(local)

    def twin(self: Self) -> Self:
        """The same samples for another thread."""
        return copy.copy(self)


def clear(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call something that blames the user for a bad sample; the sample is refused, the run goes on."""
    try:
        return call(*arguments, **named)
    except UserError as error:
        raise BadSample("messages or images do not fit together", str(error)) from error


def generator_of(*words: int) -> np.random.Generator:
    """Draws that depend on these numbers alone: a seed, an epoch, a position, and what they are for."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
