"""The passes over the inputs, each by whichever implementation fits.

What the slots ask and get are rows [B, R, C + 1], R = H x K: to them the normed inputs [B, N, C] have one more channel,
always 1, so the last number of a query is added to its logits, and that of a weighted sum is the sum of the weights.
The first C numbers of a query are centred over the channels, and those of a sum are known but for a multiple of ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from slot_models.iterations import blocks
from slot_models.iterations.weights import Rules, Weights
from slot_models.precision import at_least_float


class Reading(NamedTuple):
    """Inputs, and what normalises them."""

    inputs: Tensor  # [B, N, C]
    mean: Tensor  # [B, N]
    rstd: Tensor  # [B, N], 0 where masked
    mask: Tensor | None  # bool [B, N]


def fit(inputs: Tensor, slots: Tensor, rules: Rules, weights: Weights) -> bool:
    """Whether passes over the inputs themselves are the way, and there is one for these."""
    return (
        rules.absorb
        and inputs.device.type == "cpu"
        and weights.to_key.dtype == slots.dtype == at_least_float(inputs).dtype
        and min(inputs.numel(), slots.numel()) > 0
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def read(inputs: Tensor, norm_eps: float, mask: Tensor | None) -> Reading:
    inputs = inputs.contiguous()
    return Reading(inputs, *blocks.statistics(inputs, norm_eps, mask), mask)


def pool(reading: Reading, rows: Tensor, groups: int, added: float) -> Tensor:
    """Slots compete and pool what they win: sums [B, R, C + 1] of the normed inputs.

    The weights are the softmax of the logits over the R / groups rows of a group, plus `added`; 0 for a masked input.
    """
    return blocks.pool(reading.inputs, reading.rstd, rows, reading.mask, groups, added)


def pool_backward(reading: Reading, rows: Tensor, d_sums: Tensor, groups: int, added: float) -> Tensor:
    """The gradient of the rows, from that of the sums; its first C numbers are known but for a multiple of ones."""
    return blocks.pool_backward(reading.inputs, reading.rstd, rows, d_sums, reading.mask, groups, added)


def pool_backward_all(
    reading: Reading, rows: Tensor, d_sums: Tensor, groups: int, added: float
) -> tuple[Tensor, Tensor]:
    """The gradient of the inputs before their LayerNorm through T passes, [B, T, R, C + 1] each, and that of the rows
    of the first pass."""
    return blocks.pool_backward_all(
        reading.inputs, reading.mean, reading.rstd, rows, d_sums, reading.mask, groups, added
    )
