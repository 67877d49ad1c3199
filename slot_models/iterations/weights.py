"""What a slot attention is made of, as plain tensors and numbers."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from slot_models.attend import Competition, Update
from slot_models.iterations.rows import GRUWeights, MLPWeights


@dataclass(frozen=True)
class Rules:
    """What a slot attention is beside its weights; see attend and SlotAttention.

    absorb: whether queries and updates are projected, rather than the inputs; see absorbing.
    half: whether to multiply in bfloat16, as under its autocast; sums stay in float32.
    """

    iterations: int
    absorb: bool
    heads: int
    scale: float
    eps: float
    norm_eps: float
    competition: Competition
    update: Update
    half: bool = False

    @property
    def groups(self) -> int:
        """Groups of competitors among the H x K rows of an image."""
        return self.heads if self.competition == "per_head" else 1

    @property
    def added(self) -> float:
        """To each weight after the softmax."""
        return self.eps if self.update == "mean" else 0.0


def absorbing(iterations: int, heads: int, slots: int, width: int, head_width: int) -> bool:
    """Whether queries and updates are cheaper to project than the inputs [N, width]: the package says at what cost."""
    return (8 * iterations + 1) * heads * slots * width <= 6 * heads * head_width * (width + iterations * slots)


class Weights(NamedTuple):
    """The parameters of a slot attention."""

    norm_inputs: Tensor  # [C]
    norm_inputs_bias: Tensor
    norm_slots: Tensor  # [D]
    norm_slots_bias: Tensor
    to_query: Tensor  # [H d, D]
    query_bias: Tensor | None
    to_key: Tensor  # [H d, C]
    key_bias: Tensor | None
    to_value: Tensor  # [H d, C]
    value_bias: Tensor | None
    combine: Tensor | None  # [D, H d]
    combine_bias: Tensor | None
    gru_inputs: Tensor  # [3D, D or H d]
    gru_hidden: Tensor  # [3D, D]
    gru_inputs_bias: Tensor
    gru_hidden_bias: Tensor
    norm_mlp: Tensor  # [D]
    norm_mlp_bias: Tensor
    mlp_hidden: Tensor  # [F, D]
    mlp_hidden_bias: Tensor
    mlp_out: Tensor  # [D, F]
    mlp_out_bias: Tensor

    @property
    def gru(self) -> GRUWeights:
        return GRUWeights(self.gru_inputs, self.gru_hidden, self.gru_inputs_bias, self.gru_hidden_bias)

    @property
    def mlp(self) -> MLPWeights:
        return MLPWeights(self.mlp_hidden, self.mlp_hidden_bias, self.mlp_out, self.mlp_out_bias)


class Folded(NamedTuple):
    """Keys and values as matrices for normed inputs with one more channel that is always 1; see fold."""

    keys: Tensor  # [H, d, C + 1]
    values: Tensor  # [H, d, C + 1]


def fold(weights: Weights, rules: Rules) -> Folded:
    """Takes the affine part of the inputs' LayerNorm, the biases and the logits' scale into the matrices.

    The rows are centred over the C channels: normed inputs have no mean there, so it changes nothing, and lets a pass
    multiply with inputs that still have theirs.
    """
    return Folded(
        _folded(weights.to_key, weights.key_bias, weights, rules),
        _folded(weights.to_value, weights.value_bias, weights, replace(rules, scale=1.0)),
    )


def _folded(matrix: Tensor, bias: Tensor | None, weights: Weights, rules: Rules) -> Tensor:
    affine = weights.norm_inputs * rules.scale
    away = torch.mv(matrix, affine / -len(affine))[:, None]  # what centres a row
    last = torch.mv(matrix, weights.norm_inputs_bias)
    if bias is not None:
        last = last + bias
    folded = torch.cat([torch.addcmul(away, matrix, affine), (last * rules.scale)[:, None]], dim=1)
    return folded.view(rules.heads, -1, folded.shape[1])


def fold_backward(gradients: Folded, weights: Weights, rules: Rules) -> dict[str, Tensor]:
    """Gradients of the weights that were folded, by their names in Weights."""
    key = _folded_backward(gradients.keys.flatten(0, 1), weights.to_key, weights, rules.scale)
    value = _folded_backward(gradients.values.flatten(0, 1), weights.to_value, weights, 1.0)
    names = ("to_{}", "{}_bias", "norm_inputs", "norm_inputs_bias")
    found = {name.format("key"): gradient for name, gradient in zip(names, key, strict=True)}
    for name, gradient in zip(names, value, strict=True):
        name = name.format("value")
        found[name] = found[name] + gradient if name in found else gradient
    return found


def _folded_backward(d_folded: Tensor, matrix: Tensor, weights: Weights, scale: float) -> tuple[Tensor, ...]:
    """Gradients of the matrix, its bias, and the LayerNorm's affine part."""
    d_product, d_last = d_folded[:, :-1], d_folded[:, -1] * scale
    d_product = d_product - d_product.mean(dim=1, keepdim=True)
    d_affine = (d_product * matrix).sum(dim=0) * scale
    d_matrix = d_product.mul_(weights.norm_inputs * scale).addr_(d_last, weights.norm_inputs_bias)
    return d_matrix, d_last, d_affine, d_last @ matrix
