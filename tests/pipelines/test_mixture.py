"""Several sets by weight keep the promises of one: any world, any step, each sample once an epoch of its set."""

import pickle
from collections import Counter
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.index import Index, Shard
from pipelines.mixture import Mixture
from pipelines.plan import Plan, index_from_counts

WEIGHTS = st.sampled_from([0.1, 0.3, 0.5, 1.0, 1, 2, 3.7, 25])


def joined(indexes: list[Index]) -> Index:
    return Index.joined([(f"set-{i}", index) for i, index in enumerate(indexes)])


def mixed(counts: list[list[int]], weights: list[float], **changes) -> Mixture:  # type: ignore[no-untyped-def]
    indexes = [index_from_counts(part) for part in counts]
    options = {"batch_size": 12, "seed": 3, "lanes": 4, "window": 2} | changes
    return Mixture(list(zip(indexes, weights, strict=True)), joined(indexes), **options)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    counts = draw(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=8), min_size=1, max_size=4))
    return mixed(
        counts,
        [draw(WEIGHTS) for _ in counts],
        batch_size=draw(st.integers(1, 40)),
        seed=draw(st.integers(0, 2**64 - 1)),
        lanes=draw(st.integers(1, 10)),
        window=draw(st.integers(1, 4)),
        parts=draw(st.integers(1, 4)),
    )


def set_of(mixture: Mixture, sample: int) -> int:
    bounds = list(accumulate(plan.index.num_samples for plan in mixture._plans))
    return int(np.searchsorted(bounds, sample, side="right"))


def schedule(weights: list[Fraction], positions: int) -> list[int]:
    """The definition, one position after the other: the set whose next sample is due first."""
    given_out, order = [0] * len(weights), []
    for _ in range(positions):
        i = min(range(len(weights)), key=lambda i: (Fraction(2 * given_out[i] + 1, 2) / weights[i], i))
        given_out[i] += 1
        order.append(i)
    return order


@given(weights=st.lists(WEIGHTS, min_size=1, max_size=5), positions=st.integers(0, 200))
def test_counts_are_those_of_the_schedule(weights: list[float], positions: int) -> None:
    mixture = mixed([[3]] * len(weights), weights)
    told = Counter(schedule([Fraction(str(weight)) for weight in weights], positions))
    assert mixture.counts(positions) == tuple(told[i] for i in range(len(weights)))


@given(weights=st.lists(WEIGHTS, min_size=1, max_size=6), position=st.integers(0, 10**15))
def test_every_set_has_its_share_at_every_position(weights: list[float], position: int) -> None:
    mixture = mixed([[3]] * len(weights), weights)
    counts, after = mixture.counts(position), mixture.counts(position + 1)
    total = sum(Fraction(str(weight)) for weight in weights)
    assert sum(counts) == position
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - position * Fraction(str(weight)) / total) <= Fraction(len(weights) + 1, 2)
    assert sorted(b - a for a, b in zip(counts, after, strict=True)) == [0] * (len(weights) - 1) + [1]


@settings(max_examples=60, deadline=None)
@given(mixture=mixtures(), steps=st.integers(1, 12))
def test_each_sample_comes_once_an_epoch_of_its_set(mixture: Mixture, steps: int) -> None:
    read: dict[int, list[int]] = {i: [] for i in range(len(mixture.weights))}
    for step in range(steps):
        batch = mixture.batch(step).tolist()
        assert len(batch) == mixture.batch_size
        sets = [set_of(mixture, sample) for sample in batch]
        assert sets == sorted(sets)
        for i, sample in zip(sets, batch, strict=True):
            read[i].append(sample)
    first = 0
    for i, samples in read.items():
        size = mixture._plans[i].index.num_samples
        assert len(samples) == mixture.counts(steps * mixture.batch_size)[i]
        if mixture.batch_size * 2 < size:  # else a step holds parts of several epochs, lane by lane
            for epoch in range(len(samples) // size):
                # Inside a step samples stand by lane; over whole steps the order is the set's own.
                counted = Counter(samples[: (epoch + 1) * size])
                assert max(counted.values()) <= epoch + 2
        counted = Counter(samples)
        whole, rest = divmod(len(samples), size)
        assert sorted(counted.values(), reverse=True)[:rest] == [whole + 1] * rest
        assert all(counted[sample] >= whole for sample in range(first, first + size))
        first += size


@settings(max_examples=30, deadline=None)
@given(mixture=mixtures(), worlds=st.lists(st.integers(1, 9), min_size=1, max_size=4), first=st.integers(0, 10**9))
def test_any_change_of_world_at_any_step_keeps_the_order(mixture: Mixture, worlds: list[int], first: int) -> None:
    for step, world in enumerate(worlds, start=first):
        slices = [mixture.rank_slice(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(slices), mixture.batch(step))
        assert max(map(len, slices)) - min(map(len, slices)) <= 1
        for rank in range(world):
            lanes = {span.window.lane for span in mixture.spans(step, *mixture.bounds(step, rank, world))}
            assert len(lanes) <= mixture.open_lanes(world)
    assert np.array_equal(pickle.loads(pickle.dumps(mixture)).batch(first), mixture.batch(first))


def test_sets_of_equal_weight_share_the_lanes_and_a_rank_opens_few() -> None:
    mixture = mixed([[50] * 40, [30] * 40], [1, 1], batch_size=64, lanes=8)
    assert mixture.lanes == 8
    for step in range(20):
        for world in range(1, 10):
            for rank in range(world):
                spans = mixture.spans(step, *mixture.bounds(step, rank, world))
                assert len({span.window.lane for span in spans}) <= -(-8 // world) + 2
        taken = Counter(set_of(mixture, sample) for sample in mixture.batch(step).tolist())
        assert taken == {0: 32, 1: 32}


def test_a_set_that_is_smaller_than_its_share_of_a_step_comes_several_times() -> None:
    mixture = mixed([[2], [100]], [1, 1], batch_size=20)
    batch = mixture.batch(0)
    assert Counter(batch[:10].tolist()) == {0: 5, 1: 5} and len(set(batch[10:].tolist())) == 10


def test_an_epoch_of_a_mixture_ends_when_every_set_has_been_seen() -> None:
    mixture = mixed([[30], [50, 50]], [1, 3], batch_size=8)  # 2 and 6 a step
    assert mixture.steps_per_epoch == 17  # 100 / 6; the other's 30 are through after 15
    seen = set(np.concatenate([mixture.batch(step) for step in range(17)]).tolist())
    assert seen == set(range(130))
    assert mixed([[7, 3]], [5], batch_size=4).steps_per_epoch == 3


def test_sets_differ_in_order_and_weights_change_no_set_s_own_order() -> None:
    def own(weights: list[float], i: int) -> list[int]:
        mixture = mixed([[40], [40]], weights, lanes=2, batch_size=10)
        samples = np.concatenate([mixture.batch(step) for step in range(100)]).tolist()
        return [sample % 40 for sample in samples if set_of(mixture, sample) == i][:40]

    assert own([1, 1], 0) != own([1, 1], 1)
    assert sorted(own([1, 1], 0)) == sorted(own([1, 4], 0)) == list(range(40))


@given(mixture=mixtures(), data=st.data())
def test_windows_and_replacements_stay_within_a_set(mixture: Mixture, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 50))
    span = data.draw(st.sampled_from(mixture.spans(step, 0, mixture.size(step))))
    order = mixture.order(span.window).tolist()
    assert len({set_of(mixture, sample) for sample in order}) == 1
    rows = [
        int(mixture.index.offsets[piece.shard]) + row
        for piece in mixture.pieces(span.window)
        for row in range(piece.first, piece.last)
    ]
    assert sorted(rows) == sorted(order)
    assert list(mixture.replacements(span.window, span.first)) == order[span.first + 1 :] + order[: span.first]


def test_seeking_costs_the_same_anywhere() -> None:
    indexes = [index_from_counts([10**4] * 10**4), index_from_counts([1000] * 100)]
    mixture = Mixture(list(zip(indexes, [0.9, 0.1], strict=True)), joined(indexes), batch_size=512, seed=1)
    for step in (0, 10**6, 10**12):
        assert len(mixture.spans(step, 0, 512)) <= 2 * mixture.lanes
        assert len(mixture.batch(step)) == 512


def test_one_set_is_dealt_out_as_its_plan_does() -> None:
    mixture = mixed([[20] * 10], [3.0], batch_size=8, lanes=4)
    plan = mixture._plans[0]
    whole = Plan(plan.index, batch_size=8, seed=plan.seed, lanes=4, window=2)
    for step in range(2 * 25):
        assert np.array_equal(mixture.batch(step), whole.batch(step))


def test_what_is_no_mixture_is_refused() -> None:
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not a positive number"):
            mixed([[3], [4]], [1, weight])
    with pytest.raises(ValueError, match="there is none"):
        Mixture([], index_from_counts([3]), batch_size=1, seed=0)
    with pytest.raises(ValueError, match="not those of the sets"):
        Mixture([(index_from_counts([3]), 1)], index_from_counts([4]), batch_size=1, seed=0)
    with pytest.raises(ValueError, match="batch_size: 0"):
        mixed([[3]], [1], batch_size=0)
    with pytest.raises(ValueError, match="step: -1"):
        mixed([[3]], [1]).batch(-1)
    with pytest.raises(ValueError, match="rank: 2"):
        mixed([[3]], [1]).rank_slice(0, 2, 2)
    with pytest.raises(ValueError, match="places"):
        mixed([[3]], [1]).spans(0, 0, 13)
    small, large = (Index((Shard("a.tar", 1, "", 1),), size=(side, side)) for side in (8, 9))
    with pytest.raises(ValueError, match="image sizes differ"):
        joined([small, large])
    with pytest.raises(ValueError, match="listed twice"):
        Index.joined([("a", small), ("a", small)])
