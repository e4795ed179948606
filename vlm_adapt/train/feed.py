"""What a stage reads: its samples, their order, their rows, and the stream of steps made of them.

Knows how the configuration names these things; knows nothing about optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlm_adapt import dist
from vlm_adapt.config.schema import Run
from vlm_adapt.data.batching import BATCHING
from vlm_adapt.data.lanes import LANES, Plan, Source
from vlm_adapt.data.mix import mixed
from vlm_adapt.data.rows import Rows
from vlm_adapt.data.stream import Shape, Stream
from vlm_adapt.errors import UserError
from vlm_adapt.models.assembled import AssembledModel

SAMPLES_A_LANE = 256  # that packing wants: a lane with fewer than fill a row or two meets them again in it
REMOTE_WINDOW = 4096  # samples of a lane shuffled at a time, where shards are not local files


@dataclass
class Feed:
    """The parts of a stage's stream."""

    reader: Any
    plan: Plan
    rows: Rows[Any]
    stream: Stream[Any]


def build_feed(assembled: AssembledModel, run: Run, stage_run: Run, stage: int) -> Feed:
    """The stream of a stage.

    Raises:
        UserError: there is nothing to read, or rows are shorter than samples may be.
    """
    data, train = stage_run.data, stage_run.train
    reader = assembled.reader(data.train, run.seed, data)
    sources = [
        Source(reader.counts(number), source.weight, mark=reader.mark(number))
        for number, source in enumerate(data.train)
    ]
    if reader.problems and not any(sum(source.counts) for source in sources):
        first = reader.problems[0]
        raise UserError(f"nothing can be read from data.train: {first.shard}: {first.reason}")
    window = data.shuffle_window or (REMOTE_WINDOW if reader.remote else None)
    sources = mixed(sources, data.mixing, data.epoch_ends, data.epoch_samples)
    plan = Plan(
        sources,
        run.seed + stage,
        data.lanes or _lanes(data.batching == "packed", sum(source.shown for source in sources)),
        data.shuffle,
        window,
    )
    shape = Shape(
        train.per_device_train_batch_size, train.gradient_accumulation_steps, dist.rank(), dist.world_size()
    )
    longest, options = assembled.longest, assembled.collate_options
    length = data.row_length or longest
    if longest:
        options = options | {"multiple": 8 if torch.cuda.is_available() else 1}
    elif data.batching != "padded":
        raise UserError(f"data.batching '{data.batching}' is for texts: models of masks take 'padded'")
    if data.batching == "packed":
        if length < longest:
            raise UserError(
                f"data.row_length {length} is less than model.language.max_length {longest}: a sample of "
                "that length would fit no row"
            )
        if options.get("seq2seq"):
            raise UserError(
                "data.batching 'packed' is for causal languages: an encoder-decoder takes 'bucketed', which "
                "puts samples of like length together"
            )
        options["length"] = length
    # Texts are measured in a thread beside training, which may tokenize for an evaluation.
    measure = (reader.twin() if data.workers else reader).measure
    rows = BATCHING.load(data.batching)(plan, measure, length, shape.global_batch)
    return Feed(reader, plan, rows, Stream(reader, rows, shape, options, data.workers, assembled.collate))


def _lanes(packed: bool, samples: int) -> int:
    """How many lanes an order has, when nobody says."""
    return min(LANES, max(1, samples // SAMPLES_A_LANE)) if packed else LANES
