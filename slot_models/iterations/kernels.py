# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False
# ruff: noqa: N803 - sizes known to the compiler are in capitals, as is usual in Triton
"""Passes over the inputs in Triton: normed, competed for and summed in registers, each input read once a pass.

See passes for what each one is. A program takes a part of an image's inputs, tile by tile; partial sums are added in a
fixed order, so results do not change from run to run. The multiplications are of the inputs' dtype or, where `half`
says so, in bfloat16; sums and softmax are in float32. With TRITON_INTERPRET=1 all of it runs on the CPU.

Multiplications of float32 are three of TF32 each, which are as exact to a part in a million; exact ones would take no
tensor cores and more registers than there are. Tiles are such that a program keeps what it works with in registers, and
takes no more than the 99 KiB of shared memory that every GPU since Ampere has. Triton compiles for GPUs that are not
there: tests/slot_models/test_kernel_resources.py has what the assembler made of each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_ROWS = 64  # of a group
_MOST_NUMBERS = {True: 8192, False: 2048}  # of a group's rows, filled up, where they multiply in bfloat16, in float32
_TENSOR_CORES = (8, 0)  # the compute capability from which they multiply bfloat16 and TF32
_PROGRAMS_PER_PROCESSOR = 4
_INTERPRETED = bool(triton.knobs.runtime.interpret)


def supports(inputs: Tensor, rows_of_group: int, half: bool) -> bool:
    """Whether there is a kernel for inputs [B, N, C] on their device; where there is none, plain torch does."""
    return (
        (_INTERPRETED or (inputs.is_cuda and _has_tensor_cores(inputs.device)))
        and inputs.dtype in (torch.float32, torch.bfloat16)
        and rows_of_group <= _MOST_ROWS
        and _filled_up(rows_of_group) * _filled_up(inputs.shape[2]) <= _MOST_NUMBERS[_in_bfloat16(inputs, half)]
    )


def statistics(inputs: Tensor, norm_eps: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, count, width = inputs.shape
    mean = torch.empty(batch, count, dtype=torch.float32, device=inputs.device)
    rstd = torch.empty_like(mean)
    tile = _tile(1, width, half=True)
    _statistics[(triton.cdiv(batch * count, tile["BLOCK"]),)](
        inputs, mean, rstd, batch * count, width, norm_eps, C=_filled_up(width), **tile
    )
    return mean, rstd if mask is None else rstd.mul_(mask)


def pool(inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, groups: int, added: float, half: bool) -> Tensor:
    constants = _constants(inputs, rows.shape[1] // groups, half)
    parts, chunk = _cut(inputs, groups, constants)
    partial = torch.empty(parts, *rows.shape, dtype=torch.float32, device=inputs.device)
    _pool[parts, groups, inputs.shape[0]](
        inputs, mean, rstd, rows, partial, *inputs.shape[1:], rows.shape[1] // groups, chunk, added, **constants
    )
    return partial.sum(dim=0)


def pool_backward(
    inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, d_sums: Tensor, groups: int, half: bool
) -> Tensor:
    constants = _constants(inputs, rows.shape[1] // groups, half)
    parts, chunk = _cut(inputs, groups, constants)
    partial = torch.empty(parts, *rows.shape, dtype=torch.float32, device=inputs.device)
    _pool_backward[parts, groups, inputs.shape[0]](
        inputs, mean, rstd, rows, d_sums, partial, *inputs.shape[1:], rows.shape[1] // groups, chunk, **constants
    )
    return partial.sum(dim=0)


def inputs_backward(
    inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, d_sums: Tensor, groups: int, added: float, half: bool
) -> Tensor:
    """The gradient of the inputs through T passes; rows and d_sums are [B, T, R, C + 1]."""
    batch, passes, rows_of_image, _ = rows.shape
    constants = _constants(inputs, rows_of_image // groups, half, beside=2)
    parts, chunk = _cut(inputs, 1, constants)
    d_inputs = torch.empty_like(inputs)
    _inputs_backward[parts, batch](
        inputs, mean, rstd, rows, d_sums, d_inputs, *inputs.shape[1:], rows_of_image // groups, passes * groups, chunk,
        added, **constants,
    )  # fmt: skip
    return d_inputs


def _cut(inputs: Tensor, groups: int, constants: dict[str, Any]) -> tuple[int, int]:
    """Into how many parts an image's inputs are cut, a program each, and of how many inputs."""
    batch, count, _ = inputs.shape
    tiles = triton.cdiv(count, constants["BLOCK"])
    wanted = triton.cdiv(_PROGRAMS_PER_PROCESSOR * _processors(inputs), batch * groups)
    chunk = triton.cdiv(tiles, min(tiles, wanted)) * constants["BLOCK"]
    return triton.cdiv(count, chunk), chunk


def _constants(inputs: Tensor, rows_of_group: int, half: bool, beside: int = 1) -> dict[str, Any]:
    """What a kernel is compiled for that keeps so many tiles beside each other."""
    in_bfloat16 = _in_bfloat16(inputs, half)
    return _tile(rows_of_group, inputs.shape[2], in_bfloat16, beside) | {
        "K": _filled_up(rows_of_group),
        "C": _filled_up(inputs.shape[2]),
        # the interpreter multiplies bfloat16 as integers
        "DOT": tl.bfloat16 if in_bfloat16 and not _INTERPRETED else tl.float32,
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
    }


def _tile(rows_of_group: int, width: int, half: bool, beside: int = 1) -> dict[str, int]:
    """Inputs of a tile, so that a thread has so many numbers of what it keeps of a tile or of its attention."""
    numbers, rows, channels = 32 if half else 16, _filled_up(rows_of_group), _filled_up(width)
    warps = 4 if rows <= 32 and rows * channels <= 64 * numbers else 8
    block = 32 * warps * numbers // (beside * max(channels, rows * rows // 8))
    return {"BLOCK": max(16, block), "num_warps": warps, "num_stages": 2}


def _filled_up(size: int) -> int:
    """The next size that tensor cores take."""
    filled = 16
    while filled < size:
        filled *= 2
    return filled


def _in_bfloat16(inputs: Tensor, half: bool) -> bool:
    return half or inputs.dtype == torch.bfloat16


@torch.compiler.assume_constant_result
def _has_tensor_cores(device: torch.device) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= _TENSOR_CORES


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
    inputs, mean, rstd, rows, d_sums, d_inputs, count, width, group, passes, chunk, added,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part, image = tl.program_id(0), tl.program_id(1)
    for start in tl.range(part * chunk, min(count, (part + 1) * chunk), BLOCK, num_stages=1, disable_licm=True):
        known, scale = _normed(inputs, mean, rstd, image, start, count, width, C, BLOCK)
        factor = known.to(DOT)
        d_normed = tl.zeros([BLOCK, C], tl.float32)
        for step in range(passes):  # over iterations and groups
            queries, bias = _rows(rows, image * passes + step, width, group, float("-inf"), K, C)
            factors, constant = _rows(d_sums, image * passes + step, width, group, 0.0, K, C)
            attention = _compete(queries, bias, factor, DOT, PRECISION)
            d_logits = _compete_backward(factors, constant, factor, scale, attention, DOT, PRECISION)
            d_normed += tl.dot(tl.trans(d_logits.to(DOT)), queries.to(DOT), input_precision=PRECISION)
            d_normed += tl.dot(tl.trans((attention + added).to(DOT)), factors.to(DOT), input_precision=PRECISION)
        # LayerNorm's own; masked inputs have no scale, and so no gradient. What it norms is read again, from a cache:
        # beside the gradient there are no registers to keep it.
        normed, scale = _normed(inputs, mean, rstd, image, start, count, width, C, BLOCK, "evict_first")
        slope = tl.sum(d_normed * normed, axis=1) / width
        d_x = scale[:, None] * (d_normed - (tl.sum(d_normed, axis=1) / width)[:, None] - normed * slope[:, None])
        n, c = start + tl.arange(0, BLOCK), tl.arange(0, C)
        place = d_inputs + image.to(tl.int64) * count * width + (n[:, None] * width + c[None, :])
        tl.store(place, d_x.to(d_inputs.dtype.element_ty), mask=(n < count)[:, None] & (c < width)[None, :])


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
def _normed(
    inputs, mean, rstd, image, start, count, width, C: tl.constexpr, BLOCK: tl.constexpr, CACHED: tl.constexpr = ""
):  # fmt: skip
    """A tile of normed inputs, float [BLOCK, C], and 1 / standard deviation of each: 0 where masked or past the end."""
    n, c = start + tl.arange(0, BLOCK), tl.arange(0, C)
    before = image.to(tl.int64) * count
    here = (n < count)[:, None] & (c < width)[None, :]
    place = inputs + before * width + (n[:, None] * width + c[None, :])
    x = tl.load(place, mask=here, other=0.0, eviction_policy=CACHED).to(tl.float32)
    middle = tl.load(mean + before + n, mask=n < count, other=0.0)
    scale = tl.load(rstd + before + n, mask=n < count, other=0.0)
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
