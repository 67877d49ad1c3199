"""The passes over the inputs, each by whichever implementation fits: blocks in plain torch, or kernels in Triton.

What the slots ask and get are rows [B, R, W], R = H x K, one number for each channel of the inputs as the slots see
them: the C normed ones, and one more that is always 1 where something needs it. A number in the last channel of a query
is added to its logits, and that of a weighted sum is the sum of the weights. In Triton a pass norms what it reads,
without the LayerNorm's affine part, and has that channel at no cost; in plain torch both are made once.
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
    normed: Tensor | None  # [B, W, N], unless a pass norms what it reads
    mean: Tensor  # [B, N]
    rstd: Tensor  # [B, N]; in Triton 0 where masked
    mask: Tensor | None  # bool [B, N]

    @property
    def constant(self) -> bool:
        """Whether there is a channel that is always 1."""
        return self.normed is None or self.normed.shape[1] > self.inputs.shape[2]


def fit(inputs: Tensor, slots: Tensor, rules: Rules, weights: Weights) -> bool:
    """Whether passes over the inputs themselves are the way, and there is one for these."""
    if not rules.absorb or min(inputs.numel(), slots.numel()) == 0 or torch.compiler.is_exporting():
        return False
    if not weights.to_key.dtype == slots.dtype == at_least_float(inputs).dtype:
        return False
    if in_triton(inputs):
        from slot_models.iterations import kernels

        return kernels.supports(inputs, rules.heads * slots.shape[1] // rules.groups, rules.half)
    return inputs.device.type == "cpu" and not torch.compiler.is_compiling() and not _transformed()


def in_triton(inputs: Tensor) -> bool:
    """Whether Triton is the implementation for inputs on this device."""
    return inputs.is_cuda


def read(inputs: Tensor, weights: Weights, rules: Rules, mask: Tensor | None, slot_mask: Tensor | None) -> Reading:
    """Of inputs [B, N, C] in one piece."""
    if in_triton(inputs):
        mean, rstd = _triton().statistics(inputs, rules.norm_eps, mask)
        return Reading(inputs, None, mean, rstd, mask)
    constant = any(each is not None for each in (weights.key_bias, weights.value_bias, slot_mask))
    norm = weights.norm_inputs, weights.norm_inputs_bias
    return Reading(inputs, *blocks.normalise(inputs, norm, rules.norm_eps, constant), mask)


def pool(reading: Reading, rows: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor | None]:
    """Slots compete and pool what they win: sums [B, R, W], the sums of their weights [B, R, 1], and the attention.

    The weights are the softmax of the logits over the rows of a group, plus what the rules add; 0 for a masked input.
    The softmax is kept for the derivative, [B, R, N], where that is cheaper than to make it again.
    """
    if reading.normed is None:
        known = reading.inputs, reading.mean, reading.rstd
        sums = _triton().pool(*known, rows.contiguous(), rules.groups, rules.added, rules.half)
        return sums, sums[..., -1:], None
    return blocks.pool(reading.normed, rows, reading.mask, rules.groups, rules.added)


def pool_backward(
    reading: Reading, rows: Tensor, d_sums: Tensor, d_total: Tensor | None, attention: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the rows, from those of the sums and of the sums of their weights.

    And that of the logits, where the attention was kept; where it was not, that of the total is added to the sums'.
    """
    if reading.normed is None:
        if d_total is not None:
            d_sums[..., -1:].add_(d_total)  # in place: inputs_backward reads it again
        known = reading.inputs, reading.mean, reading.rstd
        return _triton().pool_backward(*known, rows.contiguous(), d_sums.contiguous(), rules.groups, rules.half), None
    assert attention is not None
    return blocks.pool_backward(reading.normed, d_sums, d_total, attention, rules.groups)


def inputs_backward(
    reading: Reading,
    rows: Sequence[Tensor],
    d_sums: Sequence[Tensor],
    attention: Sequence[Tensor | None],
    d_logits: Sequence[Tensor | None],
    weights: Weights,
    rules: Rules,
    wanted: bool,
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The gradient of the inputs before their LayerNorm through all passes, in their order, if it is wanted.

    And those of the LayerNorm's weight and bias, by their names in Weights, unless the keys and values have them.
    """
    known = reading.inputs, reading.mean, reading.rstd
    if reading.normed is None:
        all_rows, all_d_sums = torch.stack(list(rows), 1), torch.stack(list(d_sums), 1)
        return _triton().inputs_backward(*known, all_rows, all_d_sums, rules.groups, rules.added, rules.half), {}
    kept, d_kept = ([each for each in parts if each is not None] for parts in (attention, d_logits))
    norm = weights.norm_inputs, weights.norm_inputs_bias
    d_inputs, d_weight, d_bias = blocks.inputs_backward(
        *known, reading.mask, norm, rows, d_sums, kept, d_kept, rules.added, wanted
    )
    return d_inputs, {"norm_inputs": d_weight, "norm_inputs_bias": d_bias}


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
