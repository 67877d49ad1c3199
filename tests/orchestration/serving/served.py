"""The model that these tests serve, untrained, and images for it."""

import numpy as np
from numpy.typing import NDArray

FIELDS = {
    "name": "served",
    "data": {"scenes": {"pieces": [1, 3], "grid": 5, "cell": 4, "train": 200, "eval": 30, "per_shard": 50}},
    "model": {
        "image_size": 20,
        "num_slots": 4,
        "slot_dim": 16,
        "encoder": {"channels": 8, "strides": [2, 1]},
        "attention": {"hidden_dim": 16},
        "gate": {"keep_bias": 0.0},
        "decoder": {"channels": 8, "layers": 2, "kernel": 3, "patch": 2},
    },
    "train": {"steps": 12, "batch_size": 16, "learning_rate": 1e-2, "warmup_steps": 2, "keep_weight": 0.01},
}
SIDE = 20


def photo(number: int, height: int = SIDE, width: int = SIDE) -> NDArray[np.uint8]:
    """Blocks of colour, so that slots differ; uint8 [height, width, 3]."""
    random = np.random.Generator(np.random.Philox(key=[number, 7]))
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    return coarse[rows][:, columns]
