"""Packed and bucketed rows: full, complete, and the same whoever makes them and wherever they go on."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import sentence

from vlm_adapt.data.batching import BATCHING
from vlm_adapt.data.encode import Encoded
from vlm_adapt.data.lanes import Plan, Source
from vlm_adapt.data.pack import PackedRows, fill
from vlm_adapt.data.problems import BadSample
from vlm_adapt.data.storage import notes
from vlm_adapt.data.stream import Shape, Stream
from vlm_adapt.errors import UserError

NONE = np.zeros(0, np.int64)
LENGTH = 64


class Texts:
    """A reader of samples with 1 to 3 texts of drawn lengths; some are refused, early or late."""

    def __init__(self, seed: int = 0, longest: int = 40, bad: float = 0.0):
        self.seed, self.longest, self.bad, self.measured = seed, longest, bad, 0

    def lengths(self, number, epoch):
        draws = np.random.default_rng([self.seed, number, epoch])
        fate, count = draws.random(), int(draws.integers(1, 4))
        return fate, draws.integers(1, self.longest + 1, count).tolist()

    def measure(self, number, epoch, position):
        self.measured += 1
        fate, lengths = self.lengths(number, epoch)
        if fate < self.bad / 2:
            raise BadSample("record")
        return lengths

    def place(self, number):
        return str(number)

    def training(self, number, epoch, position, account, texts=None, apart=False):
        fate, lengths = self.lengths(number, epoch)
        counts = texts is None or not len(texts) or 0 in texts
        if fate < self.bad:
            if counts:
                account.refuse(f"{number}", "record" if fate < self.bad / 2 else "pixels", "a")
            return []
        if counts:
            account.use(source="a", tokens=sum(lengths), split=apart)
        return [
            encoded(f"{epoch}.{position}.{number}.{text}", length)
            for text, length in enumerate(lengths)
            if texts is None or text in texts
        ]


def encoded(key: str, length: int) -> Encoded:
    whole = np.arange(length)
    states = np.zeros((0, 0), np.float32)
    return Encoded(key, whole, whole + 1, whole * 0, whole, NONE, NONE, NONE, [], NONE, states)


def rows_of(kind, plan, texts, count):
    return BATCHING.load(kind)(plan, texts.measure, LENGTH, count)


def run(kind, plan, texts, shape, steps, state=None, workers=0):
    """Global batches as rows of keys, the merged account, and the state after."""
    ranks, accumulation, size = shape
    options = {"image_size": (2, 2), "tokens_per_image": 1}
    parts, accounts = [], []
    cursors = []
    for rank in range(ranks):
        cut = Shape(size, accumulation, rank, ranks)
        rows = rows_of(kind, plan, texts, cut.global_batch)
        cursor = rows.resume(json.loads(state), cut.global_batch) if state else rows.start()
        stream = Stream(texts, rows, cut, options, workers)
        part = list(stream.steps(cursor, steps))
        parts.append(part)
        cursors.append(part[-1].cursor)
        accounts += [step.account for step in part]
    batches = []
    for step in zip(*parts, strict=True):
        batches.append([row for m in range(accumulation) for part in step for row in told(part.batches[m])])
    for account in accounts[1:]:
        accounts[0].merge(account)
    return batches, accounts[0], json.dumps(rows.state(cursors))


def told(batch) -> list[tuple[str, ...]]:
    """The keys in each row."""
    keys = iter(batch.keys)
    return [tuple(next(keys) for _ in range(int(row.max()))) for row in batch.documents_BT]


SHAPES = [(1, 1, 6), (2, 1, 3), (3, 2, 1), (1, 3, 2), (6, 1, 1), (2, 3, 1)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=4),
    st.integers(0, 2**32),
    st.sampled_from([1, 3, 7, 64]),
    st.floats(0, 0.6),
    st.none() | st.integers(2, 9),
    st.lists(st.tuples(st.sampled_from(SHAPES), st.integers(1, 4)), min_size=2, max_size=5),
    st.sampled_from(sorted(BATCHING)),
)
def test_any_ranks_stopped_anywhere_make_one_stream(counts, seed, lanes, bad, window, phases, kind):
    """With several sources, shuffling, packing and bad samples: the batches that would have been."""
    sources = [Source((count,), weight) for count, weight in zip(counts, (1.0, 2.5, 0.5, 1.0), strict=False)]
    plan = Plan(sources, seed, lanes, True, window)
    texts = Texts(seed, bad=bad)
    total = sum(steps for _, steps in phases)
    expected, whole, _ = run(kind, plan, texts, (1, 1, 6), total)
    seen, state = [], None
    counted: Counter[str] = Counter()
    for shape, steps in phases:
        batches, account, state = run(kind, plan, texts, shape, steps, state)
        seen += batches
        counted.update(read=account.read, used=account.used, split=account.split, **account.refused)
    full = [[row for row in batch if row] for batch in expected]
    assert [[row for row in batch if row] for batch in seen] == full
    assert counted == Counter(read=whole.read, used=whole.used, split=whole.split, **whole.refused)


@pytest.mark.parametrize("kind", sorted(BATCHING))
def test_workers_change_nothing(kind):
    notes.forget()  # what storage noted in other tests
    plan, texts = Plan([30, 11], seed=4, lanes=5), Texts(1, bad=0.3)
    alone = run(kind, plan, texts, (2, 2, 2), 6)
    helped = run(kind, plan, texts, (2, 2, 2), 6, workers=2)
    assert helped[0] == alone[0] and helped[1].to_dict() == alone[1].to_dict() and helped[2] == alone[2]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(30, 70))
def test_fill_is_the_best_there_is(lengths, room):
    chosen = fill(lengths, room)
    taken = sum(lengths[place] for place in chosen)
    assert chosen[0] == 0 and chosen == sorted(set(chosen)) and taken <= room
    others = range(1, len(lengths))
    sums = (
        lengths[0] + sum(lengths[place] for place in some)
        for count in range(len(lengths))
        for some in combinations(others, count)
    )
    assert taken == max(total for total in sums if total <= room)


@pytest.mark.parametrize("bad", [0.0, 0.4])
def test_packing_loses_and_repeats_nothing(bad):
    """Over two epochs every text of every good sample comes in exactly one row of each epoch."""
    plan, texts = Plan([40, 7], seed=2, lanes=4), Texts(3, bad=bad)
    rows = PackedRows(plan, texts.measure, LENGTH)
    cursor, seen, waiting = rows.start(), Counter(), set()
    while rows.epoch(cursor) < 2:
        made, cursor = rows.take(cursor, 4)
        for row in made:
            for unit in row:
                lengths = [] if not unit.texts else texts.measure(unit.number, unit.epoch, unit.position)
                seen.update((unit.epoch, unit.number, text) for text in unit.texts)
                assert unit.texts == () or unit.apart == (len(unit.texts) < len(lengths))
    waiting = {
        (*divmod(item, plan.size(lane))[:1], text, lane, item)
        for lane, state in cursor.lanes.items()
        for item, text in state.places()
    }
    assert set(seen.values()) == {1}
    for epoch in range(2):
        expected = set()
        for number in range(47):
            fate, lengths = texts.lengths(number, epoch)
            if fate >= bad / 2:
                expected |= {(epoch, number, text) for text in range(len(lengths))}
        missing = expected - set(seen)
        assert {one for one in seen if one[0] == epoch} <= expected
        assert len(missing) == sum(1 for one in waiting if one[0] == epoch)


def lengths_like_conversations(count: int, seed: int = 0) -> np.ndarray:
    """Mean 281, 95th percentile about 420, at most 935: the profile of docs/log.md."""
    draws = np.random.default_rng(seed)
    body = draws.normal(268, 62, count).clip(60, 500)
    tail = draws.uniform(420, 935, count)
    return np.where(draws.random(count) < 0.04, tail, body).astype(int)


def test_rows_are_full_and_the_state_is_small():
    lengths = lengths_like_conversations(20_000)
    assert abs(lengths.mean() - 281) < 6 and abs(np.percentile(lengths, 95) - 420) < 25
    plan = Plan([20_000], seed=0)
    rows = PackedRows(plan, lambda number, epoch, position: [int(lengths[number])], 2048)
    cursor, filled = rows.start(), []
    for _ in range(40):
        made, cursor = rows.take(cursor, 32)
        filled += [sum(int(lengths[unit.number]) for unit in row) for row in made]
    assert max(filled) <= 2048
    assert np.mean(filled) / 2048 > 0.99  # the aim is 0.95; subset sums leave next to nothing
    assert len(json.dumps(rows.state([cursor]))) < 8_000
    estimate = rows.steps_per_epoch(32)
    assert abs(estimate - lengths.sum() / 2048 / 32) / estimate < 0.03  # 512 lengths: about 1.5 % off


def test_no_sample_waits_long():
    """The oldest text goes into the next row, whatever its length."""
    lengths = [2000 if number % 5 == 0 else 90 for number in range(300)]
    rows = PackedRows(Plan([300], lanes=2), lambda number, epoch, position: [lengths[number]], 2048)
    cursor = rows.start()
    for _ in range(60):
        _, cursor = rows.take(cursor, 2)
        for state in cursor.lanes.values():
            assert all(state.read - item < 60 for item, _ in state.places())


def test_a_rank_reads_only_its_own_lanes():
    texts = Texts(0)
    rows = PackedRows(Plan([4000], lanes=64), texts.measure, LENGTH)
    cursor = rows.start()
    for _ in range(8):
        _, cursor = rows.take(cursor, 16, mine=range(2, 4))
    assert set(cursor.lanes) == {2, 3, 18, 19, 34, 35, 50, 51}
    assert texts.measured < 8 * 40


def test_a_source_of_nothing_but_refusals_is_heard_of():
    plan, texts = Plan([30], lanes=2), Texts(0, bad=2.0)
    batches, account, _ = run("packed", plan, texts, (1, 1, 2), 3)
    assert account.refusals > 100 and account.used == 0 and not any(row for batch in batches for row in batch)


@pytest.mark.parametrize("kind", ["bucketed", "packed"])
def test_what_does_not_fit_is_not_resumed(kind):
    plan, texts = Plan([30], seed=1), Texts(0)
    _, _, state = run(kind, plan, texts, (1, 1, 6), 2)
    kept = json.loads(state)
    with pytest.raises(UserError) as caught:
        rows_of("padded", plan, texts, 6).resume(kept, 6)
    assert f"its rows were {kind} and are padded now" in sentence(caught)
    with pytest.raises(UserError) as caught:
        rows_of(kind, Plan([31], seed=1), texts, 6).resume(kept, 6)
    assert "cannot resume the data stream" in sentence(caught)
    other = PackedRows(plan, texts.measure, 65) if kind == "packed" else rows_of(kind, plan, texts, 7)
    with pytest.raises(UserError) as caught:
        other.resume(kept, 7)
    assert ("row_length" if kind == "packed" else "took 6 samples and now takes 7") in sentence(caught)


def test_buckets_hold_like_lengths_and_every_sample():
    plan, texts = Plan([500], seed=3), Texts(5)
    rows = rows_of("bucketed", plan, texts, 8)
    cursor, seen, spreads = rows.start(), Counter(), []
    for _ in range(rows.steps_per_epoch(8)):
        made, cursor = rows.take(cursor, 8)
        units = [unit for row in made for unit in row]
        longest = [max(texts.lengths(unit.number, 0)[1]) for unit in units]
        spreads.append(max(longest) - min(longest))
        seen.update(unit.number for unit in units)
    assert seen == Counter(range(500)) and np.mean(spreads) < 5  # of 40


def test_small_packed_sets_have_few_lanes():
    """A lane with few samples would put the same ones in a row again and again."""
    from vlm_adapt.train.feed import _lanes

    assert [_lanes(True, samples) for samples in (0, 80, 600, 5000, 10**6)] == [1, 1, 2, 19, 64]
    assert _lanes(False, 80) == 64
    lengths = [60 + number % 9 for number in range(80)]
    for lanes, least, most in ((1, 0.0, 0.05), (64, 0.5, 1.0)):  # where two epochs meet, a few
        rows = PackedRows(Plan([80], lanes=lanes), lambda number, epoch, position: [lengths[number]], 512)
        made, _ = rows.take(rows.start(), 64)
        repeats = sum(len(row) - len({unit.number for unit in row}) for row in made)
        assert least <= repeats / sum(map(len, made)) <= most, lanes
