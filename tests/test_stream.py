"""The stream of steps: one order of samples, whoever reads it, and every sample once an epoch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from vlm_adapt.config.load import validate
from vlm_adapt.data.encode import Encoded
from vlm_adapt.data.lanes import LaneCursor, Plan, Source
from vlm_adapt.data.rows import PaddedRows
from vlm_adapt.data.stream import Shape, Stream

OPTIONS = {"image_size": (2, 2), "tokens_per_image": 1}


class Numbers:
    """A reader whose samples are their own numbers; every seventh is refused."""

    def __init__(self, bad: int = 0):
        self.bad = bad

    def place(self, number):
        return str(number)

    def training(self, number, epoch, position, account, texts=None, apart=False):
        if self.bad and number % self.bad == self.bad - 1:
            account.refuse(str(number), "bad")
            return []
        account.use()
        ids = np.array([number, epoch, position])
        none = np.zeros(0, np.int64)
        zeros = np.zeros(3, np.int64)
        states = np.zeros((0, 0), np.float32)
        return [
            Encoded(
                f"{number}", ids, np.arange(1, 4), zeros, np.arange(3), none, none, none, [], none, states
            )
        ]


def told(batch) -> list[tuple[int, int, int]]:
    """(number, epoch, position) of the samples in a batch."""
    return [tuple(row) for row in batch.ids_BT.tolist()] if batch.keys else []


def steps_of(plan, ranks, accumulation, per_device, count, workers=0, cursor=None, bad=0):
    """For each step what each rank read, microbatch by microbatch, and the cursor after it."""
    streams = [
        Stream(Numbers(bad), PaddedRows(plan), Shape(per_device, accumulation, rank, ranks), OPTIONS, workers)
        for rank in range(ranks)
    ]
    parts = [list(stream.steps(cursor or LaneCursor(), count)) for stream in streams]
    for step in zip(*parts, strict=True):
        assert len({part.cursor for part in step}) == 1, "ranks disagree on where they are"
    return parts


def global_batches(parts, accumulation):
    """The samples of every step in the order of the plan: microbatch by microbatch, rank by rank."""
    return [
        [sample for micro in range(accumulation) for part in step for sample in told(part.batches[micro])]
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize(
    ("ranks", "accumulation", "per_device"),
    [(1, 1, 12), (2, 1, 6), (1, 4, 3), (3, 2, 2), (4, 3, 1), (12, 1, 1), (1, 12, 1), (6, 1, 2)],
)
def test_global_batches_are_the_same(ranks, accumulation, per_device):
    plan = Plan([7, 0, 20, 3], seed=5, lanes=4)
    expected = global_batches(steps_of(plan, 1, 1, 12, 9), 1)
    found = global_batches(steps_of(plan, ranks, accumulation, per_device, 9), accumulation)
    assert found == expected
    # 30 samples are 3 steps, the last of 6; each epoch shows every sample once.
    for epoch in range(3):
        shown = sum(found[3 * epoch : 3 * epoch + 3], [])
        assert sorted(number for number, _, _ in shown) == list(range(30))
        assert {e for _, e, _ in shown} == {epoch} and [p for _, _, p in shown] == list(range(30))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    plan = Plan([5, 6], seed=1, lanes=3)
    alone = steps_of(plan, 2, 2, 2, 5)
    helped = steps_of(plan, 2, 2, 2, 5, workers=workers)
    assert global_batches(helped, 2) == global_batches(alone, 2)


def test_more_ranks_and_workers_than_shards_and_samples():
    plan = Plan([3], seed=0)
    parts = steps_of(plan, ranks=8, accumulation=2, per_device=1, count=2, workers=2)
    batches = global_batches(parts, 2)
    assert [sorted(number for number, _, _ in batch) for batch in batches] == [[0, 1, 2]] * 2
    # A rank without samples still has its two batches to run, of one row of padding each.
    assert all(len(step.batches) == 2 for part in parts for step in part)
    assert parts[7][0].batches[1].documents_BT.sum() == 0 and parts[7][0].account.read == 0


def test_any_cursor_goes_on_in_any_shape():
    plan = Plan([Source((9, 8), 1.5), Source((4,), 0.5)], seed=2, lanes=5)
    whole = steps_of(plan, 1, 1, 6, 20)
    cursor, seen = LaneCursor(), []
    for ranks, accumulation, per_device, count in ((2, 1, 3, 3), (1, 3, 2, 4), (6, 1, 1, 5), (3, 2, 1, 8)):
        parts = steps_of(plan, ranks, accumulation, per_device, count, cursor=cursor)
        seen += global_batches(parts, accumulation)
        cursor = plan.resume(json.loads(json.dumps(plan.state(parts[0][-1].cursor))))
    assert seen == global_batches(whole, 1)


def test_what_was_read_ahead_is_read_again():
    """Workers are ahead of training; the cursor of a step is not."""
    plan = Plan([40], seed=3)
    stream = Stream(Numbers(), PaddedRows(plan), Shape(2, 1), OPTIONS, workers=2)
    steps = stream.steps(LaneCursor(), 15)
    first = [next(steps) for _ in range(4)]
    assert first[-1].cursor == LaneCursor(0, 8)
    steps.close()
    again = list(Stream(Numbers(), PaddedRows(plan), Shape(2, 1), OPTIONS).steps(first[-1].cursor, 1))
    assert [position for _, _, position in told(again[0].batches[0])] == [8, 9]


def test_refused_samples_are_counted_once():
    parts = steps_of(Plan([30], seed=1), ranks=2, accumulation=2, per_device=3, count=3, workers=1, bad=7)
    accounts = [step.account for part in parts for step in part]
    assert sum(account.read for account in accounts) == 30
    assert sum(account.refusals for account in accounts) == 4  # 6, 13, 20, 27
    assert sum(batch.samples for part in parts for step in part for batch in step.batches) == 26


def reader_of(tmp_path: Path, *sources: dict):
    """A real reader of tiny shards of 5 and 4 samples."""
    from vlm_adapt.config.schema import Source as Configured
    from vlm_adapt.data.reader import Reader
    from vlm_adapt.image_spec import ImageSpec

    for name, first, count in (("a", 0, 5), ("b", 100, 4)):
        tiny.questions_shard(tmp_path / f"{name}.tar", count, first=first)
    template = SimpleNamespace(prompt_is_causal=True)
    encoder = SimpleNamespace(seq2seq=False)
    spec = ImageSpec((16, 16), (0.5,) * 3, (0.5,) * 3, "squash", "bicubic")
    listed = [Configured(**{**one, "shards": str(tmp_path / one["shards"])}) for one in sources]
    return Reader(listed, encoder, template, None, spec)


def test_a_limit_holds_for_any_source(tmp_path):
    reader = reader_of(
        tmp_path, {"shards": "{a,b}.tar", "limit": 7}, {"shards": "b.tar", "limit": 1}, {"shards": "a.tar"}
    )
    assert len(reader) == 13
    assert [reader.counts(source) for source in range(3)] == [(5, 2), (1,), (5,)]
    keys = [reader.key(number) for number in range(13)]
    expected = [f"s{n:04d}" for n in (0, 1, 2, 3, 4, 100, 101, 100, 0, 1, 2, 3, 4)]
    assert keys == expected
    assert [reader.sample(number)[0].key for number in range(13)] == expected


@pytest.mark.parametrize(
    ("epochs", "size", "steps"), [(1, 8, 3), (2, 8, 6), (0.5, 8, 2), (0.01, 8, 1), (1, 64, 1)]
)
def test_epochs_become_steps(parts, tmp_path, epochs, size, steps):
    """24 samples; half a batch counts as a step, and a run has at least one."""
    from vlm_adapt.models.build import build
    from vlm_adapt.train.loop import StageLoop, Totals

    tree = tiny.run_tree(parts, str(tmp_path / "out"), train__max_steps=0, train__num_train_epochs=epochs)
    tree["train"]["per_device_train_batch_size"] = size
    run = validate(tree, "x")
    assembled = build(run.model, torch.float32)
    assembled.adapt([run.adapt])
    loop = StageLoop(run, "train", run, assembled, Totals(), SimpleNamespace(), SimpleNamespace(), None)
    assert loop.total == steps


def test_what_was_mended_is_in_the_account():
    """Troubles of storage that cost no sample are counted once, by the process that met them."""
    from vlm_adapt.data.storage import notes

    notes.forget()
    try:
        stream = Stream(Numbers(), PaddedRows(Plan([12], seed=1)), Shape(3, 1), OPTIONS)
        steps = stream.steps(LaneCursor(), 3)
        notes.note("http://a/b.tar", "asked again", "status 500")
        notes.note("http://a/c.tar", "asked again", "status 502")
        (counted,) = next(steps).account.mended.items()
        assert counted == ("http://a/b.tar: (no key): asked again: status 500", 2)
        assert next(steps).account.mended == {}
        notes.note("http://a/b.tar", "asked again")
        assert sum(next(steps).account.mended.values()) == 1
    finally:
        notes.forget()
