"""What every renderer takes and returns."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# Scenes that are asked for by shard have indices of their own: the shard in the high half, the row in the low half.
ROWS = 2**32


@dataclass(frozen=True)
class Scenes:
    """N rendered scenes with their ground truth.

    Fields:
        images: uint8 [N, H, W, 3].
        masks: uint8 [N, H, W], 0 is background, i is the i-th object.
        num_objects: int64 [N]. Each of these objects shows at least one pixel.
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
    """A set of scenes: a frozen dataclass whose fields are the parameters, and pure functions to pictures.

    A renderer inherits from this class and writes `render_range`.
    """

    def render_range(self, seed: int, first: int, count: int) -> Scenes:
        """Scenes `first` .. `first + count - 1`. A scene is a function of (seed, its index) and the fields alone.

        Args:
            seed: other seeds, other scenes.
            first: index of the first scene, 0 or more.
            count: how many, 0 or more.

        Raises:
            ValueError: such scenes cannot be rendered, or an index is outside [0, 2^64).
        """
        ...

    def render(self, seed: int, shard: int, count: int) -> Scenes:
        """Rows 0 .. count - 1 of a shard, where nobody counts scenes across shards: row i is a function of
        (seed, shard, i) and the fields alone."""
        return self.render_range(seed, shard * ROWS, count)


def check_range(field: str, value: tuple[int, int], most: int) -> None:
    """A field must be (fewest, most) objects a scene.

    Raises:
        ValueError: it is not.
    """
    whole = isinstance(value, tuple) and len(value) == 2 and all(type(count) is int for count in value)
    if not (whole and 1 <= value[0] <= value[1] <= most):
        raise ValueError(
            f"{field}: {value} is not a range (fewest, most) within 1 .. {most}; reorder or change the two numbers"
        )
