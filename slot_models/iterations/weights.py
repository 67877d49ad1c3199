"""What a slot attention is made of, as plain tensors and numbers."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from slot_models.attend import Competition, Update
from slot_models.iterations.rows import GRUWeights, MLPWeights


@dataclass(frozen=True)
class Rules:
    """What a slot attention is beside its weights; see attend and SlotAttention.

    absorb: whether queries and updates are projected, rather than the inputs; see absorbing.
    half: whether to multiply in bfloat16, as under its autocast; sums stay in float32.
    affine: whether keys and values take the affine part of the inputs' LayerNorm; see folding.
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
    affine: bool = False

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
