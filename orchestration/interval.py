"""When to save: every so many steps, or as often as loses least time."""

import math
import time
from collections.abc import Callable

from orchestration.planning.cost import chosen_interval

FIRST_SECONDS = 30.0  # of training before the first checkpoint, which tells what one costs


def mtbf_of_run(hours: float, world: int, ranks_on_a_node: int) -> float:
    """Seconds between failures of any of a run's nodes.

    Args:
        hours: mean time between failures of one node.
        world: ranks of the run.
        ranks_on_a_node: how many share a node, and its failures.
    """
    return hours * 3600 / math.ceil(world / ranks_on_a_node)


class SaveInterval:
    """Rank 0's opinion on whether a checkpoint is due.

    Without a fixed number of steps it is the time between checkpoints that loses least, by Young and Daly, from what
    saving costs here and how often a node is lost.

    Args:
        every: steps between checkpoints; None: by time.
        mtbf: mean seconds between failures of any of the run's nodes.
        now: seconds of a clock that only goes forward.
    """

    def __init__(self, every: int | None, mtbf: float, now: Callable[[], float] = time.monotonic) -> None:
        self._every, self._mtbf, self._now = every, mtbf, now
        self._last, self._seconds = now(), FIRST_SECONDS

    @property
    def seconds(self) -> float:
        """Between checkpoints by time, as it stands."""
        return self._seconds

    def due(self, done: int) -> bool:
        """Whether to save after ``done`` steps."""
        if self._every is not None:
            return done % self._every == 0
        return self._now() - self._last >= self._seconds

    def saved(self, cost: float) -> None:
        """A checkpoint was taken, which cost training so many seconds."""
        self._last = self._now()
        self._seconds = chosen_interval(cost, self._mtbf)
