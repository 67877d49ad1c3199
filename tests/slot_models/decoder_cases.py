"""What the tests of decoders share."""

from collections.abc import Mapping, Sequence

import torch
from hypothesis import strategies as st
from slot_oracles import distance, gradient_distance, gradients
from torch import Tensor


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(ours: Sequence[Tensor], expected: Sequence[Tensor], leaves: Mapping[str, Tensor]) -> None:
    """To 1e-12: the parts themselves, and the gradients of a random combination of them."""
    for mine, theirs in zip(ours, expected, strict=True):
        assert distance(mine, theirs) <= 1e-12

    directions = [normal(*part.shape, seed=4) for part in ours]
    mine, theirs = (
        gradients(sum((part * way).sum() for part, way in zip(parts, directions, strict=True)), leaves)
        for parts in (ours, expected)
    )
    assert mine.keys() == leaves.keys()
    assert gradient_distance(mine, theirs) <= 1e-12


sizes = {
    "batch": st.integers(1, 3),
    "num_slots": st.integers(1, 5),
    "slot_dim": st.integers(1, 6),
    "height": st.integers(3, 5),
    "width": st.integers(3, 5),
    "seed": st.integers(0, 1000),
}
