# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803 - sizes known to the compiler are in capitals, as is usual in Triton
"""Passes over the inputs in Triton: normed, competed for and summed in registers, each input read once a pass.

See passes for what each one is. A program takes a part of an image's inputs, tile by tile; partial sums are added in a
fixed order, so results do not change from run to run. The multiplications are of the inputs' dtype or, where `half`
says so, in bfloat16; sums and softmax are in float32. With TRITON_INTERPRET=1 all of it runs on the CPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS, MOST_CHANNELS = 64, 512  # of a group, of an input: what fits registers and shared memory
_PROGRAMS_PER_PROCESSOR = 4
_INTERPRETED = bool(triton.knobs.runtime.interpret)


def supports(inputs: Tensor, rows_per_group: int) -> bool:
    return (
        (inputs.is_cuda or _INTERPRETED)
        and inputs.dtype in (torch.float32, torch.bfloat16)
        and inputs.shape[2] <= MOST_CHANNELS
        and rows_per_group <= MOST_ROWS
    )


def statistics(inputs: Tensor, norm_eps: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, count, width = inputs.shape
    mean = torch.empty(batch, count, dtype=torch.float32, device=inputs.device)
    rstd = torch.empty_like(mean)
    tile = _tile(inputs)
    _statistics[(triton.cdiv(batch * count, tile["BLOCK"]),)](
        inputs, mean, rstd, batch * count, width, norm_eps, **tile
    )
    return mean, rstd if mask is None else rstd.mul_(mask)


def pool(inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, groups: int, added: float, half: bool) -> Tensor:
    shape, sizes = _Shape(inputs, rows, groups, half), _sizes(inputs, rows, groups)
    partial = torch.empty(shape.parts, *rows.shape, dtype=torch.float32, device=inputs.device)
    _pool[shape.grid](inputs, mean, rstd, rows, partial, *sizes, shape.chunk, added, **shape.constants)
    return partial.sum(dim=0)


def pool_backward(
    inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, d_sums: Tensor, groups: int, half: bool
) -> Tensor:
    shape, sizes = _Shape(inputs, rows, groups, half), _sizes(inputs, rows, groups)
    partial = torch.empty(shape.parts, *rows.shape, dtype=torch.float32, device=inputs.device)
    _pool_backward[shape.grid](inputs, mean, rstd, rows, d_sums, partial, *sizes, shape.chunk, **shape.constants)
    return partial.sum(dim=0)


def inputs_backward(
    inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, d_sums: Tensor, groups: int, added: float, half: bool
) -> Tensor:
    """The gradient of the inputs through T passes; rows and d_sums are [B, T, R, C + 1]."""
    shape = _Shape(inputs, rows[:, 0], groups, half)
    d_inputs = torch.empty_like(inputs)
    _inputs_backward[(triton.cdiv(inputs.shape[1], shape.constants["BLOCK"]), inputs.shape[0])](
        inputs, mean, rstd, rows, d_sums, d_inputs, *_sizes(inputs, rows[:, 0], groups), rows.shape[1] * groups, added,
        **shape.constants,
    )  # fmt: skip
    return d_inputs


class _Shape:
    """How a pass is cut into programs: parts of an image's inputs, groups of rows, images."""

    def __init__(self, inputs: Tensor, rows: Tensor, groups: int, half: bool) -> None:
        batch, count, _ = inputs.shape
        tile = _tile(inputs)
        tiles = triton.cdiv(count, tile["BLOCK"])
        wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * _processors(inputs), batch * groups)
        self.chunk = triton.cdiv(tiles, min(tiles, wanted)) * tile["BLOCK"]
        self.parts = triton.cdiv(count, self.chunk)
        self.grid = (self.parts, groups, batch)
        in_bfloat16 = (
            half or inputs.dtype == torch.bfloat16
        ) and not _INTERPRETED  # which multiplies those as integers
        self.constants: dict[str, Any] = tile | {
            "K": max(16, triton.next_power_of_2(rows.shape[1] // groups)),
            "DOT": tl.bfloat16 if in_bfloat16 else tl.float32,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        }


def _tile(inputs: Tensor) -> dict[str, int]:
    width = max(16, triton.next_power_of_2(inputs.shape[2]))
    return {"C": width, "BLOCK": min(128, max(16, 16384 // width)), "num_warps": 4 if width <= 128 else 8}


def _sizes(inputs: Tensor, rows: Tensor, groups: int) -> tuple[int, int, int]:
    return inputs.shape[1], inputs.shape[2], rows.shape[1] // groups


def _processors(inputs: Tensor) -> int:
    return torch.cuda.get_device_properties(inputs.device).multi_processor_count if inputs.is_cuda else 1


@triton.jit
def _statistics(inputs, mean, rstd, count, width, norm_eps, C: tl.constexpr, BLOCK: tl.constexpr):
    n, c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, C)
    here = (n < count)[:, None] & (c < width)[None, :]
    x = tl.load(inputs + n[:, None] * width + c[None, :], mask=here, other=0.0).to(tl.float32)  # [BLOCK, C]
    middle = tl.sum(x, axis=1) / width
    centred = tl.where(here, x - middle[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / width
    tl.store(mean + n, middle, mask=n < count)
    tl.store(rstd + n, 1.0 / tl.sqrt(variance + norm_eps), mask=n < count)


@triton.jit
def _pool(
    inputs, mean, rstd, rows, sums, count, width, group, chunk, added,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part, of_group, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_rows = image * tl.num_programs(1) + of_group
    queries, bias = _rows(rows, of_rows, width, group, float("-inf"), K, C)
    pooled, total = tl.zeros([K, C], tl.float32), tl.zeros([K], tl.float32)
    real = (tl.arange(0, K) < group)[:, None]
    for start in range(part * chunk, min(count, (part + 1) * chunk), BLOCK):
        normed, scale = _normed(inputs, mean, rstd, image, start, count, width, C, BLOCK)
        attention = _compete(queries, bias, normed, DOT, PRECISION)
        weights = tl.where(real & (scale > 0)[None, :], attention + added, 0.0)  # [K, BLOCK]
        total += tl.sum(weights, axis=1)
        pooled += tl.dot(weights.to(DOT), normed.to(DOT), input_precision=PRECISION)
    of_sums = part * tl.num_programs(2) * tl.num_programs(1) + of_rows
    _store_rows(sums, of_sums, pooled, total, width, group, K, C)


@triton.jit
def _pool_backward(
    inputs, mean, rstd, rows, d_sums, d_rows, count, width, group, chunk,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part, of_group, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    of_rows = image * tl.num_programs(1) + of_group
    queries, bias = _rows(rows, of_rows, width, group, float("-inf"), K, C)
    factors, constant = _rows(d_sums, of_rows, width, group, 0.0, K, C)
    d_queries, d_bias = tl.zeros([K, C], tl.float32), tl.zeros([K], tl.float32)
    for start in range(part * chunk, min(count, (part + 1) * chunk), BLOCK):
        normed, scale = _normed(inputs, mean, rstd, image, start, count, width, C, BLOCK)
        attention = _compete(queries, bias, normed, DOT, PRECISION)
        d_logits = _compete_backward(factors, constant, normed, scale, attention, DOT, PRECISION)
        d_bias += tl.sum(d_logits, axis=1)
        d_queries += tl.dot(d_logits.to(DOT), normed.to(DOT), input_precision=PRECISION)
    of_sums = part * tl.num_programs(2) * tl.num_programs(1) + of_rows
    _store_rows(d_rows, of_sums, d_queries, d_bias, width, group, K, C)


@triton.jit
def _inputs_backward(
    inputs, mean, rstd, rows, d_sums, d_inputs, count, width, group, passes, added,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, image = tl.program_id(0) * BLOCK, tl.program_id(1)
    normed, scale = _normed(inputs, mean, rstd, image, start, count, width, C, BLOCK)
    d_normed = tl.zeros([BLOCK, C], tl.float32)
    for step in range(passes):  # over iterations and groups
        queries, bias = _rows(rows, image * passes + step, width, group, float("-inf"), K, C)
        factors, constant = _rows(d_sums, image * passes + step, width, group, 0.0, K, C)
        attention = _compete(queries, bias, normed, DOT, PRECISION)
        d_logits = _compete_backward(factors, constant, normed, scale, attention, DOT, PRECISION)
        d_normed += tl.dot(tl.trans(d_logits.to(DOT)), queries.to(DOT), input_precision=PRECISION)
        d_normed += tl.dot(tl.trans((attention + added).to(DOT)), factors.to(DOT), input_precision=PRECISION)
    # LayerNorm's own; masked inputs have no scale, and so no gradient.
    slope = tl.sum(d_normed * normed, axis=1) / width
    d_x = scale[:, None] * (d_normed - (tl.sum(d_normed, axis=1) / width)[:, None] - normed * slope[:, None])
    n, c = start + tl.arange(0, BLOCK), tl.arange(0, C)
    place = (image.to(tl.int64) * count + n)[:, None] * width + c[None, :]
    tl.store(d_inputs + place, d_x.to(d_inputs.dtype.element_ty), mask=(n < count)[:, None] & (c < width)[None, :])


@triton.jit
def _rows(rows, number, width, group, padding, K: tl.constexpr, C: tl.constexpr):
    """The rows of a group, float [K, C], and the last number of each; rows that only fill up have `padding` there."""
    k, c = tl.arange(0, K), tl.arange(0, C)
    place = rows + (number.to(tl.int64) * group + k) * (width + 1)
    here = (k < group)[:, None] & (c < width)[None, :]
    return (
        tl.load(place[:, None] + c[None, :], mask=here, other=0.0),
        tl.load(place + width, mask=k < group, other=padding),
    )


@triton.jit
def _store_rows(rows, number, values, last, width, group, K: tl.constexpr, C: tl.constexpr):
    k, c = tl.arange(0, K), tl.arange(0, C)
    place = rows + (number.to(tl.int64) * group + k) * (width + 1)
    tl.store(place[:, None] + c[None, :], values, mask=(k < group)[:, None] & (c < width)[None, :])
    tl.store(place + width, last, mask=k < group)


@triton.jit
def _normed(inputs, mean, rstd, image, start, count, width, C: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of normed inputs, float [BLOCK, C], and 1 / standard deviation of each: 0 where masked or past the end."""
    n, c = start + tl.arange(0, BLOCK), tl.arange(0, C)
    place = image.to(tl.int64) * count + n
    here = (n < count)[:, None] & (c < width)[None, :]
    x = tl.load(inputs + place[:, None] * width + c[None, :], mask=here, other=0.0).to(tl.float32)
    middle = tl.load(mean + place, mask=n < count, other=0.0)
    scale = tl.load(rstd + place, mask=n < count, other=0.0)
    return tl.where(here, (x - middle[:, None]) * scale[:, None], 0.0), scale


@triton.jit
def _compete(queries, bias, normed, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The softmax over the rows, [K, BLOCK]."""
    logits = tl.dot(queries.to(DOT), tl.trans(normed.to(DOT)), input_precision=PRECISION) + bias[:, None]
    powers = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return powers / tl.sum(powers, axis=0)[None, :]


@triton.jit
def _compete_backward(factors, constant, normed, scale, attention, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient of the logits, [K, BLOCK]."""
    d_weights = tl.dot(factors.to(DOT), tl.trans(normed.to(DOT)), input_precision=PRECISION) + constant[:, None]
    d_weights = tl.where((scale > 0)[None, :], d_weights, 0.0)
    return attention * (d_weights - tl.sum(attention * d_weights, axis=0)[None, :])
