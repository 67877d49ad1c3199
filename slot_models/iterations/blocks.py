"""Passes over the inputs in plain torch, a block of inputs at a time. See passes for what each one is.

A block is small enough that it and what is made of it stay in a common last-level cache, so that each pass reads the
inputs from memory once, and large enough that the work outweighs the calls. The normed inputs are never formed: with
``normed = (inputs - mean) * rstd`` and a row r that is centred over the channels,

    r . normed = rstd * (r . inputs)
    sum w normed = sum (w * rstd) inputs, but for a multiple of the vector of ones, which no centred row sees
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slot_models.precision import at_least_float

BLOCK_BYTES = 2**23  # for each thread, so that they have images of their own


def statistics(inputs: Tensor, norm_eps: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, count, width = inputs.shape
    one = torch.ones(width, dtype=_dtype(inputs), device=inputs.device)
    found = []
    for (x,) in _blocks(2 * width, [inputs.mT], []):
        # torch takes twice as long without an affine part; what is normed here is thrown away.
        _, mean, rstd = torch.native_layer_norm(at_least_float(x.mT), [width], one, one, norm_eps)
        found.append((mean.view(-1), rstd.view(-1)))
    mean, rstd = (torch.cat(parts).view(batch, count) for parts in zip(*found, strict=True))
    return mean, rstd if mask is None else rstd.mul_(mask)


def pool(
    inputs: Tensor, rstd: Tensor, rows: Tensor, mask: Tensor | None, groups: int, added: float
) -> tuple[Tensor, Tensor]:
    (batch, count, width), number = inputs.shape, rows.shape[1]
    pooled, total = (torch.zeros_like(part) for part in _apart(rows))
    attention = rows.new_empty(batch, number, count)
    masks = [] if mask is None else [mask[:, None]]
    for x, scale, won, *real, queries, bias, pooled_here, total_here in _blocks(
        width + 3 * number, [inputs.mT, rstd[:, None], attention, *masks], [*_apart(rows), pooled, total]
    ):
        x = at_least_float(x)  # [b, C, n]
        logits = torch.addcmul(bias, torch.bmm(queries, x), scale)  # [b, R, n]
        torch.softmax(_grouped(logits, groups), dim=2, out=_grouped(won, groups))
        if mask is not None:
            won.mul_(*real)
        total_here.add_(won.sum(dim=2, keepdim=True))
        pooled_here.baddbmm_((won + added).mul_(scale), x.mT)
    if added:
        counted = count if mask is None else mask.sum(dim=1).to(total)[:, None, None]
        total.add_(counted * added)
    return torch.cat([pooled, total], dim=2), attention


def pool_backward(
    inputs: Tensor, rstd: Tensor, d_sums: Tensor, attention: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    width, number = inputs.shape[2], d_sums.shape[1]
    d_queries, d_bias = (torch.zeros_like(part) for part in _apart(d_sums))
    d_logits = torch.empty_like(attention)
    for x, scale, won, d_here, factors, constant, d_queries_here, d_bias_here in _blocks(
        width + 4 * number, [inputs.mT, rstd[:, None], attention, d_logits], [*_apart(d_sums), d_queries, d_bias]
    ):
        x = at_least_float(x)  # [b, C, n]
        d_won = torch.addcmul(constant, torch.bmm(factors, x), scale)  # [b, R, n]
        products = _grouped(d_won.mul_(won), groups)
        whole = products.sum(dim=2, keepdim=True)
        torch.addcmul(products, _grouped(won, groups), whole, value=-1, out=_grouped(d_here, groups))
        d_bias_here.add_(d_here.sum(dim=2, keepdim=True))
        d_queries_here.baddbmm_(d_here * scale, x.mT)
    return torch.cat([d_queries, d_bias], dim=2), d_logits


def inputs_backward(
    inputs: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: Sequence[Tensor],
    d_sums: Sequence[Tensor],
    attention: Sequence[Tensor],
    d_logits: Sequence[Tensor],
    added: float,
) -> Tensor:
    width, passes = inputs.shape[2], len(attention)
    factors, _ = _apart(torch.cat([*d_sums, *rows], dim=1))  # [B, 2TR, C]
    d_inputs = torch.empty_like(inputs)
    for x, d_x, middle, scale, *parts, factors_here in _blocks(
        3 * width + 2 * factors.shape[1],
        [inputs.mT, d_inputs.mT, mean[:, None], rstd[:, None], *attention, *d_logits],
        [factors],
    ):
        weights = torch.cat(parts, dim=1)  # [b, 2TR, n]
        if added:
            weights[:, : passes * rows[0].shape[1]].add_(added)
        d_normed = torch.bmm(weights.mT, factors_here)  # [b, n, C]
        del weights  # the most memory of a step is held here
        d_here: Tensor = torch.ops.aten.native_layer_norm_backward(
            d_normed, at_least_float(x.mT), [width], middle.mT, scale.mT, None, None, [True, False, False]
        )[0]
        if d_here.shape == inputs.shape:  # all in one block
            return d_here.to(inputs.dtype)
        d_x.copy_(d_here.mT)
    return d_inputs


def _blocks(values: int, of_inputs: Sequence[Tensor], of_images: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The parts of tensors [B, *, N] and [B, *, *] that are of a block: some images whole, or a part of one.

    From each input `values` are made.
    """
    batch, _, count = of_inputs[0].shape
    tokens = max(1, torch.get_num_threads() * BLOCK_BYTES // (values * _dtype(of_inputs[0]).itemsize))
    if batch * count <= tokens or of_inputs[0].device.type != "cpu":
        yield (*of_inputs, *of_images)
        return
    images, part = _evenly(batch, max(1, tokens // count)), _evenly(count, tokens)
    for some in zip(*(torch.split(tensor, images) for tensor in (*of_inputs, *of_images)), strict=True):
        inputs, rest = some[: len(of_inputs)], some[len(of_inputs) :]
        for block in zip(*(torch.split(tensor, part, dim=2) for tensor in inputs), strict=True):
            yield (*block, *rest)


def _evenly(whole: int, most: int) -> int:
    """The size of parts that are as few as if they were the largest, and equal but for the last."""
    parts = -(-whole // most)
    return -(-whole // parts)


def _apart(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers [B, R, C] for the channels of an input, and the last ones [B, R, 1]."""
    return rows[..., :-1], rows[..., -1:]


def _dtype(inputs: Tensor) -> torch.dtype:
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def _grouped(rows: Tensor, groups: int) -> Tensor:
    batch, count, inputs = rows.shape
    return rows.view(batch, groups, count // groups, inputs)
