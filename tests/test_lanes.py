"""The order of the stream: permutations, resuming anywhere, weights, and independence of who reads."""

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vlm_adapt.data.lanes import LaneCursor, Plan, Source, shuffled
from vlm_adapt.data.mix import mixed
from vlm_adapt.errors import UserError

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum)
LANES = st.integers(1, 70)


@settings(max_examples=150, deadline=None)
@given(COUNTS, st.integers(0, 2**40), LANES, st.booleans(), st.none() | st.integers(1, 30), st.integers(0, 3))
def test_an_epoch_is_a_permutation(counts, seed, lanes, shuffle, window, epoch):
    plan = Plan(counts, seed, lanes, shuffle, window)
    order = plan.order(epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(sum(counts))) and len(plan) == sum(counts)
    assert order.tolist() == [plan.at(epoch, place) for place in range(len(plan))]
    assert order.tolist() == Plan(counts, seed, lanes, shuffle, window).order(epoch).tolist()
    if not shuffle:
        assert order.tolist() == list(range(sum(counts)))


@settings(max_examples=100, deadline=None)
@given(COUNTS, LANES, st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=8))
def test_any_readers_in_any_shape_see_one_stream(counts, lanes, phases):
    """Phases of (world, batch per rank): each stops after 3 steps and another shape goes on."""
    plan = Plan(counts, seed=7, lanes=lanes)
    needed = sum(world * batch * 3 for world, batch in phases)
    epochs = needed // len(plan) + 1
    expected = np.concatenate([plan.order(epoch) for epoch in range(epochs)])[:needed].tolist()
    seen: list[int] = []
    state = plan.state(LaneCursor())
    for world, batch in phases:
        ranks = [pickle.loads(pickle.dumps(plan)) for _ in range(world)]  # each its own, as in a process
        for _ in range(3):
            cursor = plan.resume(state)
            for own in ranks:  # a rank takes its part of the global batch
                ids, cursor = own.take(cursor, batch)
                seen += ids
            state = plan.state(cursor)
    assert seen == expected


def test_epochs_and_seeds_differ_and_shuffling_is_wide():
    plan = Plan([100] * 20, seed=1)
    first, second, other = plan.order(0), plan.order(1), Plan([100] * 20, seed=2).order(0)
    assert (first != second).mean() > 0.95 and (first != other).mean() > 0.95
    # 64 samples in a row come from all over the 20 shards, in any epoch.
    assert min(len(set(first[i : i + 64] // 100)) for i in range(0, 1984, 64)) > 10
    assert len({tuple(plan.order(epoch)) for epoch in range(5)}) == 5


def test_the_order_never_changes_between_versions():
    """Frozen figures: a run begun with one version must be resumed by the next in the same order."""
    assert shuffled(10, 0, 0, "shards").tolist() == FROZEN_SHUFFLE
    assert Plan([5, 3, 8], seed=3, lanes=4).order(2).tolist() == FROZEN_ORDER


FROZEN_SHUFFLE = [6, 8, 2, 9, 3, 1, 0, 4, 7, 5]
FROZEN_ORDER = [5, 1, 11, 15, 0, 3, 10, 14, 6, 2, 9, 13, 7, 4, 8, 12]


def test_a_window_keeps_a_reader_near_one_place():
    plan = Plan([10_000], seed=0, lanes=4, window=50)
    for lane in range(4):
        ids = plan.lane(0, lane)
        base = np.sort(ids)
        assert np.abs(np.searchsorted(base, ids) - np.arange(len(ids))).max() < 50
        assert (ids != base).mean() > 0.9
    runs = [plan.lane(epoch, 0) - plan.lane(epoch, 0).min() for epoch in range(2)]
    edges = [set(np.flatnonzero(np.maximum.accumulate(run) == np.arange(len(run)))) for run in runs]
    assert all(len(edge) >= 2500 // 50 for edge in edges)
    assert len(edges[0] & edges[1]) < 25  # windows fall on other places each epoch


@settings(max_examples=80, deadline=None)
@given(COUNTS, COUNTS, st.floats(0, 3.5), st.floats(0.5, 2.0), LANES, st.booleans())
def test_weights(first, second, one, two, lanes, shuffle):
    sources = [Source(tuple(first), one), Source(tuple(second), two)]
    assume(sum(source.shown for source in sources))
    plan = Plan(sources, 5, lanes, shuffle)
    shown: Counter[int] = Counter()
    for epoch in range(4):
        order = plan.order(epoch).tolist()
        assert len(order) == len(plan)
        shown.update(order)
        begin = 0
        for source, counts, weight in zip(sources, (first, second), (one, two), strict=True):
            total = sum(counts)
            times = [shown[i] for i in range(begin, begin + total)]
            part = int(weight) * total + round((weight - int(weight)) * total)
            assert sum(times) == part * (epoch + 1) == source.shown * (epoch + 1)
            # No sample comes again before all have come.
            assert max(times) - min(times) <= 1
            begin += total


def test_two_epochs_show_both_halves():
    plan = Plan([Source((60, 40), 0.5)])
    halves = [frozenset(plan.order(epoch).tolist()) for epoch in range(4)]
    assert all(len(half) == 50 for half in halves) and len(set(halves)) == 4
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(100))


def test_every_lane_gets_its_share_of_every_source():
    plan = Plan([Source((1000,)), Source((10, 190)), Source((50,), 2.0)], seed=3, lanes=8)
    for lane in range(8):
        ids = plan.lane(1, lane)
        shares = np.histogram(ids, [0, 1000, 1200, 1250])[0]
        assert np.abs(shares - np.array([125, 25, 12.5])).max() <= 1
        assert len(ids) == plan.size(lane)
    # And so does every stretch of the stream, to within chance.
    order = plan.order(0)
    windows = (order[: 1300 // 100 * 100].reshape(-1, 100) < 1000).mean(1)
    assert abs(windows.mean() - 1000 / 1300) < 0.02 and windows.std() < 0.06


@pytest.mark.parametrize("window", [None, 16])
def test_mixing_by_weight(window):
    sources = [Source((900,), 3.0), Source((100, 50), 1.0)]
    first = mixed(sources, "weight", "first")
    assert [source.shown for source in first] == [450, 150]  # the small source was seen whole
    last = mixed(sources, "weight", "last")
    assert [source.shown for source in last] == [900, 300]  # the large one was, and the small one twice
    plan = Plan(last, seed=1, window=window)
    shown = Counter(plan.order(0).tolist())
    assert {shown[i] for i in range(900)} == {1} and {shown[i] for i in range(900, 1050)} == {2}
    assert [source.shown for source in mixed(sources, "weight", "last", 1001)] == [751, 250]
    by_size = mixed(sources, "size", "last", 285)
    assert [source.shown for source in by_size] == [270, 15]  # 2700 to 150
    assert mixed(sources, "size") == sources
    assert [s.shown for s in mixed([*sources, Source(())], "weight", "first")] == [450, 150, 0]


def test_end_of_an_epoch():
    plan = Plan([5])
    ids, cursor = plan.take(LaneCursor(0, 3), 4, wrap=False)
    assert len(ids) == 2 and plan.take(cursor, 4, wrap=False) == ([], cursor)
    ids, cursor = plan.take(LaneCursor(0, 3), 4)
    assert len(ids) == 4 and cursor == LaneCursor(1, 2)


def test_bad_plans_and_states_are_refused():
    for bad in ([0, 0], [], [Source((5,), 0.0)], [Source((5,), -1.0)], [Source((5,), float("nan"))]):
        with pytest.raises(UserError):
            Plan(bad)
    plan = Plan([4, 5])
    state = plan.state(LaneCursor(1, 2))
    assert plan.resume(state) == LaneCursor(1, 2)
    for other in (Plan([5, 4]), Plan([4, 5], seed=1), Plan([Source((4, 5), 2.0)]), Plan([4, 5], lanes=8)):
        with pytest.raises(UserError, match="cannot resume the data stream"):
            other.resume(state)
    with pytest.raises(UserError, match=r"it differs in seed \(was 0, is 1\); restore"):
        Plan([4, 5], seed=1).resume(state)
    with pytest.raises(UserError, match="it differs in keys of the samples; restore"):
        Plan([Source((4, 5), mark="other")]).resume(state)


def test_a_large_plan_is_quick_to_enter_anywhere():
    plan = Plan([10_000] * 100, seed=1)  # a million samples
    assert 0 <= plan.at(4, 999_999) < 1_000_000
    assert len(plan._lanes) == 1  # one lane was laid out, not 64
