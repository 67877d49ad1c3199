"""The data order: which samples a step sees, as a pure function of (index, batch size, seed, step). numpy only.

An epoch's shards are permuted, laid end to end, and cut at sample granularity into `lanes` that differ by at most one
sample. Inside a lane every few shards form a window, and each window is shuffled on its own. Position j of an epoch is
entry j // lanes of lane j % lanes:

    shards, permuted    |  4  |   1    |  6  |    0     |  5   |  2  |3 |
    lanes               |------- lane 0 --------|------- lane 1 --------|
    windows (of 2)      |----- 0 ------|-- 1 ---|----- 0 ------|-- 1 ---|    each shuffled
    a step takes        ^^^                     ^^^                          batch / lanes from each, lane by lane

How well it is shuffled: a batch can show lanes x window shards at most, those in memory. Of 400 shards of 1000 samples,
with the defaults, a batch of 64 shows 28 of its 32, as many as 64 free draws would. A buffer that webdataset shuffles
in the same memory shows 41, since it also holds rests of shards that were read long before; what it does worse is the
rank correlation of position and shard over an epoch, 0.88 against 0.13 (measured in tests/pipelines/test_plan.py). More
shards in a batch take more memory (16 lanes of 4 show 43) or more and smaller reads, a part of a shard at a time:
neither the order nor the number of lanes that a rank opens gives more for nothing.

Nothing here knows how many workers there are until `rank_slice` cuts the finished batch, so the order cannot depend on
it. Memory is the epoch's shard permutation and one window per open lane; any step costs the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.index import Index, Shard, index_from_counts
from pipelines.noise import Purpose, generator

__all__ = ["Index", "Piece", "Plan", "Shard", "Span", "Window", "index_from_counts", "micro_batches"]


@dataclass(frozen=True, slots=True)
class Window:
    """A run of shards inside one lane of one epoch that is shuffled as a whole."""

    epoch: int
    lane: int
    number: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [first, last) of a shard: what a window reads in one go."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Span:
    """Entries [first, first + count) of a window's shuffled order, which stand side by side in a batch."""

    window: Window
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The shards of an epoch, permuted: `shards` int64 [S]; `bounds` int64 [S + 1], the position where each begins."""

    shards: NDArray[np.int64]
    bounds: NDArray[np.int64]


class Plan:
    """The order of a set of shards.

    Args:
        index: the set.
        batch_size: G, samples a step over all workers; the last step of an epoch may be shorter.
        seed: of the order.
        lanes: wish; the largest divisor of the batch size not above it is used.
        window: shards that are shuffled together inside a lane.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, index: Index, *, batch_size: int, seed: int, lanes: int = 8, window: int = 4) -> None:
        for name, value in (("batch_size", batch_size), ("lanes", lanes), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}: {value} is less than 1; use a positive number")
        generator(seed, Purpose.ORDER)  # refuses a seed out of range now, not at the first step
        self.index = index
        self.batch_size = batch_size
        self.seed = seed
        self.lanes = next(n for n in range(min(lanes, batch_size), 0, -1) if batch_size % n == 0)
        self.window = window
        self.steps_per_epoch = -(-index.num_samples // batch_size)
        # Around a step: two epochs, and in each lane the window that ends and the one that begins.
        self._epoch = lru_cache(maxsize=2)(self._permuted_shards)
        self.order = lru_cache(maxsize=2 * self.lanes)(self._order)

    def __reduce__(self) -> tuple[Any, ...]:
        # Caches do not travel between processes.
        build = partial(Plan, batch_size=self.batch_size, seed=self.seed, lanes=self.lanes, window=self.window)
        return build, (self.index,)

    # --- steps ---------------------------------------------------------------------------------------------------

    def size(self, step: int) -> int:
        """G', the number of samples of a step: the batch size, or what is left in the last step of an epoch."""
        if step < 0:
            raise ValueError(f"step: {step} is negative; steps count from 0")
        first = (step % self.steps_per_epoch) * self.batch_size
        return min(self.batch_size, self.index.num_samples - first)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Samples of a step in order of place, int64 [G']. Every sample comes exactly once an epoch."""
        return self._samples(step, 0, self.size(step))

    def rank_slice(self, step: int, rank: int, world: int) -> NDArray[np.int64]:
        """Samples of a step that a rank reads, int64 [about G' / world]: a contiguous slice of `batch(step)`."""
        return self._samples(step, *self.bounds(step, rank, world))

    def bounds(self, step: int, rank: int, world: int) -> tuple[int, int]:
        """The places [begin, end) of a step that a rank reads; sizes differ by at most one over the ranks.

        Raises:
            ValueError: the rank is not in [0, world).
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank: {rank} is not in [0, world = {world}); ranks count from 0")
        size = self.size(step)
        return rank * size // world, (rank + 1) * size // world

    def spans(self, step: int, begin: int, end: int) -> list[Span]:
        """Where the places [begin, end) of a step come from, in order of place.

        Raises:
            ValueError: the places are not within the step.
        """
        size = self.size(step)
        if not 0 <= begin <= end <= size:
            raise ValueError(f"places: [{begin}, {end}) is not within step {step}, which has {size}")
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.batch_size
        return self.stretch(epoch, first, first + size, begin, end)

    def stretch(self, epoch: int, first: int, last: int, begin: int, end: int) -> list[Span]:
        """Positions [first, last) of an epoch, gathered lane by lane; of these the places [begin, end)."""
        spans: list[Span] = []
        place = 0
        for lane in range(self.lanes):
            # Entry i of a lane is position i * lanes + lane.
            entry, entry_end = -(-(first - lane) // self.lanes), -(-(last - lane) // self.lanes)
            low, high = max(begin, place), min(end, place + entry_end - entry)
            if low < high:
                spans += self._lane_spans(epoch, lane, entry + low - place, entry + high - place)
            place += entry_end - entry
        return spans

    # --- windows -------------------------------------------------------------------------------------------------

    def pieces(self, window: Window) -> list[Piece]:
        """What a window reads, in order; its pieces are disjoint and never empty."""
        epoch = self._epoch(window.epoch)
        begin, end = self._window_bounds(window)
        first = int(np.searchsorted(epoch.bounds, begin, side="right")) - 1
        last = int(np.searchsorted(epoch.bounds, end, side="left"))
        pieces = []
        for position in range(first, last):
            start = int(epoch.bounds[position])
            low, high = max(begin, start), min(end, int(epoch.bounds[position + 1]))
            pieces.append(Piece(int(epoch.shards[position]), low - start, high - start))
        return pieces

    def _order(self, window: Window) -> NDArray[np.int64]:
        rows = [
            np.arange(piece.first, piece.last, dtype=np.int64) + self.index.offsets[piece.shard]
            for piece in self.pieces(window)
        ]
        # Place 0 belongs to the permutation of shards, hence lane + 1.
        stream = generator(self.seed, Purpose.ORDER, step=window.epoch, place=(window.lane + 1) << 32 | window.number)
        order = stream.permutation(np.concatenate(rows))
        order.flags.writeable = False  # it is shared through the cache
        return order

    def replacements(self, window: Window, entry: int) -> Iterator[int]:
        """Samples that may fill the place of a bad one, best first: the rest of its window's order, cyclic.

        Whoever reads the window finds the same first good one.
        """
        order = self.order(window)
        for i in range(1, len(order)):
            yield int(order[(entry + i) % len(order)])

    @property
    def window_bytes(self) -> int:
        """The most bytes of shards that one window can hold."""
        return sum(sorted((shard.bytes for shard in self.index.shards), reverse=True)[: self.window])

    def open_lanes(self, world: int) -> int:
        """The most lanes that a rank reads in a full step."""
        return min(self.lanes, -(-self.lanes // world) + 1)

    # --- inside --------------------------------------------------------------------------------------------------

    def _permuted_shards(self, epoch: int) -> _Epoch:
        shards = generator(self.seed, Purpose.ORDER, step=epoch).permutation(len(self.index.shards))  # [S]
        samples = np.diff(self.index.offsets)[shards]  # [S]
        return _Epoch(shards, np.concatenate([[0], np.cumsum(samples)]).astype(np.int64))

    def _lane_spans(self, epoch: int, lane: int, first: int, last: int) -> list[Span]:
        """Entries [first, last) of a lane, cut at the windows' ends."""
        lane_begin, _ = _share(self.index.num_samples, self.lanes, lane)
        bounds = self._epoch(epoch).bounds
        opening, shards, windows = self._lane_shards(epoch, lane)
        spans = []
        while first < last:
            shard = int(np.searchsorted(bounds, lane_begin + first, side="right")) - 1
            window = Window(epoch, lane, _part_of(shard - opening, shards, windows))
            begin, end = self._window_bounds(window)
            count = min(last, end - lane_begin) - first
            spans.append(Span(window, lane_begin + first - begin, count))
            first += count
        return spans

    def _window_bounds(self, window: Window) -> tuple[int, int]:
        """The positions [begin, end) of the epoch's laid-out samples that a window covers."""
        lane_begin, lane_end = _share(self.index.num_samples, self.lanes, window.lane)
        bounds = self._epoch(window.epoch).bounds
        opening, shards, windows = self._lane_shards(window.epoch, window.lane)
        first, last = _share(shards, windows, window.number)
        return max(lane_begin, int(bounds[opening + first])), min(lane_end, int(bounds[opening + last]))

    def _lane_shards(self, epoch: int, lane: int) -> tuple[int, int, int]:
        """A lane's first shard in the epoch's permutation, how many it touches, and into how many windows they go.

        The windows are as equal as can be: one odd shard at the end would hardly be shuffled, and could not replace
        its own bad samples.
        """
        lane_begin, lane_end = _share(self.index.num_samples, self.lanes, lane)
        bounds = self._epoch(epoch).bounds
        opening = int(np.searchsorted(bounds, lane_begin, side="right")) - 1
        shards = int(np.searchsorted(bounds, lane_end, side="left")) - opening
        return opening, shards, -(-shards // self.window)

    def _samples(self, step: int, begin: int, end: int) -> NDArray[np.int64]:
        parts = [self.order(s.window)[s.first : s.first + s.count] for s in self.spans(step, begin, end)]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def micro_batches(batch_size: int, world: int, largest: int) -> tuple[int, int]:
    """How a rank cuts its slice: the same for every rank, so that none waits for another.

    Args:
        batch_size: G, samples a step over all ranks.
        world: W, number of ranks.
        largest: the most samples that a rank can hold at once.

    Returns:
        (A, m): A micro batches of m <= largest samples with A * m >= ceil(G / W): the fewest micro batches, and among
        those the least padding, which is then below A samples a rank. (Padding alone is no aim: it is zero at m = 1.)

    Raises:
        ValueError: a number is less than 1.
    """
    for name, value in (("batch_size", batch_size), ("world", world), ("largest", largest)):
        if value < 1:
            raise ValueError(f"{name}: {value} is less than 1; use a positive number")
    slice_size = -(-batch_size // world)
    count = -(-slice_size // largest)
    return count, -(-slice_size // count)


def _share(total: int, parts: int, part: int) -> tuple[int, int]:
    """[begin, end) of a part when `total` things are dealt out like cards and then laid side by side."""
    each, rest = divmod(total, parts)
    begin = part * each + min(part, rest)
    return begin, begin + each + (part < rest)


def _part_of(thing: int, total: int, parts: int) -> int:
    """Which part of `_share` a thing lies in."""
    each, rest = divmod(total, parts)
    in_larger = rest * (each + 1)
    return thing // (each + 1) if thing < in_larger else rest + (thing - in_larger) // each
