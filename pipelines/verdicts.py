"""Bad samples, counted and logged; above a limit the run stops."""

import logging
from collections import Counter

from pipelines.errors import DataError
from pipelines.index import Index

logger = logging.getLogger(__name__)


class BadSamples:
    """The bad samples that a reader has met.

    Args:
        index: of the set.
        limit: the most that are accepted; None: 1 % of the set, at least 10.

    Attributes:
        reasons: why each is bad, by its number.
    """

    def __init__(self, index: Index, limit: int | None) -> None:
        self.reasons: dict[int, str] = {}
        self._index = index
        self._limit = max(10, index.num_samples // 100) if limit is None else limit

    def add(self, number: int, reason: str, key: str | None = None) -> None:
        """Count a sample, once; with its key it is logged too (a shard that is bad as a whole has been).

        Raises:
            DataError: it is one too many.
        """
        if number in self.reasons:
            return
        if key is not None:
            shard, row = self._index.locate(number)
            name = self._index.shards[shard].name
            logger.warning("shard %s, key %s (row %d): %s; it is replaced", name, key, row, reason)
        self.reasons[number] = reason
        self.check()

    def check(self) -> None:
        """Refuse to go on above the limit.

        Raises:
            DataError: names the worst shards.
        """
        if len(self.reasons) <= self._limit:
            return
        shards = Counter(self._index.shards[self._index.locate(number)[0]].name for number in self.reasons)
        worst = ", ".join(f"{name} ({count})" for name, count in shards.most_common(3))
        raise DataError(
            f"bad samples: {len(self.reasons)} of {self._index.num_samples}, more than the limit of {self._limit}; "
            f"most in {worst}; the last: {list(self.reasons.values())[-1]}. "
            "Repair these shards, index them again, or raise the limit"
        )
