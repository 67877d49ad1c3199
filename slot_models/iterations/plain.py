"""The iterations of slot attention in plain torch: what they mean, and what all else is measured against."""

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor
from torch.nn import functional

from slot_models.attend import Attended, attend, compete
from slot_models.iterations.weights import Rules, Weights
from slot_models.precision import full_precision


def iterate(
    inputs: Tensor,
    slots: Tensor,
    weights: Weights,
    rules: Rules,
    input_mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
    input_noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Locatello et al. 2020, algorithm 1.

    Args:
        inputs: float [B, N, C].
        slots: float [B, K, D].
        input_mask: bool [B, N], the inputs that count.
        slot_mask: bool [B, K], the slots that compete.
        input_noise: float [B, T, N, C], added to the normed inputs of each iteration.

    Returns:
        Slots [B, K, D] and the last iteration's attention [B, K, N], of which there is at least one.
    """
    normed = _normed(inputs, weights, rules)
    absorb = rules.absorb or input_noise is not None
    keys = values = normed
    if not absorb:
        keys = functional.linear(normed, weights.to_key, weights.key_bias)
        values = functional.linear(normed, weights.to_value, weights.value_bias)
        keys, values = (rearrange(each, "b n (h d) -> b h n d", h=rules.heads) for each in (keys, values))
    for iteration in range(rules.iterations):
        if input_noise is not None:
            keys = values = normed + input_noise[:, iteration].to(normed)
        with full_precision(slots):
            queries, bias = _ask(slots, weights, rules, absorb)
        taken = attend(
            keys,
            values,
            queries,
            bias,
            eps=rules.eps,
            competition=rules.competition,
            update=rules.update,
            input_mask=input_mask,
            slot_mask=slot_mask,
        )
        with full_precision(slots):
            slots = _update(slots, taken, weights, rules, absorb)
    return slots, _over_heads(taken.attention, rules)


def attention(
    inputs: Tensor,
    slots: Tensor,
    weights: Weights,
    rules: Rules,
    input_mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> Tensor:
    """What these slots win of each input, [B, K, N]: that of an iteration which starts from them."""
    with full_precision(slots):
        queries, bias = _ask(slots, weights, rules, absorb=True)
    won = compete(
        _normed(inputs, weights, rules),
        queries,
        bias,
        competition=rules.competition,
        input_mask=input_mask,
        slot_mask=slot_mask,
    )
    return _over_heads(won, rules)


def _normed(inputs: Tensor, weights: Weights, rules: Rules) -> Tensor:
    affine = (weights.norm_inputs, weights.norm_inputs_bias, rules.norm_eps)
    normed = functional.layer_norm(inputs, inputs.shape[2:], *affine)  # [B, N, C]
    device = inputs.device.type
    return normed.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else normed


def _over_heads(attention: Tensor, rules: Rules) -> Tensor:
    return reduce(attention, "b h k n -> b k n", "sum" if rules.competition == "joint" else "mean")


def _ask(slots: Tensor, weights: Weights, rules: Rules, absorb: bool) -> tuple[Tensor, Tensor | None]:
    """Queries [B, H, K, C] for normed inputs and a bias [B, H, K], or queries [B, H, K, d] for keys."""
    normed = functional.layer_norm(slots, slots.shape[2:], weights.norm_slots, weights.norm_slots_bias, rules.norm_eps)
    queries = functional.linear(normed, weights.to_query, weights.query_bias) * rules.scale
    queries = rearrange(queries, "b k (h d) -> b h k d", h=rules.heads)
    if not absorb:
        return queries, None
    bias = None
    if weights.key_bias is not None:
        key_bias = rearrange(weights.key_bias, "(h d) -> h d", h=rules.heads)
        bias = einsum(queries, key_bias, "b h k d, h d -> b h k")
    keys = rearrange(weights.to_key, "(h d) c -> h d c", h=rules.heads)
    return einsum(queries, keys, "b h k d, h d c -> b h k c"), bias


def _update(slots: Tensor, taken: Attended, weights: Weights, rules: Rules, absorb: bool) -> Tensor:
    updates = taken.pooled.to(slots.dtype)
    if absorb:
        values = rearrange(weights.to_value, "(h d) c -> h d c", h=rules.heads)
        updates = einsum(updates, values, "b h k c, h d c -> b h k d")
        if weights.value_bias is not None:
            share = rearrange(taken.share.to(slots.dtype), "b h k -> b h k 1")
            updates = updates + share * rearrange(weights.value_bias, "(h d) -> h 1 d", h=rules.heads)
    updates = rearrange(updates, "b h k d -> b k (h d)")
    if weights.combine is not None:
        updates = functional.linear(updates, weights.combine, weights.combine_bias)
    moved = torch.gru_cell(updates.flatten(0, 1), slots.flatten(0, 1), *weights.gru).view_as(slots)
    normed = functional.layer_norm(moved, moved.shape[2:], weights.norm_mlp, weights.norm_mlp_bias, rules.norm_eps)
    hidden = functional.linear(normed, weights.mlp_hidden, weights.mlp_hidden_bias).relu()
    return moved + functional.linear(hidden, weights.mlp_out, weights.mlp_out_bias)  # [B, K, D]
