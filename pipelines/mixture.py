"""Several sets in one batch, by weight, as a pure function of the step. numpy only.

Sample k of set i is due at the time (2 k + 1) / (2 w_i), and the positions of the mixture are given out in order of
that time: the method of Webster and Sainte-Lague, which deals out seats as evenly as whole numbers allow.

    weights 2 : 1 : 1       a b a c  a b a c  ...

So before any position p each set has been handed out w_i p samples, give or take less than the number of sets, and the
counts at p are found directly, whatever p is. The samples of a set come in the order of its own plan, epoch after
epoch, each exactly once an epoch of its set; sets pass their epochs independently of each other, within a step too.

A step is always full. Its batch is ordered by set, then by lane; sets share the lanes by weight. An epoch of the
mixture is the number of steps after which every set has been seen whole at least once. Samples are numbered through:
those of a set come after those of the sets before it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.index import Index
from pipelines.noise import Purpose, generator
from pipelines.order import Order, Piece, Span, Window
from pipelines.plan import PARTS, Plan

__all__ = ["Mixture", "Order"]


class Mixture(Order):
    """The order of several sets, mixed: a step is always full.

    Args:
        sets: index and weight of each; a weight is a positive number, relative to the others.
        index: all sets joined, in the same order.
        batch_size, seed, lanes, window, parts: as of a `Plan`; every set has a lane at least.

    Raises:
        ValueError: a number is out of range, or the joined index is not that of the sets.
    """

    def __init__(
        self,
        sets: Sequence[tuple[Index, float]],
        index: Index,
        *,
        batch_size: int,
        seed: int,
        lanes: int = 8,
        window: int = 1,
        parts: int = PARTS,
    ) -> None:
        if not sets:
            raise ValueError("sets: there is none; name at least one")
        if bad := [weight for _, weight in sets if not 0 < weight < float("inf")]:
            raise ValueError(f"weight: {bad[0]} is not a positive number; leave a set out, or give it a share")
        if index.shards != tuple(shard for part, _ in sets for shard in part.shards):
            raise ValueError("index: its shards are not those of the sets, joined in order")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is less than 1; use a positive number")
        # As written: 0.1 is a tenth, and equal weights are equal.
        weights = [Fraction(str(weight)) for _, weight in sets]
        scale = Fraction(1) / min(weights)
        fractions = [weight * scale for weight in weights]
        common = np.lcm.reduce([fraction.denominator for fraction in fractions], dtype=object)
        self.weights = tuple(int(fraction * common) for fraction in fractions)
        self.index = index
        self.batch_size = batch_size
        self.seed = seed
        self.window = window
        self.parts = parts
        self._sets, self._wish = tuple(sets), lanes
        self._plans = [
            # Each set is permuted by a seed of its own: no epoch number reaches these steps.
            self._plan(part, self._set_seed(i), max(1, round(lanes * weight / sum(self.weights))))
            for i, (part, weight) in enumerate(zip((part for part, _ in sets), self.weights, strict=True))
        ]
        self.lanes = sum(plan.lanes for plan in self._plans)
        self._first_lane = [0, *accumulate(plan.lanes for plan in self._plans)]
        self._first_shard = [0, *accumulate(len(part.shards) for part, _ in sets)]
        self._first_sample = [0, *accumulate(part.num_samples for part, _ in sets)]
        self.steps_per_epoch = self._steps_per_epoch()

    def __reduce__(self) -> tuple[Any, ...]:
        build = partial(Mixture, batch_size=self.batch_size, seed=self.seed, lanes=self._wish, window=self.window)
        return partial(build, parts=self.parts), (self._sets, self.index)

    # --- steps ---------------------------------------------------------------------------------------------------

    def counts(self, position: int) -> tuple[int, ...]:
        """How many of the first `position` samples of the mixture come from each set."""
        # All that is due by a time by which `position` are at most, whatever the rounding; then one by one.
        total, known = sum(self.weights), max(0, position - len(self.weights))
        counts = [(2 * known * weight + total) // (2 * total) for weight in self.weights]
        while sum(counts) < position:
            earliest = min(range(len(counts)), key=lambda i: self._due(i, counts[i]))
            counts[earliest] += 1
        return tuple(counts)

    def _size(self, step: int) -> int:
        return self.batch_size

    def _spans(self, step: int, begin: int, end: int) -> list[Span]:
        size = self.batch_size
        before, after = self.counts(step * size), self.counts((step + 1) * size)
        spans: list[Span] = []
        place = 0
        for i, plan in enumerate(self._plans):
            position, samples = before[i], plan.index.num_samples
            while position < after[i]:  # once, and once more for each epoch of the set that ends here
                epoch, first = divmod(position, samples)
                count = min(samples - first, after[i] - position)
                low, high = max(begin - place, 0), min(end - place, count)
                if low < high:
                    spans += [
                        replace(span, window=replace(span.window, lane=self._first_lane[i] + span.window.lane))
                        for span in plan.stretch(epoch, first, first + count, low, high)
                    ]
                position, place = position + count, place + count
        return spans

    # --- windows -------------------------------------------------------------------------------------------------

    def pieces(self, window: Window) -> list[Piece]:
        i, inner = self._inside(window)
        return [replace(piece, shard=self._first_shard[i] + piece.shard) for piece in self._plans[i].pieces(inner)]

    def order(self, window: Window) -> NDArray[np.int64]:
        i, inner = self._inside(window)
        return self._plans[i].order(inner) + self._first_sample[i]

    @property
    def window_bytes(self) -> int:
        return max(plan.window_bytes for plan in self._plans)

    def open_lanes(self, world: int) -> int:
        """The most lanes that a rank reads in a step: all, since a set's epoch may end within its slice."""
        return self.lanes

    # --- inside --------------------------------------------------------------------------------------------------

    def _due(self, i: int, k: int) -> tuple[Fraction, int]:
        return Fraction(2 * k + 1, 2 * self.weights[i]), i

    def _steps_per_epoch(self) -> int:
        low, high = 1, 1
        while not self._all_seen(high):
            low, high = high + 1, 2 * high
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._all_seen(middle) else (middle + 1, high)
        return low

    def _all_seen(self, steps: int) -> bool:
        counts = self.counts(steps * self.batch_size)
        return all(count >= plan.index.num_samples for count, plan in zip(counts, self._plans, strict=True))

    def _inside(self, window: Window) -> tuple[int, Window]:
        """The set of a window, and the window as the set's own plan knows it."""
        i = bisect_right(self._first_lane, window.lane) - 1
        return i, replace(window, lane=window.lane - self._first_lane[i])

    def _plan(self, index: Index, seed: int, lanes: int) -> Plan:
        return Plan(index, batch_size=lanes, seed=seed, lanes=lanes, window=self.window, parts=self.parts)

    def _set_seed(self, i: int) -> int:
        return int(generator(self.seed, Purpose.ORDER, step=2**64 - 1 - i).integers(2**63))
