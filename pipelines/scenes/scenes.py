"""What every renderer returns."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scenes:
    """N rendered scenes with their ground truth.

    Fields:
        images: uint8 [N, H, W, 3].
        masks: uint8 [N, H, W], 0 is background, i is the i-th object.
        num_objects: int64 [N].
        factors: per name an array [N, M] or [N, M, ...], M the largest number of objects; entries at or beyond
            `num_objects` are padding and hold -1.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    num_objects: NDArray[np.int64]
    factors: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.images)


class Renderer(Protocol):
    """A pure function from (seed, shard, row) to scenes: row i is the same however many rows are rendered."""

    def render(self, seed: int, shard: int, count: int) -> Scenes:
        """Rows 0 .. count - 1 of a shard."""
        ...
