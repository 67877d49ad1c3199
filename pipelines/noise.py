"""All randomness of the project, as pure functions of (seed, purpose, step, place).

A sample's noise depends on its place in the global batch, not on the process that draws it: any slice of a batch,
drawn by any number of workers, holds the same numbers. The source is Philox 4x64 (Salmon et al. 2011, "Parallel
random numbers: as easy as 1, 2, 3"), a function from a key and a counter to random words that has no other state.

    key     = (seed, purpose)
    counter = (0, 0, place, step)      least significant word first

Philox counts upwards in the first word and carries into the second, so every (step, place) owns 2^128 counter values
and neighbouring streams cannot overlap. The words are fixed for ever; what numpy's Generator makes of them (normal,
permutation) is stable for one numpy version, so workers of one run share one version.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_WORD = 2**64


class Purpose(IntEnum):
    """What a stream is for. The values are part of the data order: append, never renumber."""

    ORDER = 0
    AUGMENTATION = 1
    SLOTS = 2
    GATE = 3
    SCENES = 4
    WEIGHTS = 5
    INPUTS = 6
    BOOTSTRAP = 7


def generator(seed: int, purpose: Purpose, step: int = 0, place: int = 0) -> np.random.Generator:
    """The stream that belongs to one (seed, purpose, step, place), from its beginning.

    Args:
        seed, step, place: integers in [0, 2^64). `step` and `place` are whatever two numbers tell the streams of a
            purpose apart: training step and place in the global batch, epoch and window, shard and 0.
        purpose: keeps streams for different uses apart.

    Raises:
        ValueError: a number is outside [0, 2^64).
    """
    for name, value in (("seed", seed), ("step", step), ("place", place)):
        if not 0 <= value < _WORD:
            raise ValueError(f"{name}: {value} is outside [0, 2^64); use a non-negative integer below 2^64")
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, place, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def normal(
    seed: int, purpose: Purpose, step: int, places: Sequence[int] | NDArray[np.int64], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Standard normal noise, one independent block per place.

    Args:
        places: N places in the global batch; the same place gives the same block wherever it stands.
        shape: shape of one block.

    Returns:
        float32 [N, *shape].

    Raises:
        ValueError: seed, step or a place is outside [0, 2^64).
    """
    noise = np.empty((len(places), *shape), dtype=np.float32)
    for row, place in enumerate(places):
        noise[row] = generator(seed, purpose, step, int(place)).standard_normal(shape, dtype=np.float32)
    return noise


def gumbel(
    seed: int, purpose: Purpose, step: int, places: Sequence[int] | NDArray[np.int64], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Standard Gumbel noise (location 0, scale 1), one independent block per place; otherwise as `normal`.

    Returns:
        float32 [N, *shape], finite.
    """
    noise = np.empty((len(places), *shape), dtype=np.float32)
    for row, place in enumerate(places):
        noise[row] = generator(seed, purpose, step, int(place)).gumbel(size=shape)
    return noise
