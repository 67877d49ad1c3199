"""Keys and values as matrices for what a pass multiplies with, so that what applies to all inputs applies to none."""

from typing import NamedTuple

import torch
from torch import Tensor

from slot_models.iterations.weights import Rules, Weights


class Folded(NamedTuple):
    """Matrices for inputs of W channels: the C normed ones, and one more that is always 1 where something needs it."""

    keys: Tensor  # [H d, W]
    values: Tensor  # [H d, W]


def fold(weights: Weights, rules: Rules, affine: bool, constant: bool) -> Folded:
    """Takes the logits' scale into the keys, and the biases into a channel that is always 1.

    Args:
        affine: the inputs are normed without their LayerNorm's affine part, which goes into the matrices as well.
        constant: there is such a channel; biases and an affine part need it.
    """
    keys = _folded(weights.to_key, weights.key_bias, weights, affine, constant) * rules.scale
    values = _folded(weights.to_value, weights.value_bias, weights, affine, constant)
    return Folded(keys, values)


def _folded(matrix: Tensor, bias: Tensor | None, weights: Weights, affine: bool, constant: bool) -> Tensor:
    if not constant:
        return matrix
    last = matrix.new_zeros(len(matrix)) if bias is None else bias
    if affine:
        last = torch.addmv(last, matrix, weights.norm_inputs_bias)
        matrix = matrix * weights.norm_inputs
    return torch.cat([matrix, last[:, None]], dim=1)


def fold_backward(gradients: Folded, weights: Weights, rules: Rules, affine: bool, constant: bool) -> dict[str, Tensor]:
    """Gradients of the weights that were folded, by their names in Weights."""
    found: dict[str, Tensor] = {}
    for name, matrix, d_folded in (
        ("key", weights.to_key, gradients.keys.mul_(rules.scale)),
        ("value", weights.to_value, gradients.values),
    ):
        if constant:
            d_folded, d_last = d_folded[:, :-1], d_folded[:, -1]
            found[f"{name}_bias"] = d_last
        if affine:
            d_affine = {"norm_inputs": (d_folded * matrix).sum(dim=0), "norm_inputs_bias": d_last @ matrix}
            found |= {of: gradient + found[of] if of in found else gradient for of, gradient in d_affine.items()}
            d_folded = torch.addr(d_folded * weights.norm_inputs, d_last, weights.norm_inputs_bias)
        found[f"to_{name}"] = d_folded
    return found
