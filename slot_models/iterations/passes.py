"""The passes over the inputs, each by whichever implementation fits: blocks in plain torch, or kernels in Triton.

What the slots ask and get are rows [B, R, C + 1], R = H x K: to them the normed inputs [B, N, C] have one more channel,
always 1, so the last number of a query is added to its logits, and that of a weighted sum is the sum of the weights.
The first C numbers of a query are centred over the channels, and those of a sum are known but for a multiple of ones.
"""

from collections.abc import Sequence
from types import ModuleType
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
    if not rules.absorb or min(inputs.numel(), slots.numel()) == 0 or torch.compiler.is_exporting():
        return False
    if not weights.to_key.dtype == slots.dtype == at_least_float(inputs).dtype:
        return False
    if in_triton(inputs):
        from slot_models.iterations import kernels

        return kernels.supports(inputs, rules.heads * slots.shape[1] // rules.groups)
    return inputs.device.type == "cpu" and not torch.compiler.is_compiling() and not _transformed()


def in_triton(inputs: Tensor) -> bool:
    """Whether Triton is the implementation for inputs on this device."""
    return inputs.is_cuda


def read(inputs: Tensor, rules: Rules, mask: Tensor | None) -> Reading:
    inputs = inputs.contiguous()
    implementation = _triton() if in_triton(inputs) else blocks
    mean, rstd = implementation.statistics(inputs, rules.norm_eps, mask)
    return Reading(inputs, mean, rstd, mask)


def pool(reading: Reading, rows: Tensor, rules: Rules) -> tuple[Tensor, Tensor | None]:
    """Slots compete and pool what they win: sums [B, R, C + 1] of the normed inputs, and the attention.

    The weights are the softmax of the logits over the rows of a group, plus what the rules add; 0 for a masked input.
    The softmax is kept for the derivative, [B, R, N], where that is cheaper than to make it again.
    """
    if in_triton(reading.inputs):
        return _triton().pool(*reading[:3], rows.contiguous(), rules.groups, rules.added, rules.half), None
    return blocks.pool(reading.inputs, reading.rstd, rows, reading.mask, rules.groups, rules.added)


def pool_backward(
    reading: Reading, rows: Tensor, d_sums: Tensor, attention: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the rows, from that of the sums; its first C numbers are known but for a multiple of ones.

    And that of the logits, where the attention was kept.
    """
    if attention is None:
        rows, d_sums = rows.contiguous(), d_sums.contiguous()
        return _triton().pool_backward(*reading[:3], rows, d_sums, rules.groups, rules.half), None
    return blocks.pool_backward(reading.inputs, reading.rstd, d_sums, attention, rules.groups)


def inputs_backward(
    reading: Reading,
    rows: Sequence[Tensor],
    d_sums: Sequence[Tensor],
    attention: Sequence[Tensor | None],
    d_logits: Sequence[Tensor | None],
    rules: Rules,
) -> Tensor:
    """The gradient of the inputs before their LayerNorm through all passes, in their order."""
    kept, d_kept = ([each for each in parts if each is not None] for parts in (attention, d_logits))
    if not kept:
        d_inputs: Tensor = _triton().inputs_backward(
            *reading[:3],
            torch.stack(list(rows), 1),
            torch.stack(list(d_sums), 1),
            rules.groups,
            rules.added,
            rules.half,
        )
        return d_inputs
    return blocks.inputs_backward(*reading[:3], rows, d_sums, kept, d_kept, rules.added)


def _triton() -> ModuleType:
    """The kernels, or what a compiler makes of them."""
    if torch.compiler.is_compiling():
        from slot_models.iterations import operators

        return operators
    from slot_models.iterations import kernels

    return kernels


def _transformed() -> bool:
    """Whether torch.func is at work, which differentiates what it sees."""
    return torch._C._are_functorch_transforms_active()
