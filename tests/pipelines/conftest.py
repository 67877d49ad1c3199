"""Small real sets of shards."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.index import Index
from pipelines.samples import encode
from pipelines.shards import write_index, write_shard

MakeSet = Callable[..., Index]


def picture(number: int) -> np.ndarray:
    """An 8x6 image that tells its number in the set: uint8 [8, 6, 3]."""
    image = np.zeros((8, 6, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = number % 256, number // 256
    return image


@pytest.fixture
def make_set() -> MakeSet:
    """Write shards of the given sizes; sample n of the set holds `picture(n)`, its row's masks and n % 5 objects."""

    def make(folder: Path, counts: list[int], change: dict[int, dict[str, bytes | None]] | None = None) -> Index:
        shards, number = [], 0
        for shard, count in enumerate(counts):
            samples = []
            for row in range(count):
                masks = np.full((8, 6), row % 4, dtype=np.uint8)
                members = encode(f"s{shard}r{row}", picture(number), masks, {"num_objects": number % 5})
                for name, data in (change or {}).get(number, {}).items():
                    members.pop(name, None)
                    if data is not None:
                        members[name] = data
                samples.append(members)
                number += 1
            shards.append(write_shard(folder, f"{shard:03d}.tar", samples))
        return write_index(folder, shards, {"made": "for a test"})

    return make
