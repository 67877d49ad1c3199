"""The data order: which samples a step sees, as a pure function of (index, batch size, seed, step). numpy only.

Every shard is cut into parts. An epoch's parts are permuted, laid end to end, and cut at sample granularity into
`lanes` that differ by at most one sample. Inside a lane every few parts form a window, and each window is shuffled on
its own. Position j of an epoch is entry j // lanes of lane j % lanes:

    parts, permuted     | 4c | 1a  | 6a | 0b   | 4a  | 2d| 3b |
    lanes               |------- lane 0 -------|-- lane 1 ----|
    windows (of 3)      |------ 0 -------|- 1 -|----- 0 ------|    each shuffled
    a step takes        ^^^                    ^^^                 batch / lanes from each, lane by lane

Whoever holds a part of the set at a time sees a shard only around the time it is read: behind a buffer, a place in the
epoch tells nearly which shards its samples come from. Parts of a shard come at times of their own, so a batch shows as
many shards as behind a buffer of several times the memory, and shards drift through the epoch far less. It costs
smaller reads, and before a shard's first part is used the whole of it is checked (benchmarks/shuffle.py measures both).

Nothing here knows how many workers there are until `rank_slice` cuts the finished batch, so the order cannot depend on
it. Memory is a few numbers for each part and one window per open lane; any step costs the same.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.index import Index, Shard, index_from_counts
from pipelines.noise import Purpose, generator
from pipelines.order import Order, Piece, Span, Window, micro_batches

__all__ = ["PARTS", "Index", "Piece", "Plan", "Shard", "Span", "Window", "index_from_counts", "micro_batches"]

PARTS = 4


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts that shards are cut into: int64 [P] each.

    Fields:
        shard: which shard a part is of.
        first: its first row there.
        samples: its number of rows, at least 1.
    """

    shard: NDArray[np.int64]
    first: NDArray[np.int64]
    samples: NDArray[np.int64]

    @classmethod
    def of(cls, samples: NDArray[np.int64], most: int) -> "_Parts":
        """Cut shards of so many samples, int64 [S], into `most` parts each that are as equal as can be."""
        count = np.minimum(samples, most)  # [S]
        shard = np.repeat(np.arange(len(samples)), count)  # [P]
        number = np.arange(len(shard)) - np.repeat(np.cumsum(count) - count, count)  # [P] of the part in its shard
        first = samples[shard] * number // count[shard]
        return cls(shard, first, samples[shard] * (number + 1) // count[shard] - first)


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The parts of an epoch, permuted: `parts` int64 [P]; `bounds` int64 [P + 1], the position where each begins."""

    parts: NDArray[np.int64]
    bounds: NDArray[np.int64]


class Plan(Order):
    """The order of a set of shards: every sample exactly once an epoch, whose last step may be short.

    Args:
        index: the set.
        batch_size: G, samples a step over all workers.
        seed: of the order.
        lanes: wish; the largest divisor of the batch size not above it is used.
        window: shards' worth of samples that are shuffled together inside a lane.
        parts: parts that a shard is cut into; 1 reads each shard in one go.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self, index: Index, *, batch_size: int, seed: int, lanes: int = 8, window: int = 1, parts: int = PARTS
    ) -> None:
        numbers = {"batch_size": batch_size, "lanes": lanes, "window": window, "parts": parts}
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}: {value} is less than 1; use a positive number")
        generator(seed, Purpose.ORDER)  # refuses a seed out of range now, not at the first step
        self.index = index
        self.batch_size = batch_size
        self.seed = seed
        self.lanes = next(n for n in range(min(lanes, batch_size), 0, -1) if batch_size % n == 0)
        self.window = window
        self.parts = parts
        self.steps_per_epoch = -(-index.num_samples // batch_size)
        self._cut = _Parts.of(np.diff(index.offsets), parts)
        # Around a step: two epochs, and in each lane the window that ends and the one that begins.
        self._epoch = lru_cache(maxsize=2)(self._permuted)
        self._shuffled = lru_cache(maxsize=2 * self.lanes)(self._order)

    def __reduce__(self) -> tuple[Any, ...]:
        # Caches do not travel between processes.
        build = partial(Plan, batch_size=self.batch_size, seed=self.seed, lanes=self.lanes, window=self.window)
        return partial(build, parts=self.parts), (self.index,)

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

    def pieces(self, window: Window) -> list[Piece]:
        epoch = self._epoch(window.epoch)
        begin, end = self._window_bounds(window)
        opening = int(np.searchsorted(epoch.bounds, begin, side="right")) - 1
        closing = int(np.searchsorted(epoch.bounds, end, side="left"))
        pieces = []
        for position in range(opening, closing):
            part = epoch.parts[position]
            row = int(self._cut.first[part]) - int(epoch.bounds[position])  # of the epoch's first position
            low, high = max(begin, int(epoch.bounds[position])), min(end, int(epoch.bounds[position + 1]))
            pieces.append(Piece(int(self._cut.shard[part]), row + low, row + high))
        return pieces

    def order(self, window: Window) -> NDArray[np.int64]:
        return self._shuffled(window)

    @property
    def window_bytes(self) -> int:
        bytes = np.array([shard.bytes for shard in self.index.shards])[self._cut.shard]  # [P]
        each = bytes * self._cut.samples / np.diff(self.index.offsets)[self._cut.shard]  # [P] as if samples were alike
        return ceil(float(np.sort(each)[-self.window * self.parts :].sum()))

    def open_lanes(self, world: int) -> int:
        return min(self.lanes, -(-self.lanes // world) + 1)

    # --- inside --------------------------------------------------------------------------------------------------

    def _size(self, step: int) -> int:
        first = (step % self.steps_per_epoch) * self.batch_size
        return min(self.batch_size, self.index.num_samples - first)

    def _spans(self, step: int, begin: int, end: int) -> list[Span]:
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.batch_size
        return self.stretch(epoch, first, first + self.size(step), begin, end)

    def _permuted(self, epoch: int) -> _Epoch:
        parts = generator(self.seed, Purpose.ORDER, step=epoch).permutation(len(self._cut.shard))  # [P]
        return _Epoch(parts, np.concatenate([[0], np.cumsum(self._cut.samples[parts])]))

    def _order(self, window: Window) -> NDArray[np.int64]:
        rows = [
            np.arange(piece.first, piece.last, dtype=np.int64) + self.index.offsets[piece.shard]
            for piece in self.pieces(window)
        ]
        # Place 0 belongs to the permutation of parts, hence lane + 1.
        stream = generator(self.seed, Purpose.ORDER, step=window.epoch, place=(window.lane + 1) << 32 | window.number)
        order = stream.permutation(np.concatenate(rows))
        order.flags.writeable = False  # it is shared through the cache
        return order

    def _lane_spans(self, epoch: int, lane: int, first: int, last: int) -> list[Span]:
        """Entries [first, last) of a lane, cut at the windows' ends."""
        lane_begin, _ = _share(self.index.num_samples, self.lanes, lane)
        bounds = self._epoch(epoch).bounds
        opening, parts, windows = self._lane_parts(epoch, lane)
        spans = []
        while first < last:
            part = int(np.searchsorted(bounds, lane_begin + first, side="right")) - 1
            window = Window(epoch, lane, _part_of(part - opening, parts, windows))
            begin, end = self._window_bounds(window)
            count = min(last, end - lane_begin) - first
            spans.append(Span(window, lane_begin + first - begin, count))
            first += count
        return spans

    def _window_bounds(self, window: Window) -> tuple[int, int]:
        """The positions [begin, end) of the epoch's laid-out samples that a window covers."""
        lane_begin, lane_end = _share(self.index.num_samples, self.lanes, window.lane)
        bounds = self._epoch(window.epoch).bounds
        opening, parts, windows = self._lane_parts(window.epoch, window.lane)
        first, last = _share(parts, windows, window.number)
        return max(lane_begin, int(bounds[opening + first])), min(lane_end, int(bounds[opening + last]))

    def _lane_parts(self, epoch: int, lane: int) -> tuple[int, int, int]:
        """A lane's first part in the epoch's permutation, how many it touches, and into how many windows they go.

        The windows are as equal as can be: one odd part at the end would hardly be shuffled, and could not replace
        its own bad samples.
        """
        lane_begin, lane_end = _share(self.index.num_samples, self.lanes, lane)
        bounds = self._epoch(epoch).bounds
        opening = int(np.searchsorted(bounds, lane_begin, side="right")) - 1
        parts = int(np.searchsorted(bounds, lane_end, side="left")) - opening
        return opening, parts, -(-parts // (self.window * self.parts))


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
