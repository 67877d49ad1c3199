"""Keys and values as matrices that take what would otherwise be done to each input: biases, LayerNorm's affine part."""

from typing import NamedTuple

import torch
from torch import Tensor

from slot_models.iterations.weights import Rules, Weights


class Folded(NamedTuple):
    """Matrices for inputs of W channels: the C normed ones, and one more that is always 1 where something needs it."""

    keys: Tensor  # [H d, W]
    values: Tensor  # [H d, W]


def fold(weights: Weights, rules: Rules, constant: bool) -> Folded:
    """Takes the logits' scale into the keys, and what the rules and the biases ask for into both.

    Args:
        constant: there is a channel that is always 1; biases and an affine part need it.
    """
    keys = _folded(weights.to_key, weights.key_bias, weights, rules, constant) * rules.scale
    values = _folded(weights.to_value, weights.value_bias, weights, rules, constant)
    return Folded(keys, values)


def _folded(matrix: Tensor, bias: Tensor | None, weights: Weights, rules: Rules, constant: bool) -> Tensor:
    if not constant:
        return matrix
    last = matrix.new_zeros(len(matrix)) if bias is None else bias
    if rules.affine:
        last = torch.addmv(last, matrix, weights.norm_inputs_bias)
        matrix = matrix * weights.norm_inputs
    return torch.cat([matrix, last[:, None]], dim=1)


def fold_backward(gradients: Folded, weights: Weights, rules: Rules, constant: bool) -> dict[str, Tensor]:
    """Gradients of the weights that were folded, by their names in Weights."""
    found: dict[str, Tensor] = {}
    for name, matrix, d_folded in (
        ("key", weights.to_key, gradients.keys.mul_(rules.scale)),
        ("value", weights.to_value, gradients.values),
    ):
        if constant:
            d_folded, d_last = d_folded[:, :-1], d_folded[:, -1]
            found[f"{name}_bias"] = d_last
        if rules.affine:
            d_affine = {"norm_inputs": (d_folded * matrix).sum(dim=0), "norm_inputs_bias": d_last @ matrix}
            found |= {of: gradient + found[of] if of in found else gradient for of, gradient in d_affine.items()}
            d_folded = torch.addr(d_folded * weights.norm_inputs, d_last, weights.norm_inputs_bias)
        found[f"to_{name}"] = d_folded
    return found
