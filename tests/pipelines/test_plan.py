"""Properties of the data order, over shapes of sets, batch sizes, seeds, epochs and worlds."""

import pickle
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.index import Index, Shard
from pipelines.noise import generator
from pipelines.plan import Plan, Window, index_from_counts, micro_batches

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=25)
WORLDS = st.integers(1, 9)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        index_from_counts(draw(COUNTS)),
        batch_size=draw(st.integers(1, 40)),
        seed=draw(st.integers(0, 2**64 - 1)),
        lanes=draw(st.integers(1, 12)),
        window=draw(st.integers(1, 6)),
        parts=draw(st.integers(1, 5)),
    )


def epoch_of(plan: Plan, epoch: int) -> list[np.ndarray]:
    first = epoch * plan.steps_per_epoch
    return [plan.batch(step) for step in range(first, first + plan.steps_per_epoch)]


def lane_of_places(plan: Plan, step: int) -> list[int]:
    spans = plan.spans(step, 0, plan.size(step))
    return [span.window.lane for span in spans for _ in range(span.count)]


@given(plan=plans(), epoch=st.integers(0, 10**6))
def test_every_sample_comes_exactly_once_an_epoch(plan: Plan, epoch: int) -> None:
    batches = epoch_of(plan, epoch)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(plan.index.num_samples))
    assert [len(batch) for batch in batches[:-1]] == [plan.batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= plan.batch_size


@given(plan=plans(), epoch=st.integers(0, 5), worlds=st.lists(WORLDS, min_size=1, max_size=5))
def test_any_change_of_world_at_any_step_keeps_the_order(plan: Plan, epoch: int, worlds: list[int]) -> None:
    for i in range(plan.steps_per_epoch):
        step, world = epoch * plan.steps_per_epoch + i, worlds[i % len(worlds)]
        slices = [plan.rank_slice(step, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(slices), plan.batch(step))
        sizes = [len(part) for part in slices]
        assert max(sizes) - min(sizes) <= 1


@given(plan=plans(), epoch=st.integers(0, 5))
def test_a_full_step_takes_equally_from_each_lane_and_any_step_nearly(plan: Plan, epoch: int) -> None:
    assert plan.batch_size % plan.lanes == 0
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        lanes = lane_of_places(plan, step)
        assert lanes == sorted(lanes)
        taken = [lanes.count(lane) for lane in range(plan.lanes)]
        assert max(taken) - min(taken) <= (0 if plan.size(step) == plan.batch_size else 1)


@given(plan=plans(), epoch=st.integers(0, 5))
def test_a_lane_is_read_window_by_window(plan: Plan, epoch: int) -> None:
    seen: dict[int, list[tuple[int, int]]] = {}
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        for span in plan.spans(step, 0, plan.size(step)):
            entries = range(span.first, span.first + span.count)
            seen.setdefault(span.window.lane, []).extend((span.window.number, entry) for entry in entries)
            assert span.window.epoch == epoch
    pieces = []
    for lane, entries in seen.items():
        assert entries == sorted(entries) and len(set(entries)) == len(entries)
        for number in {number for number, _ in entries}:
            window = next(
                span.window
                for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
                for span in plan.spans(step, 0, plan.size(step))
                if (span.window.lane, span.window.number) == (lane, number)
            )
            read = plan.pieces(window)
            assert 1 <= len(read) <= plan.window * plan.parts
            assert sum(piece.last - piece.first for piece in read) == len(plan.order(window))
            assert len(plan.order(window)) == sum(n == number for n, _ in entries)
            pieces += read
    rows = [(piece.shard, row) for piece in pieces for row in range(piece.first, piece.last)]
    assert len(set(rows)) == len(rows) == plan.index.num_samples
    assert all(piece.first < piece.last for piece in pieces)


@given(plan=plans(), epoch=st.integers(0, 5))
def test_the_windows_of_a_lane_are_as_few_and_as_equal_as_can_be(plan: Plan, epoch: int) -> None:
    windows: dict[int, dict[int, int]] = {}
    for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
        for span in plan.spans(step, 0, plan.size(step)):
            windows.setdefault(span.window.lane, {})[span.window.number] = len(plan.pieces(span.window))
    for sizes in windows.values():
        assert sorted(sizes) == list(range(len(sizes)))
        assert max(sizes.values()) - min(sizes.values()) <= 1
        assert len(sizes) == -(-sum(sizes.values()) // (plan.window * plan.parts))


@given(plan=plans(), world=WORLDS, data=st.data())
def test_a_rank_opens_few_lanes(plan: Plan, world: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, 3 * plan.steps_per_epoch))
    if plan.size(step) == plan.batch_size:
        for rank in range(world):
            spans = plan.spans(step, *plan.bounds(step, rank, world))
            assert len({span.window.lane for span in spans}) <= plan.open_lanes(world) <= -(-plan.lanes // world) + 2


@given(plan=plans(), data=st.data())
def test_replacements_are_the_rest_of_the_window_beginning_behind_the_bad_sample(
    plan: Plan, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, 2 * plan.steps_per_epoch))
    span = data.draw(st.sampled_from(plan.spans(step, 0, plan.size(step))))
    order = plan.order(span.window).tolist()
    replacements = list(plan.replacements(span.window, span.first))
    assert replacements == order[span.first + 1 :] + order[: span.first]


@given(plan=plans(), data=st.data())
def test_seeking_and_copies_give_what_reading_through_gives(plan: Plan, data: st.DataObject) -> None:
    through = [plan.batch(step) for step in range(2 * plan.steps_per_epoch)]
    step = data.draw(st.integers(0, len(through) - 1))
    options = {"lanes": plan.lanes, "window": plan.window, "parts": plan.parts}
    fresh = Plan(plan.index, batch_size=plan.batch_size, seed=plan.seed, **options)
    assert np.array_equal(fresh.batch(step), through[step])
    assert np.array_equal(pickle.loads(pickle.dumps(plan)).batch(step), through[step])


@given(counts=COUNTS, lanes=st.integers(1, 4), parts=st.integers(1, 5), data=st.data())
def test_distinct_epochs_and_seeds_have_distinct_orders(
    counts: list[int], lanes: int, parts: int, data: st.DataObject
) -> None:
    """Of 40 samples at least: two of their orders are alike with a probability below 1e-13."""
    index = index_from_counts([*counts, 40])
    options = {"batch_size": 12, "lanes": lanes, "window": 1, "parts": parts}
    seed, other = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=2, unique=True))
    first, second = data.draw(st.lists(st.integers(0, 10**6), min_size=2, max_size=2, unique=True))
    order = np.concatenate(epoch_of(Plan(index, seed=seed, **options), first))
    assert not np.array_equal(order, np.concatenate(epoch_of(Plan(index, seed=seed, **options), second)))
    assert not np.array_equal(order, np.concatenate(epoch_of(Plan(index, seed=other, **options), first)))


@pytest.mark.parametrize("counts", [[40] * 10, [400], [1] * 400])
def test_epochs_and_seeds_differ(counts: list[int]) -> None:
    orders = [
        np.concatenate(epoch_of(Plan(index_from_counts(counts), batch_size=16, seed=seed), epoch))
        for seed in range(3)
        for epoch in range(3)
    ]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert (a == b).mean() < 0.1  # two random orders of 400 agree in one place


def test_each_shard_is_spread_over_an_epoch_and_each_place_sees_all() -> None:
    """Over many epochs a sample's place is uniform, as in a full shuffle."""
    counts, epochs = [5] * 12, 600
    plan = Plan(index_from_counts(counts), batch_size=6, seed=3, lanes=3, window=2)
    positions = np.stack([np.argsort(np.concatenate(epoch_of(plan, epoch))) for epoch in range(epochs)])  # [E, N]
    mean = positions.mean(axis=0)  # [N]
    deviation = np.sqrt((60**2 - 1) / 12 / epochs)
    assert np.abs(mean - 59 / 2).max() < 5 * deviation


def calls_of(work: Callable[[], object]) -> int:
    """Functions called, Python's and C's: a measure of work that no other process disturbs."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_any_step_costs_the_same_in_a_set_of_a_billion() -> None:
    index = index_from_counts([10**4] * 10**5)
    _ = index.offsets
    # A fresh plan each time, and with what it must permute: one epoch's shards, a window or two a lane.
    calls = {
        step: calls_of(lambda step=step: Plan(index, batch_size=4096, seed=1).batch(step))
        for step in (0, 10**6, 10**12)
    }
    assert max(calls.values()) < 2 * min(calls.values()) < 10**4


def test_a_step_permutes_the_parts_and_the_open_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    permuted: list[int] = []

    class Counting:
        def __init__(self, *arguments, **keywords) -> None:  # type: ignore[no-untyped-def]
            self._inner = generator(*arguments, **keywords)

        def permutation(self, things):  # type: ignore[no-untyped-def]
            permuted.append(things if isinstance(things, int) else len(things))
            return self._inner.permutation(things)

    monkeypatch.setattr("pipelines.plan.generator", Counting)
    plan = Plan(index_from_counts([100] * 1000), batch_size=64, seed=1, lanes=8, window=2, parts=3)
    for step in (0, 10**6, 10**12):
        permuted.clear()
        plan.batch(step)
        assert sum(size == 3000 for size in permuted) <= 1
        assert sum(size for size in permuted if size != 3000) <= 2 * 8 * 2 * 100


def test_memory_is_parts_plus_open_windows_in_a_set_of_a_billion() -> None:
    index = index_from_counts([10**4] * 10**5)
    _ = index.offsets
    tracemalloc.start()
    try:
        plan = Plan(index, batch_size=4096, seed=1, lanes=8, window=4, parts=4)
        for step in (0, 10**6, plan.steps_per_epoch - 1, plan.steps_per_epoch, 5 * 10**8):
            plan.batch(step)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    parts, windows = 8 * 4 * 10**5, 8 * 8 * 4 * 10**4  # bytes of an int64 a part; a sample of 8 windows of 4 shards
    assert peak < 12 * parts + 3 * windows  # a permutation of the samples alone would take 8 GB


@given(counts=COUNTS, parts=st.integers(1, 5), epoch=st.integers(0, 5))
def test_a_shard_is_cut_into_equal_parts_at_places_of_their_own(counts: list[int], parts: int, epoch: int) -> None:
    plan = Plan(index_from_counts(counts), batch_size=4, seed=1, lanes=1, window=1, parts=parts)
    windows = -(-sum(min(count, parts) for count in counts) // parts)
    pieces = [piece for number in range(windows) for piece in plan.pieces(Window(epoch, 0, number))]
    for shard, count in enumerate(counts):
        cut = sorted((piece.first, piece.last) for piece in pieces if piece.shard == shard)
        assert [first for first, _ in cut] == [0, *(last for _, last in cut[:-1])] and cut[-1][1] == count
        sizes = [last - first for first, last in cut]
        assert len(sizes) == min(count, parts) and max(sizes) - min(sizes) <= 1


@given(batch_size=st.integers(1, 300), world=WORLDS, largest=st.integers(1, 64))
def test_micro_batches_are_the_fewest_and_then_the_smallest(batch_size: int, world: int, largest: int) -> None:
    longest = max((rank + 1) * batch_size // world - rank * batch_size // world for rank in range(world))
    fitting = [(a, m) for m in range(1, largest + 1) for a in range(1, longest + 1) if a * m >= longest]
    assert micro_batches(batch_size, world, largest) == min(fitting)


@given(plan=plans(), epoch=st.integers(0, 3), data=st.data())
def test_a_stretch_of_any_positions_is_theirs_lane_by_lane(plan: Plan, epoch: int, data: st.DataObject) -> None:
    samples = plan.index.num_samples
    first = data.draw(st.integers(0, samples))
    last = data.draw(st.integers(first, samples))
    begin = data.draw(st.integers(0, last - first))
    end = data.draw(st.integers(begin, last - first))
    by_position: dict[int, int] = {}  # position j is entry j // lanes of lane j % lanes
    taken = dict.fromkeys(range(plan.lanes), 0)
    for span in plan.stretch(epoch, 0, samples, 0, samples):
        for sample in plan.order(span.window)[span.first : span.first + span.count].tolist():
            by_position[taken[span.window.lane] * plan.lanes + span.window.lane] = sample
            taken[span.window.lane] += 1
    asked = sorted(range(first, last), key=lambda j: (j % plan.lanes, j))[begin:end]
    spans = plan.stretch(epoch, first, last, begin, end)
    got = [n for s in spans for n in plan.order(s.window)[s.first : s.first + s.count].tolist()]
    assert got == [by_position[j] for j in asked]


@given(plan=plans(), world=WORLDS)
def test_offsets_locate_every_sample(plan: Plan, world: int) -> None:
    rows = [(shard, row) for shard, entry in enumerate(plan.index.shards) for row in range(entry.samples)]
    assert [plan.index.locate(sample) for sample in range(plan.index.num_samples)] == rows
    assert all(a < b for a, b in pairwise(plan.index.offsets))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"lanes": 0}, "lanes: 0"),
        ({"window": -1}, "window: -1"),
        ({"parts": 0}, "parts: 0"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(index_from_counts([3]), **({"batch_size": 2, "seed": 0} | change))


def test_questions_out_of_range_are_refused() -> None:
    plan = Plan(index_from_counts([3]), batch_size=2, seed=0)
    with pytest.raises(ValueError, match="step: -1"):
        plan.batch(-1)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank: {rank}"):
            plan.rank_slice(0, rank, 2)
    with pytest.raises(ValueError, match="places"):
        plan.spans(1, 0, 2)  # the second step has one sample


@pytest.mark.parametrize("name", ["", "..", "a/b.tar", "../b.tar", "a\\b.tar"])
def test_shard_names_do_not_lead_out_of_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match="plain file name"):
        Shard(name, 1, "", 1)


def test_an_index_refuses_what_is_no_set() -> None:
    with pytest.raises(ValueError, match="empty"):
        Index(())
    with pytest.raises(ValueError, match=r"'a\.tar' is listed twice"):
        Index((Shard("a.tar", 1, "", 1), Shard("a.tar", 1, "", 2)))
    with pytest.raises(ValueError, match="0 samples"):
        index_from_counts([2, 0])


@settings(max_examples=30)
@given(counts=COUNTS, data=st.data())
def test_the_digest_tells_sets_apart(counts: list[int], data: st.DataObject) -> None:
    other = data.draw(COUNTS)
    assert (index_from_counts(counts).digest == index_from_counts(other).digest) == (counts == other)
