"""A clock that divides all the time that passes among named parts."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestration.profiling.profile import OTHER


class PartClock:
    """Each moment belongs to one part, the innermost that is open, or to ``other``: the parts add up to the whole.

    Args:
        now: seconds.
        settle: called where a part begins or ends, for work that is still queued, such as a GPU's.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, settle: Callable[[], object] = lambda: None
    ) -> None:
        self._now, self._settle = now, settle
        self._open = [OTHER]
        self._seconds: dict[str, float] = {}
        self._since = now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to the part, but for parts within it."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def lap(self) -> dict[str, float]:
        """Seconds of each part since the last lap."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _charge(self) -> None:
        self._settle()
        now = self._now()
        part = self._open[-1]
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now
