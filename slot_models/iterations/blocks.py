"""Passes over the inputs in plain torch, a block of inputs at a time. See passes for what each one is.

A block is small enough that it and what is made of it stay in a common last-level cache, so that each pass reads the
inputs from memory once, and large enough that the work outweighs the calls. The inputs are normed once: a processor
reads them faster than it makes them again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from slot_models.iterations.rows import joined, layer_norm_backward, summed
from slot_models.precision import at_least_float

BLOCK_BYTES = 2**23  # for each thread, so that they have images of their own


def normalise(
    inputs: Tensor, norm: tuple[Tensor, Tensor], norm_eps: float, constant: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed inputs [B, C, N], or with one more channel that is always 1; mean and 1 / deviation [B, N].

    Norm are the weight and the bias [C].
    """
    batch, count, width = inputs.shape
    if not constant and inputs.dtype == norm[0].dtype:
        normed, mean, rstd = torch.native_layer_norm(inputs, [width], *norm, norm_eps)
        return normed.mT, mean.squeeze(2), rstd.squeeze(2)
    normed = norm[0].new_ones(batch, count, width + constant)
    mean, rstd = normed.new_empty(2, batch, count)
    for x, into, *statistics in chain.from_iterable(
        _blocks(3 * width, [inputs.mT, normed.mT, _row(mean), _row(rstd)], [])
    ):
        found = torch.native_layer_norm(at_least_float(x.mT), [width], *norm, norm_eps)
        for to, part in zip((into[:, :width], *statistics), found, strict=True):
            to.copy_(part.mT)
    return normed.mT, mean, rstd


def pool(normed: Tensor, rows: Tensor, mask: Tensor | None, groups: int, added: float) -> tuple[Tensor, Tensor, Tensor]:
    (batch, width, count), number = normed.shape, rows.shape[1]
    attention = rows.new_empty(batch, number, count)

    def pool_block(x: Tensor, won: Tensor, real: Tensor | None, rows_here: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.bmm(rows_here, x)  # [b, R, n]
        torch.softmax(_grouped(logits, groups), dim=-2, out=_grouped(won, groups))
        if real is not None:
            won.mul_(real)
        weights = won + added if real is None else (won + added).mul_(real)
        return torch.bmm(weights, x.mT), weights.sum(dim=2, keepdim=True)

    of_inputs = [normed, attention, _row(mask)]
    sums, total = _over_blocks(pool_block, width + 3 * number, of_inputs, [rows])
    return sums, total, attention


def pool_backward(
    normed: Tensor, d_sums: Tensor, d_total: Tensor | None, attention: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    width, number = normed.shape[1], d_sums.shape[1]
    d_logits = torch.empty_like(attention)

    def block_backward(
        x: Tensor, won: Tensor, into: Tensor, d_sums_here: Tensor, d_total_here: Tensor | None
    ) -> tuple[Tensor]:
        d_won = torch.bmm(d_sums_here, x)  # [b, R, n]
        if d_total_here is not None:
            d_won.add_(d_total_here)
        products, won, d_here = (_grouped(each, groups) for each in (d_won.mul_(won), won, into))
        torch.addcmul(products, won, products.sum(dim=-2, keepdim=True), value=-1, out=d_here)
        return (torch.bmm(into, x.mT),)

    of_inputs = [normed, attention, d_logits]
    (d_rows,) = _over_blocks(block_backward, width + 4 * number, of_inputs, [d_sums, d_total])
    return d_rows, d_logits


def inputs_backward(
    inputs: Tensor,
    mean: Tensor,
    rstd: Tensor,
    mask: Tensor | None,
    norm: tuple[Tensor, Tensor],
    rows: Sequence[Tensor],
    d_sums: Sequence[Tensor],
    attention: Sequence[Tensor],
    d_logits: Sequence[Tensor],
    added: float,
    wanted: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the inputs, if wanted, and of the weight and the bias of their LayerNorm."""
    width, of_sums = inputs.shape[2], sum(each.shape[1] for each in d_sums)
    factors = torch.cat([*d_sums, *rows], dim=1)[..., :width]  # [B, 2TR, C]
    values = 3 * width + 2 * factors.shape[1]
    d_inputs = None if _is_one_block(values, inputs.mT) or not wanted else torch.empty_like(inputs)
    into = None if d_inputs is None else d_inputs.mT
    of_blocks = [inputs.mT, into, _row(mean), _row(rstd), _row(mask), *attention, *d_logits]
    d_norms = []
    for x, d_x, middle, scale, real, *parts, factors_here in chain.from_iterable(_blocks(values, of_blocks, [factors])):
        wide = torch.cat(parts, dim=1)  # [b, 2TR, n]
        if added:
            wide[:, :of_sums].add_(added)
        d_normed = torch.bmm(wide.mT, factors_here)  # [b, n, C]
        del wide  # the most memory of a step is held here
        if real is not None:
            d_normed.mul_(real.mT)
        d_here, *d_norm = layer_norm_backward(
            d_normed, at_least_float(x.mT), [width], middle.mT, scale.mT, *norm, [wanted, True, True]
        )
        d_norms.append(d_norm)
        if d_x is not None:
            d_x.copy_(d_here.mT)
        elif wanted:
            d_inputs = d_here.to(inputs.dtype)
    d_weight, d_bias = (summed(each) for each in zip(*d_norms, strict=True))
    return d_inputs, d_weight, d_bias


def _over_blocks(
    work: Callable[..., tuple[Tensor, ...]],
    values: int,
    of_inputs: Sequence[Tensor | None],
    of_images: Sequence[Tensor | None],
) -> list[Tensor]:
    """What is made of each block, [b, *, *]: added over the parts of an image, joined over the images."""
    made = [[work(*block) for block in parts] for parts in _blocks(values, of_inputs, of_images)]
    of_some = [[summed(each) for each in zip(*parts, strict=True)] for parts in made]
    return [joined(each) for each in zip(*of_some, strict=True)]


def _blocks(
    values: int, of_inputs: Sequence[Tensor | None], of_images: Sequence[Tensor | None]
) -> Iterator[Iterable[Any]]:
    """The parts of tensors [B, *, N] and [B, *, *] that are of a block, by images: one block has some images whole, or
    an image has several, each with a part of its inputs.

    From each input `values` are made. The first tensor is there.
    """
    first = of_inputs[0]
    assert first is not None
    if _is_one_block(values, first):
        yield ((*of_inputs, *of_images),)
        return
    batch, _, count = first.shape
    tokens = _tokens(values, first)
    images, part = _evenly(batch, max(1, tokens // count)), _evenly(count, tokens)
    for some in zip(*(_split(tensor, images, 0, batch) for tensor in (*of_inputs, *of_images)), strict=True):
        inputs, rest = some[: len(of_inputs)], some[len(of_inputs) :]
        blocks = zip(*(_split(tensor, part, 2, count) for tensor in inputs), strict=True)
        yield [(*block, *rest) for block in blocks]


def _is_one_block(values: int, inputs: Tensor) -> bool:
    return inputs.shape[0] * inputs.shape[2] <= _tokens(values, inputs) or inputs.device.type != "cpu"


def _tokens(values: int, inputs: Tensor) -> int:
    return max(1, torch.get_num_threads() * BLOCK_BYTES // (values * max(4, inputs.element_size())))


def _evenly(whole: int, most: int) -> int:
    """The size of parts that are as few as if they were the largest, and equal but for the last."""
    parts = -(-whole // most)
    return -(-whole // parts)


def _split(tensor: Tensor | None, size: int, dim: int, whole: int) -> Sequence[Tensor | None]:
    return [None] * -(-whole // size) if tensor is None else torch.split(tensor, size, dim=dim)


def _row(of_inputs: Tensor | None) -> Tensor | None:
    """[B, N] -> [B, 1, N]."""
    return None if of_inputs is None else of_inputs[:, None]


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """[b, R, n] -> [b, groups, K, n], or as it is if all compete."""
    if groups == 1:
        return rows
    batch, count, inputs = rows.shape
    return rows.view(batch, groups, count // groups, inputs)
