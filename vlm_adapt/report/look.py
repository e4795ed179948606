"""How long shards are for a run: sizes of images, tokens of texts and images, and what padding would waste.

Knows encoded rows and the ways of batching; knows nothing about drawing (look_chart.py) or wording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm_adapt.data.images import image_size
from vlm_adapt.data.lanes import shuffled
from vlm_adapt.data.pack import AHEAD, fill
from vlm_adapt.data.problems import Account
from vlm_adapt.data.rows import BATCHES_AT_ONCE
from vlm_adapt.report.feed import Feed, described

PACKED_ROWS = 300  # rows after which a packed share no longer moves


@dataclass
class Look:
    """Figures of some samples, as the run's first epoch would read them.

    Attributes:
        samples: tokens of each text (images included), for each sample.
        text, images, learned: tokens of each text that are words, that are images', and that are learned.
        sizes: (width, height) of each image file.
        useful: share of a batch's positions that are no padding, by the way of batching.
    """

    samples: list[list[int]] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    account: Account = field(default_factory=Account)
    useful: dict[str, float] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every text."""
        return [length for texts in self.samples for length in texts]


def look(feed: Feed, count: int = 2000, seed: int = 0, tick: Callable[[int], None] | None = None) -> Look:
    """Encode `count` samples, drawn by `seed`, and estimate what each way of batching makes of them.

    Args:
        tick: called with the number of samples encoded so far.
    """
    reader, found = feed.reader, Look()
    for done, number in enumerate(shuffled(len(reader), seed, "look")[:count].tolist(), 1):
        rows = reader.training(number, 0, number, found.account)
        if rows:
            found.samples.append([len(row) for row in rows])
            found.images += [sum(row.image_lengths) for row in rows]
            found.text += [len(row) - sum(row.image_lengths) for row in rows]
            found.learned += [len(row.targets) for row in rows]
            sample, _ = reader.sample(number)
            found.sizes += [image_size(data, reader.max_pixels) for data in sample.images]
        if tick:
            tick(done)
    if found.samples:
        size, accumulation = (
            feed.run.train.per_device_train_batch_size,
            feed.run.train.gradient_accumulation_steps,
        )
        found.useful["padded"] = padded_share(found.samples, size)
        found.useful["bucketed"] = padded_share(bucketed(found.samples, size * accumulation), size)
        if not feed.assembled.encoder.seq2seq:  # whose rows hold one text each
            found.useful["packed"] = packed_share(found.lengths, row_length(feed), seed)
    return found


def tower_size(feed: Feed) -> tuple[int, int] | None:
    """(height, width) of every image for the tower; None where images keep their own aspect."""
    spec = feed.reader.image_spec
    return None if spec.native is not None else spec.size


def row_length(feed: Feed) -> int:
    """Tokens of a packed row of this run."""
    return feed.run.data.row_length or feed.run.language_model.language.max_length


def padded_share(samples: Sequence[Sequence[int]], size: int) -> float:
    """Useful share of batches of `size` samples in this order, each text a row as long as the longest."""
    useful = positions = 0
    for first in range(0, len(samples), size):
        rows = [length for texts in samples[first : first + size] for length in texts]
        useful += sum(rows)
        positions += max(rows) * len(rows)
    return useful / positions


def bucketed(samples: Sequence[Sequence[int]], size: int) -> list[Sequence[int]]:
    """Samples sorted by length within windows of some batches of `size`, as bucketing sorts them."""
    window = BATCHES_AT_ONCE * size
    return [
        texts
        for first in range(0, len(samples), window)
        for texts in sorted(samples[first : first + window], key=max)
    ]


def packed_share(lengths: Sequence[int], room: int, seed: int = 0) -> float:
    """Useful share of rows of `room` tokens that one lane fills, epoch after epoch of these texts."""
    endless = _epochs(lengths, seed)
    pending: list[int] = []
    used = 0
    for _ in range(PACKED_ROWS):
        while len(pending) < AHEAD or sum(pending) < 2 * room:
            pending.append(min(next(endless), room))
        chosen = set(fill(pending, room))
        used += sum(pending[place] for place in chosen)
        pending = [length for place, length in enumerate(pending) if place not in chosen]
    return used / (room * PACKED_ROWS)


def _epochs(lengths: Sequence[int], seed: int) -> Iterator[int]:
    generator = np.random.default_rng(seed)
    while True:
        yield from (lengths[place] for place in generator.permutation(len(lengths)))


def lines(feed: Feed, found: Look) -> list[tuple[str, str]]:
    """The figures as (name, text), for a terminal."""
    encoder, run = feed.assembled.encoder, feed.run
    most = run.language_model.language.max_length
    size = run.train.per_device_train_batch_size
    rows = [("read as", f"{described(feed)}; batches of {size}, at most {most:,} tokens")]
    for name, values in (("text", found.text), ("image", found.images), ("learned", found.learned)):
        rows.append((f"{name} tokens", spread(values)))
    if found.sizes:
        spec = feed.reader.image_spec
        to = f"{spec.size[1]} x {spec.size[0]}, {encoder.tokens_per_image} tokens each ({spec.resize})"
        to = "grids of their own aspect" if tower_size(feed) is None else to
        rows.append(("images become", to))
    account = found.account
    rows.append(
        ("looked at", f"{account.read:,} samples: {account.used:,} used, {account.truncated:,} truncated")
    )
    for name, share in found.useful.items():
        how = {
            "padded": f"batches of {size}",
            "bucketed": f"sorted within {BATCHES_AT_ONCE} global batches",
            "packed": f"rows of {row_length(feed)}",
        }[name]
        own = ", as this run does" if name == run.data.batching else ""
        rows.append((name, f"{share:.1%} of positions useful, {1 - share:.1%} padding ({how}{own})"))
    if "packed" in found.useful:
        saved = 1 - found.useful["padded"] / found.useful["packed"]
        text = f"{saved:.1%} of the positions of padded batches" if saved > 0 else "nothing"
        rows.append(("packing saves", text))
    return rows


def spread(values: Sequence[int]) -> str:
    """Least, median, 95 %, greatest and mean."""
    if not len(values):
        return "none"
    low, middle, high, top = np.percentile(values, [0, 50, 95, 100], method="nearest").tolist()
    return f"min {low:,}  median {middle:,}  p95 {high:,}  max {top:,}  mean {np.mean(values):,.1f}"
