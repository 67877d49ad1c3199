"""A layer's response to broadcast slots against the convolution of the whole grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_oracles import distance, gradients
from torch import Tensor
from torch.nn import functional

from slot_models.broadcast import Broadcast, convolution_taps, transposed_taps


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60)
@given(
    transposed=st.booleans(),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 3),
    before=st.integers(0, 3),
    count=st.integers(1, 3),
    on_avx2=st.booleans(),
)
def test_values_and_gradients_are_those_of_convolving_slot_plus_position_at_every_cell(
    transposed: bool, height: int, width: int, kernel: int, stride: int, before: int, count: int, on_avx2: bool
) -> None:
    dim, channels = 3, 2
    before = min(before, kernel - 1)
    kernel, stride = (kernel, stride) if transposed else (kernel // 2 * 2 + 1, 1)
    leaves = {
        "slots": normal(count, dim, seed=0).requires_grad_(),
        "position": normal(1, dim, height, width, seed=1).requires_grad_(),
        "kernel": normal(dim, channels, kernel, kernel, seed=2).requires_grad_(),
        "bias": normal(channels, seed=3).requires_grad_(),
    }
    slots, position, weight, bias = leaves.values()

    def layer(grid: Tensor) -> Tensor:
        if not transposed:
            return functional.conv2d(grid, weight.transpose(0, 1), bias, padding=kernel // 2)
        whole = functional.conv_transpose2d(grid, weight, bias, stride)  # every row and column that a pixel reaches
        more = functional.pad(whole - bias[:, None, None], (0, stride * width, 0, stride * height))  # or does not
        more = more[:, :, before : before + stride * height, before : before + stride * width]
        return more + bias[:, None, None]

    expected = layer(position + slots[:, :, None, None]).relu()
    if transposed:
        rows, columns = (transposed_taps(size, kernel, stride, before) for size in (height, width))
    else:
        rows, columns = (convolution_taps(size, kernel) for size in (height, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slot_models.broadcast._ON_AVX2", on_avx2)
        ours = Broadcast(rows, columns).double()(slots, weight, layer(position))
    assert ours.is_contiguous(memory_format=torch.contiguous_format if on_avx2 else torch.channels_last)
    assert distance(ours, expected) <= 1e-12

    direction = normal(*expected.shape, seed=4)
    mine, theirs = (gradients((result * direction).sum(), leaves) for result in (ours, expected))
    assert mine.keys() == leaves.keys()
    assert all(distance(mine[name], theirs[name]) <= 1e-12 for name in leaves)


@pytest.mark.parametrize(("size", "kernel", "kinds"), [(35, 5, 5), (3, 3, 3), (4, 7, 4), (9, 1, 1)])
def test_a_convolutions_rows_are_of_few_kinds(size: int, kernel: int, kinds: int) -> None:
    taps = convolution_taps(size, kernel)
    assert taps.shape == (size, kernel) and len({tuple(row) for row in taps.tolist()}) == kinds
