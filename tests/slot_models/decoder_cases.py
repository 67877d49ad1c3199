"""What the tests of decoders share."""

import torch
from hypothesis import strategies as st
from torch import Tensor


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


sizes = {
    "batch": st.integers(1, 3),
    "num_slots": st.integers(1, 5),
    "slot_dim": st.integers(1, 6),
    "height": st.integers(3, 5),
    "width": st.integers(3, 5),
    "seed": st.integers(0, 1000),
}
