"""The first layer of a decoder that broadcasts its slots, without the grid that they are broadcast to.

A convolution is linear, so that of slot + position is the position's, shared by all slots and images, plus the slot's.
The slot is the same everywhere, so what a kernel makes of it depends only on which of its taps fall on the grid: away
from the borders all of them. Rows differ in a few kinds of that, columns too, and a slot has one value for each pair.
"""

import numpy as np
import torch
from einops import einsum, rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Taps = NDArray[np.bool_]
_ON_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"


def convolution_taps(size: int, kernel: int) -> Taps:
    """Which taps of a centred convolution fall on the grid, for each of its rows. bool [size, kernel]"""
    inputs = np.arange(size)[:, None] + np.arange(kernel) - kernel // 2
    return (inputs >= 0) & (inputs < size)


def transposed_taps(size: int, kernel: int, stride: int, before: int) -> Taps:
    """Which taps of a transposed convolution, which drops ``before`` rows at the start, bring something to each row.

    Returns:
        bool [size stride, kernel].
    """
    reach = np.arange(size * stride)[:, None] + before - np.arange(kernel)
    taps: Taps = (reach % stride == 0) & (reach >= 0) & (reach < size * stride)
    return taps


class Broadcast(nn.Module):
    """What a kernel makes of slots that are the same all over a grid.

    Args:
        rows: bool [h, k], which of the kernel's taps fall on the grid, for each row of the result.
        columns: bool [w, k], for each column.
    """

    def __init__(self, rows: Taps, columns: Taps) -> None:
        super().__init__()
        row_kinds, row_kind = np.unique(rows, axis=0, return_inverse=True)
        column_kinds, column_kind = np.unique(columns, axis=0, return_inverse=True)
        self.row_kinds: Tensor  # [P, k]
        self.column_kinds: Tensor  # [Q, k]
        self.spread: Tensor  # [h w, P Q], 1 at each position's pair of kinds
        kind = row_kind[:, None] * len(column_kinds) + column_kind  # [h, w]
        spread = kind.reshape(-1, 1) == np.arange(len(row_kinds) * len(column_kinds))
        for name, values in {"row_kinds": row_kinds, "column_kinds": column_kinds, "spread": spread}.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def forward(self, slots: Tensor, kernel: Tensor, shared: Tensor) -> Tensor:
        """slots [N, D], kernel [D, C, k, k], the position's part [1, C, h, w] -> their sum, ReLU, [N, C, h, w].

        The result is in the order that the next convolution is fastest in.
        """
        count, (channels, height) = slots.shape[0], shared.shape[1:3]
        kinds = einsum(kernel, self.row_kinds, self.column_kinds, "d c i j, p i, q j -> p q c d")
        own = functional.linear(slots, rearrange(kinds, "p q c d -> (p q c) d"))
        own = rearrange(own, "n (kind c) -> n kind c", c=channels)
        shared = rearrange(shared, "1 c h w -> 1 (h w) c").expand(count, -1, -1)
        spread = self.spread.expand(count, -1, -1)
        if _channels_last_is_faster(own):
            hidden = torch.baddbmm(shared, spread, own).relu_()  # [N, h w, C]
            return rearrange(hidden, "n (h w) c -> n c h w", h=height)
        hidden = torch.baddbmm(shared.mT, own.mT, spread.mT).relu_()  # [N, C, h w]
        return rearrange(hidden, "n c (h w) -> n c h w", h=height)


def _channels_last_is_faster(slots: Tensor) -> bool:
    """For convolutions: everywhere but on processors with AVX2 alone, and there in half precision."""
    return not _ON_AVX2 or slots.device.type != "cpu" or slots.dtype.itemsize < 4
