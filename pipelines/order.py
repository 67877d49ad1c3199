"""What an order of samples is: what every step holds, and from which windows of which shards it comes. numpy only."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.index import Index


@dataclass(frozen=True, slots=True)
class Window:
    """A run of parts of shards inside one lane of one epoch that is shuffled as a whole."""

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


class Order(ABC):
    """A pure function of the step, whoever asks and however many there are.

    Attributes:
        index: the set.
        batch_size: G, samples a step over all workers.
        seed: of the order.
        lanes: streams of windows that a batch is drawn from.
        window: shards' worth of samples that are shuffled together inside a lane.
        parts: parts that a shard is cut into.
        steps_per_epoch: steps after which every sample has come.
    """

    index: Index
    batch_size: int
    seed: int
    lanes: int
    window: int
    parts: int
    steps_per_epoch: int

    # --- steps ---------------------------------------------------------------------------------------------------

    def size(self, step: int) -> int:
        """G', the number of samples of a step: the batch size, or what is left in the last step of an epoch.

        Raises:
            ValueError: the step is negative.
        """
        if step < 0:
            raise ValueError(f"step: {step} is negative; steps count from 0")
        return self._size(step)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Samples of a step in order of place, int64 [G']."""
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
        return self._spans(step, begin, end)

    # --- windows -------------------------------------------------------------------------------------------------

    @abstractmethod
    def pieces(self, window: Window) -> list[Piece]:
        """What a window reads, in order; its pieces are disjoint and never empty."""

    @abstractmethod
    def order(self, window: Window) -> NDArray[np.int64]:
        """A window's samples, shuffled, int64."""

    def replacements(self, window: Window, entry: int) -> Iterator[int]:
        """Samples that may fill the place of a bad one, best first: the rest of its window's order, cyclic.

        Whoever reads the window finds the same first good one.
        """
        order = self.order(window)
        for i in range(1, len(order)):
            yield int(order[(entry + i) % len(order)])

    @property
    @abstractmethod
    def window_bytes(self) -> int:
        """About the most bytes of shards that one window holds."""

    @abstractmethod
    def open_lanes(self, world: int) -> int:
        """The most lanes that a rank reads in a full step."""

    # --- inside --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _size(self, step: int) -> int: ...

    @abstractmethod
    def _spans(self, step: int, begin: int, end: int) -> list[Span]: ...

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
