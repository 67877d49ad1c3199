"""All iterations of slot attention as one function, with a derivative written by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from slot_models.iterations import passes, plain
from slot_models.iterations.folding import Folded, fold, fold_backward
from slot_models.iterations.halves import (
    Asked,
    AskedGradients,
    Taken,
    TakenGradients,
    ask,
    ask_backward,
    matrices_gradient,
    take,
    take_backward,
)
from slot_models.iterations.passes import Reading
from slot_models.iterations.rows import joined, summed
from slot_models.iterations.weights import Rules, Weights
from slot_models.precision import full_precision

Kept = list[tuple[Asked, Tensor | None, Taken]]  # of each iteration, what the derivative needs; see passes.pool
Found = list[tuple[AskedGradients, Tensor | None, TakenGradients]]


def refine(
    inputs: Tensor,
    slots: Tensor,
    weights: Weights,
    rules: Rules,
    input_mask: Tensor | None,
    slot_mask: Tensor | None,
) -> Tensor:
    """The slots after all iterations, float [B, K, D].

    Args:
        inputs: float [B, N, C], finite where masked.
        slots: float [B, K, D], of the weights' dtype.
        weights, rules: of the module.
        input_mask: bool [B, N].
        slot_mask: bool [B, K].
    """
    device = inputs.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    rules = replace(rules, half=half, affine=passes.in_triton(inputs))
    inputs = inputs.contiguous()  # here, where a second derivative sees it
    with full_precision(slots):
        if torch.is_grad_enabled():
            result: Tensor = _Refine.apply(inputs, slots, input_mask, slot_mask, rules, *weights)  # type: ignore[no-untyped-call]
            return result
        reading = passes.read(inputs, weights, rules, input_mask, slot_mask)
        folded = fold(weights, rules, reading.constant)
        return _forward(reading, slots, slot_mask, weights, folded, rules, keep=False)[0]


class _Refine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        slots: Tensor,
        input_mask: Tensor | None,
        slot_mask: Tensor | None,
        rules: Rules,
        *parameters: Tensor | None,
    ) -> Tensor:
        weights = Weights(*parameters)  # type: ignore[arg-type]
        reading = passes.read(inputs, weights, rules, input_mask, slot_mask)
        folded = fold(weights, rules, reading.constant)
        result, kept = _forward(reading, slots, slot_mask, weights, folded, rules, keep=True)
        iterations = (tensor for asked, attention, taken in kept for tensor in (*asked, attention, *taken))
        ctx.save_for_backward(*reading, slots, slot_mask, *weights, *folded, *iterations)
        ctx.rules = rules
        return result

    @staticmethod
    def backward(ctx: Any, d_result: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)

        def following(kind: Any) -> Any:
            return kind(*(next(saved) for _ in kind._fields))

        rules: Rules = ctx.rules
        reading, slots, slot_mask = following(Reading), next(saved), next(saved)
        weights, folded = following(Weights), following(Folded)
        kept = [(following(Asked), next(saved), following(Taken)) for _ in range(rules.iterations)]
        with full_precision(d_result):
            if torch.is_grad_enabled():  # a second derivative will be asked for
                return _differentiable(d_result, ctx.needs_input_grad, reading, slots, slot_mask, weights, rules)
            wanted, of_norm = ctx.needs_input_grad[0], any(ctx.needs_input_grad[5:7]) and not rules.affine
            d_inputs: Tensor | None = None
            d_norm: Mapping[str, Tensor | None] = dict.fromkeys(("norm_inputs", "norm_inputs_bias"))
            d_slots, found = _backward(d_result, reading, slot_mask, weights, folded, rules, kept)
            if wanted or of_norm:
                d_inputs, d_norm = _inputs_gradients(reading, kept, found, weights, rules, wanted)
            d_weights = _weight_gradients(reading, kept, found, d_norm, weights, rules)
        return d_inputs, d_slots, None, None, None, *d_weights


def _forward(
    reading: Reading,
    slots: Tensor,
    slot_mask: Tensor | None,
    weights: Weights,
    folded: Folded,
    rules: Rules,
    keep: bool,
) -> tuple[Tensor, Kept]:
    kept: Kept = []
    shape = slots.shape
    masked, count = _masked(slot_mask, rules), _count(reading, rules)
    slots = slots.flatten(0, 1)  # [R, D]
    for _ in range(rules.iterations):
        asked = ask(slots, shape[0], masked, weights, folded, rules)
        sums, total, attention = passes.pool(reading, asked.rows, rules)
        slots, taken = take(sums, total, count, slots, weights, folded, rules)
        if keep:
            kept.append((asked, attention, taken))
    return slots.view(shape), kept


def _backward(
    d_result: Tensor,
    reading: Reading,
    slot_mask: Tensor | None,
    weights: Weights,
    folded: Folded,
    rules: Rules,
    kept: Kept,
) -> tuple[Tensor, Found]:
    """Gradients of the slots, and of what stands between them and the inputs in each iteration."""
    masked = _masked(slot_mask, rules)
    d_slots = d_result.flatten(0, 1)
    found: Found = []
    for asked, attention, taken in reversed(kept):
        d_slots, d_taken = take_backward(d_slots, taken, asked.slots, weights, folded, rules)
        d_rows, d_logits = passes.pool_backward(reading, asked.rows, d_taken.sums, d_taken.total, attention, rules)
        d_slots, d_asked = ask_backward(d_rows, d_slots, asked, masked, weights, folded, rules)
        found.insert(0, (d_asked, d_logits, d_taken))
    return d_slots.view_as(d_result), found


def _inputs_gradients(
    reading: Reading, kept: Kept, found: Found, weights: Weights, rules: Rules, wanted: bool
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Of the inputs, if wanted, and of their LayerNorm where it is not in the folded matrices."""
    all_asked, attentions, _ = zip(*kept, strict=True)
    _, d_attentions, all_taken = zip(*found, strict=True)
    rows, d_sums = [asked.rows for asked in all_asked], [taken.sums for taken in all_taken]
    return passes.inputs_backward(reading, rows, d_sums, attentions, d_attentions, weights, rules, wanted)


def _weight_gradients(
    reading: Reading, kept: Kept, found: Found, d_norm: Mapping[str, Tensor | None], weights: Weights, rules: Rules
) -> tuple[Tensor | None, ...]:
    """In the order of Weights, of the rows of all iterations."""
    asked, _, taken = zip(*kept, strict=True)
    d_asked, _, d_taken = zip(*found, strict=True)
    d_folded = Folded(
        matrices_gradient(joined([a.queries for a in asked]), joined([d.rows for d in d_asked]), rules.heads),
        matrices_gradient(joined([d.values for d in d_taken]), joined([t.pooled for t in taken]), rules.heads),
    )
    result = {**d_norm, **fold_backward(d_folded, weights, rules, reading.constant)}

    def of_linear(name: str, bias: str, gradients: list[Tensor], rows: list[Tensor]) -> None:
        gradient = joined(gradients)
        result[name] = torch.mm(gradient.T, joined(rows))
        if getattr(weights, bias) is not None:
            result[bias] = gradient.sum(dim=0)

    of_linear("to_query", "query_bias", [d.queries for d in d_asked], [a.normed for a in asked])
    if weights.combine is not None:
        of_linear("combine", "combine_bias", [d.updates for d in d_taken], [t.values for t in taken])
    of_linear("gru_inputs", "gru_inputs_bias", [d.from_updates for d in d_taken], [t.updates for t in taken])
    of_linear("gru_hidden", "gru_hidden_bias", [d.from_slots for d in d_taken], [a.slots for a in asked])
    of_linear("mlp_hidden", "mlp_hidden_bias", [d.hidden for d in d_taken], [t.normed for t in taken])
    of_linear("mlp_out", "mlp_out_bias", [d.out for d in d_taken], [t.hidden for t in taken])
    for name, gradients in (("norm_slots", d_asked), ("norm_mlp", d_taken)):
        result[name] = summed([d.norm for d in gradients])
        result[f"{name}_bias"] = summed([d.norm_bias for d in gradients])
    return tuple(
        None if weight is None else result[name] for name, weight in zip(Weights._fields, weights, strict=True)
    )


def _differentiable(
    d_result: Tensor, wanted: Sequence[bool], reading: Reading, slots: Tensor, slot_mask: Tensor | None, *rest: Any
) -> Any:
    """The same gradients by way of the plain iterations, as functions that can be differentiated again."""
    weights, rules = rest
    result, _ = plain.iterate(reading.inputs, slots, weights, rules, reading.mask, slot_mask)
    tensors = (reading.inputs, slots, None, None, None, *weights)
    asked = [tensor for tensor, needed in zip(tensors, wanted, strict=True) if needed]
    found = iter(torch.autograd.grad(result, asked, d_result, create_graph=True, allow_unused=True))
    return tuple(next(found) if needed else None for needed in wanted)


def _masked(slot_mask: Tensor | None, rules: Rules) -> Tensor | None:
    """The rows that do not compete, bool [B, H K, 1]."""
    return None if slot_mask is None else ~slot_mask.repeat(1, rules.heads)[..., None]


def _count(reading: Reading, rules: Rules) -> Tensor | None:
    """The number of inputs where a sum is divided by it, float [B or 1, 1, 1]."""
    if rules.update == "mean":
        return None
    if reading.mask is None:
        return reading.rstd.new_full((1, 1, 1), reading.inputs.shape[1])
    return reading.mask.sum(dim=1).clamp(min=1).to(reading.rstd)[:, None, None]
