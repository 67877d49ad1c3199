"""What happens to the slots between two passes, and its derivative: layers on R = B x K rows.

Every layer has a twin that takes the gradient of its result. The gradients of matrices are products over the rows of
all iterations: the twins leave them to the caller, who takes each in the end at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_tanh_backward, _sigmoid_backward = torch.ops.aten.tanh_backward.default, torch.ops.aten.sigmoid_backward.default
_threshold_backward = torch.ops.aten.threshold_backward.default
layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


class Normed(NamedTuple):
    """A LayerNorm's result [R, D], and the mean and 1 / standard deviation [R, 1] of its input."""

    rows: Tensor
    mean: Tensor
    rstd: Tensor


def normalise(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Normed:
    return Normed(*torch.native_layer_norm(rows, rows.shape[-1:], weight, bias, eps))


def normalise_backward(
    d_normed: Tensor, rows: Tensor, normed: Normed, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows, the weight and the bias."""
    return layer_norm_backward(  # type: ignore[no-any-return]
        d_normed, rows, rows.shape[-1:], normed.mean, normed.rstd, weight, bias, [True, True, True]
    )


class GRUWeights(NamedTuple):
    """As torch.nn.GRUCell has them: gates reset, update, new."""

    inputs: Tensor
    hidden: Tensor
    inputs_bias: Tensor
    hidden_bias: Tensor


class GRUState(NamedTuple):
    """What the derivative of a GRU cell needs: both gates [R, 2D], the hidden part of the new state and the new one."""

    gates: Tensor
    from_hidden: Tensor
    new: Tensor


def gru(updates: Tensor, slots: Tensor, weights: GRUWeights) -> tuple[Tensor, GRUState]:
    dim = slots.shape[1]
    from_updates = functional.linear(updates, weights.inputs, weights.inputs_bias)  # [R, 3D]
    from_slots = functional.linear(slots, weights.hidden, weights.hidden_bias)
    gates_from_updates, from_inputs = from_updates.split_with_sizes([2 * dim, dim], dim=1)
    gates_from_slots, from_hidden = from_slots.split_with_sizes([2 * dim, dim], dim=1)
    gates = (gates_from_updates + gates_from_slots).sigmoid_()
    reset, keep = gates.split_with_sizes([dim, dim], dim=1)
    new = torch.addcmul(from_inputs, reset, from_hidden).tanh_()
    return torch.lerp(new, slots, keep), GRUState(gates, from_hidden, new)


def gru_backward(
    d_next: Tensor, slots: Tensor, state: GRUState, weights: GRUWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the updates, the slots, and of what the two linear layers gave [R, 3D]."""
    dim = slots.shape[1]
    reset, keep = state.gates.split_with_sizes([dim, dim], dim=1)
    d_slots = d_next * keep
    d_new = _tanh_backward(d_next - d_slots, state.new)
    d_gates = torch.cat([d_new * state.from_hidden, d_next * (slots - state.new)], dim=1)
    d_gates = _sigmoid_backward(d_gates, state.gates)
    d_from_updates = torch.cat([d_gates, d_new], dim=1)
    d_from_slots = torch.cat([d_gates, d_new * reset], dim=1)
    d_slots.addmm_(d_from_slots, weights.hidden)
    return torch.mm(d_from_updates, weights.inputs), d_slots, d_from_updates, d_from_slots


class MLPWeights(NamedTuple):
    hidden: Tensor
    hidden_bias: Tensor
    out: Tensor
    out_bias: Tensor


def mlp(rows: Tensor, weights: MLPWeights) -> tuple[Tensor, Tensor]:
    """The result, and the hidden layer after its ReLU."""
    hidden = functional.linear(rows, weights.hidden, weights.hidden_bias).relu_()
    return functional.linear(hidden, weights.out, weights.out_bias), hidden


def mlp_backward(d_out: Tensor, hidden: Tensor, weights: MLPWeights) -> tuple[Tensor, Tensor]:
    """Gradients of the rows, and of what the hidden layer gave before its ReLU."""
    d_hidden = _threshold_backward(torch.mm(d_out, weights.out), hidden, 0)
    return torch.mm(d_hidden, weights.hidden), d_hidden


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One after the other; without a copy where there is but one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def summed(parts: Sequence[Tensor]) -> Tensor:
    """Their sum; the part itself where there is but one."""
    return sum(parts[1:], start=parts[0])
