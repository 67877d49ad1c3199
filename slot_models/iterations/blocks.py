"""Passes over the inputs in plain torch, a block of inputs at a time. See passes for what each one is.

A block is small enough that it and what is made of it stay in the processor's cache: each pass reads the inputs from
memory once, and nothing of size [B, K, N] is ever kept. The normed inputs are never formed either. With
``normed = (inputs - mean) * rstd`` and a row r that is centred over the channels,

    r . normed = rstd * (r . inputs)
    sum w normed = sum (w * rstd) inputs, but for a multiple of the vector of ones, which no centred row sees
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from slot_models.precision import at_least_float

BLOCK_BYTES = 2**20  # a common second-level cache
_ALL = slice(None)


def statistics(inputs: Tensor, norm_eps: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, count, width = inputs.shape
    mean = torch.empty(batch, count, dtype=_dtype(inputs), device=inputs.device)
    rstd = torch.empty_like(mean)
    for b, n in _blocks(inputs, 2 * width):
        x = at_least_float(inputs[b, n])
        middle = x.mean(dim=2, keepdim=True)
        variance = torch.linalg.vector_norm(x - middle, dim=2).square_().div_(width)
        mean[b, n] = middle.squeeze(2)
        rstd[b, n] = variance.add_(norm_eps).rsqrt_()
    return mean, rstd if mask is None else rstd.mul_(mask)


def pool(inputs: Tensor, rstd: Tensor, rows: Tensor, mask: Tensor | None, groups: int, added: float) -> Tensor:
    width = inputs.shape[2]
    sums = torch.zeros_like(rows)
    queries, bias, pooled, total = rows[..., :width], rows[..., width:], sums[..., :width], sums[..., width:]
    for b, n in _blocks(inputs, width + 3 * rows.shape[1]):
        x, scale = at_least_float(inputs[b, n]), rstd[b, None, n]  # [b, n, C], [b, 1, n]
        logits = torch.bmm(queries[b], x.mT).mul_(scale).add_(bias[b])  # [b, R, n]
        weights = _compete(logits, groups)
        if added:
            weights.add_(added)
        if mask is not None:
            weights.mul_(mask[b, None, n])
        total[b] += weights.sum(dim=2, keepdim=True)
        pooled[b].baddbmm_(weights.mul_(scale), x)
    return sums


def pool_backward(
    inputs: Tensor, rstd: Tensor, rows: Tensor, d_sums: Tensor, mask: Tensor | None, groups: int
) -> Tensor:
    width, half = inputs.shape[2], rows.shape[1]
    d_rows = torch.zeros_like(rows)
    both = torch.cat([rows, d_sums], dim=1)  # [B, 2R, C + 1]
    factors, constant, d_queries, d_bias = (
        both[..., :width],
        both[..., width:],
        d_rows[..., :width],
        d_rows[..., width:],
    )
    for b, n in _blocks(inputs, width + 6 * half):
        x, scale = at_least_float(inputs[b, n]), rstd[b, None, n]
        products = torch.bmm(factors[b], x.mT).mul_(scale).add_(constant[b])  # [b, 2R, n]
        d_weights = products[:, half:]
        if mask is not None:
            d_weights.mul_(mask[b, None, n])
        d_logits = _compete_backward(d_weights, _compete(products[:, :half], groups), groups)
        d_bias[b] += d_logits.sum(dim=2, keepdim=True)
        d_queries[b].baddbmm_(d_logits.mul_(scale), x)
    return d_rows


def pool_backward_all(
    inputs: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rows: Tensor,
    d_sums: Tensor,
    mask: Tensor | None,
    groups: int,
    added: float,
) -> tuple[Tensor, Tensor]:
    passes, count, width = rows.shape[1], rows.shape[2], inputs.shape[2]
    half = passes * count
    d_inputs, d_rows = torch.empty_like(inputs, dtype=rows.dtype), torch.zeros_like(rows[:, 0])
    both = torch.cat([rows, d_sums], dim=1).flatten(1, 2)  # [B, 2TR, C + 1]
    factors, constant, d_queries, d_bias = (
        both[..., :width],
        both[..., width:],
        d_rows[..., :width],
        d_rows[..., width:],
    )
    for b, n in _blocks(inputs, 2 * width + 8 * half):
        x, scale = at_least_float(inputs[b, n]), rstd[b, n]
        products = torch.bmm(factors[b], x.mT).mul_(scale[:, None])  # [b, 2TR, n]
        affine = products + constant[b]
        d_weights = affine[:, half:]
        if mask is not None:
            d_weights.mul_(mask[b, None, n])
        attention = _compete(affine[:, :half], passes * groups)
        # The gradient of the normed inputs is the transpose of these, times the factors.
        parts = torch.cat([_compete_backward(d_weights, attention, passes * groups), attention], dim=1)
        if added:
            parts[:, half:] += added
        d_bias[b] += parts[:, :count].sum(dim=2, keepdim=True)
        # LayerNorm's own: d_x = rstd * (d_normed - mean(d_normed) - normed * mean(d_normed * normed)), where the first
        # mean is zero, since the factors are centred, and the second is a sum of parts * products.
        slope = products.mul_(parts).sum(dim=1).mul_(scale).mul_(scale).div_(-width)  # [b, n]
        parts.mul_(scale[:, None])
        d_queries[b].baddbmm_(parts[:, :count], x)
        d_x = torch.mul(x, slope[..., None], out=d_inputs[b, n])
        d_x.sub_((slope * mean[b, n])[..., None]).baddbmm_(parts.mT, factors[b])
    return d_inputs.to(inputs.dtype), d_rows


def _blocks(inputs: Tensor, values: int) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and inputs: whole images where several fit, else parts of one; `values` are made of an input."""
    batch, count, _ = inputs.shape
    if inputs.device.type != "cpu":
        yield _ALL, _ALL
        return
    tokens = max(1, BLOCK_BYTES // (values * _dtype(inputs).itemsize))
    images = _evenly(batch, max(1, tokens // count))
    part = _evenly(count, tokens)
    for image in range(0, batch, images):
        for start in range(0, count, part):
            yield slice(image, image + images), slice(start, start + part)


def _evenly(whole: int, most: int) -> int:
    """The size of parts that are as few as if they were the largest, and equal but for the last."""
    parts = -(-whole // most)
    return -(-whole // parts)


def _dtype(inputs: Tensor) -> torch.dtype:
    return torch.float64 if inputs.dtype == torch.float64 else torch.float32


def _compete(logits: Tensor, groups: int) -> Tensor:
    """Softmax over the rows of each group. [b, R, n]"""
    return _groups(logits, groups).softmax(dim=2).view_as(logits)


def _compete_backward(d_attention: Tensor, attention: Tensor, groups: int) -> Tensor:
    d_grouped, grouped = _groups(d_attention, groups), _groups(attention, groups)
    d_logits: Tensor = torch.ops.aten._softmax_backward_data(d_grouped, grouped, 2, attention.dtype)
    return d_logits.view_as(attention)


def _groups(rows: Tensor, groups: int) -> Tensor:
    batch, count, inputs = rows.shape
    return rows.view(batch, groups, count // groups, inputs)
