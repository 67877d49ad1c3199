"""One iteration of slot attention and its derivative: each in two halves, with a pass over the inputs between them.

R is B x K: the slots of all images are rows of one matrix. W is the number of channels that slots see; see passes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from slot_models.iterations.folding import Folded
from slot_models.iterations.rows import (
    GRUState,
    Normed,
    gru,
    gru_backward,
    mlp,
    mlp_backward,
    normalise,
    normalise_backward,
)
from slot_models.iterations.weights import Rules, Weights


class Asked(NamedTuple):
    """What the slots ask of the inputs."""

    slots: Tensor  # [R, D]
    normed: Tensor  # [R, D]; mean and rstd are of this LayerNorm, [R, 1]
    mean: Tensor
    rstd: Tensor
    queries: Tensor  # [R, H d]
    rows: Tensor  # [B, H K, W], queries for the normed inputs


class Taken(NamedTuple):
    """What they get, and become."""

    pooled: Tensor  # [B, H K, W]
    whole: Tensor  # [B or 1, H K or 1, 1], what the weighted sums were divided by
    values: Tensor  # [R, H d]
    updates: Tensor  # [R, D], or the values without a projection of the heads
    gates: Tensor  # these three are the GRU's state
    from_hidden: Tensor
    new: Tensor
    middle: Tensor  # [R, D], between GRU and MLP
    normed: Tensor  # [R, D]; mean and rstd are of this LayerNorm, [R, 1]
    mean: Tensor
    rstd: Tensor
    hidden: Tensor  # [R, F]


class AskedGradients(NamedTuple):
    rows: Tensor  # [B, H K, W]
    queries: Tensor  # [R, H d]
    norm: Tensor  # [D], of the LayerNorm's weight and bias
    norm_bias: Tensor


class TakenGradients(NamedTuple):
    sums: Tensor  # [B, H K, W]
    total: Tensor | None  # [B, H K, 1]
    values: Tensor  # [R, H d]
    updates: Tensor
    from_updates: Tensor  # [R, 3D]
    from_slots: Tensor  # [R, 3D]
    norm: Tensor  # [D], of the LayerNorm's weight and bias
    norm_bias: Tensor
    hidden: Tensor  # [R, F]
    out: Tensor  # [R, D]


def ask(slots: Tensor, batch: int, masked: Tensor | None, weights: Weights, folded: Folded, rules: Rules) -> Asked:
    """From slots [R, D]; masked, bool [B, H K, 1], are the rows that do not compete."""
    normed = normalise(slots, weights.norm_slots, weights.norm_slots_bias, rules.norm_eps)
    queries = functional.linear(normed.rows, weights.to_query, weights.query_bias)
    rows = spread(queries, folded.keys, rules.heads, batch)
    if masked is not None:  # a low number, not -inf: an image without any slot stays finite, in bfloat16 too
        rows = rows.masked_fill(masked, 0.0)
        rows[..., -1:].masked_fill_(masked, torch.finfo(rows.dtype).min / 2)
    return Asked(slots, *normed, queries, rows)


def ask_backward(
    d_rows: Tensor,
    d_slots: Tensor,
    asked: Asked,
    masked: Tensor | None,
    weights: Weights,
    folded: Folded,
    rules: Rules,
) -> tuple[Tensor, AskedGradients]:
    """The gradient of the slots: d_slots, and what comes through their queries."""
    if masked is not None:
        d_rows = d_rows.masked_fill(masked, 0.0)
    d_queries = gather(d_rows, folded.keys, rules.heads)
    d_normed = torch.mm(d_queries, weights.to_query)
    normed = Normed(asked.normed, asked.mean, asked.rstd)
    through, d_norm, d_norm_bias = normalise_backward(
        d_normed, asked.slots, normed, weights.norm_slots, weights.norm_slots_bias
    )
    return through.add_(d_slots), AskedGradients(d_rows, d_queries, d_norm, d_norm_bias)


def take(
    sums: Tensor,
    total: Tensor,
    count: Tensor | None,
    slots: Tensor,
    weights: Weights,
    folded: Folded,
    rules: Rules,
) -> tuple[Tensor, Taken]:
    """The next slots [R, D], from weighted sums of inputs [B, H K, W] and the sums of their weights [B, H K, 1].

    Count [B or 1, 1, 1] is the number of inputs where the update is a sum, and nothing where it is a mean.
    """
    whole = total.clamp(min=rules.eps) if count is None else count  # a mean of no inputs at all is zero
    pooled = sums / whole
    values = updates = gather(pooled, folded.values, rules.heads)
    if weights.combine is not None:
        updates = functional.linear(values, weights.combine, weights.combine_bias)
    middle, state = gru(updates, slots, weights.gru)
    normed = normalise(middle, weights.norm_mlp, weights.norm_mlp_bias, rules.norm_eps)
    out, hidden = mlp(normed.rows, weights.mlp)
    return out.add_(middle), Taken(pooled, whole, values, updates, *state, middle, *normed, hidden)


def take_backward(
    d_next: Tensor, taken: Taken, slots: Tensor, weights: Weights, folded: Folded, rules: Rules
) -> tuple[Tensor, TakenGradients]:
    """The gradient of the slots but for their queries, and of the rest."""
    d_normed, d_hidden = mlp_backward(d_next, taken.hidden, weights.mlp)
    normed = Normed(taken.normed, taken.mean, taken.rstd)
    d_middle, d_norm, d_norm_bias = normalise_backward(
        d_normed, taken.middle, normed, weights.norm_mlp, weights.norm_mlp_bias
    )
    d_middle.add_(d_next)
    state = GRUState(taken.gates, taken.from_hidden, taken.new)
    d_updates, d_slots, d_from_updates, d_from_slots = gru_backward(d_middle, slots, state, weights.gru)
    d_values = d_updates if weights.combine is None else torch.mm(d_updates, weights.combine)
    d_sums = spread(d_values, folded.values, rules.heads, taken.pooled.shape[0]) / taken.whole
    d_total = None
    if rules.update == "mean":  # which the weights divide too; eps bounds it only where no input counts: pooled is 0
        d_total = (d_sums * taken.pooled).sum(dim=2, keepdim=True).neg_()
    return d_slots, TakenGradients(
        d_sums, d_total, d_values, d_updates, d_from_updates, d_from_slots, d_norm, d_norm_bias, d_hidden, d_next
    )


def spread(rows: Tensor, matrices: Tensor, heads: int, batch: int) -> Tensor:
    """Each head's part of rows [R, H d] times its matrix, of [H d, W]: [B, H K, W]."""
    width = matrices.shape[1]
    if heads == 1:  # nothing to reorder, and the calls would be a part of what a small image costs
        return torch.mm(rows, matrices).view(batch, -1, width)
    products = torch.bmm(_of_heads(rows, heads), matrices.view(heads, -1, width))
    return products.view(heads, batch, -1, width).transpose(0, 1).reshape(batch, -1, width)


def gather(rows: Tensor, matrices: Tensor, heads: int) -> Tensor:
    """Rows [B, H K, W] times their head's matrix transposed, of [H d, W]: [R, H d]."""
    width = matrices.shape[1]
    if heads == 1:
        return torch.mm(rows.view(-1, width), matrices.T)
    products = torch.bmm(_by_head(rows, heads), matrices.view(heads, -1, width).mT)
    return products.transpose(0, 1).flatten(1)


def matrices_gradient(apart: Tensor, by_image: Tensor, heads: int) -> Tensor:
    """Of the matrices [H d, W] between rows [R, H d] and those by image [B, H K, W]."""
    width = by_image.shape[2]
    if heads == 1:
        return torch.mm(apart.T, by_image.view(-1, width))
    return torch.bmm(_of_heads(apart, heads).mT, _by_head(by_image, heads)).view(-1, width)


def _of_heads(rows: Tensor, heads: int) -> Tensor:
    """[R, H d] -> [H, R, d]."""
    return rows.view(rows.shape[0], heads, -1).transpose(0, 1)


def _by_head(rows: Tensor, heads: int) -> Tensor:
    """[B, H K, W] -> [H, R, W]."""
    batch, _, width = rows.shape
    return rows.view(batch, heads, -1, width).transpose(0, 1).reshape(heads, -1, width)
