"""Made-up scenes and masks for the tests of segmentation metrics."""

import numpy as np
import torch


def scene(
    seed: int, objects: int, num_slots: int, height: int, width: int, agreement: float, batch: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random true masks, and masks without ties whose argmax follows them on a share of the pixels."""
    random = np.random.default_rng(seed)
    true = random.integers(0, objects + 1, (batch, height, width))
    scores = random.random((batch, num_slots, height, width))
    slot_of = random.integers(0, num_slots, objects + 1)
    follows = random.random(true.shape) < agreement
    for slot in range(num_slots):
        scores[:, slot] += follows & (slot_of[true] == slot)
    return torch.from_numpy(true.astype(np.uint8)), torch.from_numpy(scores)
