"""One pass of slot attention over the inputs: what every variant does once an iteration."""

from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor

from slot_models.precision import at_least_float

Competition = Literal["per_head", "joint"]
Update = Literal["mean", "sum"]


class Attended(NamedTuple):
    """What the slots took.

    pooled: float [B, H, K, C], weighted means (or scaled sums) of the values.
    share: float [B, H, K], the sum of the weights: 1 for a mean.
    attention: float [B, H, K, N], the softmax over slots: before eps, before normalisation, zero where an input or a
        slot is masked.
    """

    pooled: Tensor
    share: Tensor
    attention: Tensor


def attend(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    competition: Competition = "per_head",
    update: Update = "mean",
    input_mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> Attended:
    """Slots compete for each input and pool what they win (Locatello et al. 2020, equations 1 and 2).

    Keys and values may be the inputs themselves: ``logits = x (W_k^T q)`` and ``updates = W_v (attention^T x)`` are the
    same maths with the projections applied to K slots rather than to N inputs. Softmax and normalisation are in float32
    at least: eps is zero in half precision, and a sum of many weights overflows it.

    Args:
        keys: float [B, N, C], or [B, H, N, C] of each head.
        values: the same.
        queries: float [B, H, K, C], scaled.
        bias: float [B, H, K], added to the logits of a slot.
        eps: added to the attention after the softmax, for a mean.
        competition: "per_head" takes the softmax over the slots of each head; "joint" over all slots and heads.
        update: "mean" divides by the sum of the weights, as published; "sum" by N, which keeps what share of the inputs
            a slot won (Krimmel et al. 2024).
        input_mask: bool [B, N], the inputs that count.
        slot_mask: bool [B, K], the slots that compete.
    """
    attention = compete(keys, queries, bias, competition=competition, input_mask=input_mask, slot_mask=slot_mask)
    whole: Tensor | int
    if update == "mean":
        weights = attention + eps if input_mask is None else (attention + eps) * input_mask[:, None, None, :]
        total = weights.sum(dim=3, keepdim=True)
        whole = total.clamp(min=eps)  # at least eps: an image without any input pools zeros
    else:
        weights, total = attention, attention.sum(dim=3, keepdim=True)
        whole = keys.shape[-2] if input_mask is None else input_mask.sum(dim=1)[:, None, None, None].clamp(min=1)
    weights = weights / whole
    pooled = einsum(weights.to(values.dtype), values, f"b h k n, {_axes(values)} -> b h k c")
    return Attended(pooled, (total / whole).squeeze(3), attention)


def compete(
    keys: Tensor,
    queries: Tensor,
    bias: Tensor | None = None,
    *,
    competition: Competition = "per_head",
    input_mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
) -> Tensor:
    """The attention alone, float [B, H, K, N]; see attend."""
    heads = queries.shape[1]
    logits = at_least_float(einsum(queries.to(keys.dtype), keys, f"b h k c, {_axes(keys)} -> b h k n"))
    if bias is not None:
        logits = logits + bias[..., None]
    if slot_mask is not None:  # the lowest number, not -inf: an image without any slot stays finite
        logits = logits.masked_fill(~slot_mask[:, None, :, None], torch.finfo(logits.dtype).min)
    if competition == "joint":
        attention = rearrange(rearrange(logits, "b h k n -> b (h k) n").softmax(dim=1), "b (h k) n -> b h k n", h=heads)
    else:
        attention = logits.softmax(dim=2)
    if input_mask is not None:
        attention = attention * input_mask[:, None, None, :]
    return attention


def _axes(inputs: Tensor) -> str:
    return "b n c" if inputs.dim() == 3 else "b h n c"
