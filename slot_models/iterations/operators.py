"""The Triton passes as operators that torch.compile takes as they are."""

import torch
from torch import Tensor


@torch.library.custom_op("slot_models::statistics", mutates_args=())
def statistics(inputs: Tensor, norm_eps: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    from slot_models.iterations import kernels

    return kernels.statistics(inputs, norm_eps, mask)


@statistics.register_fake
def _(inputs: Tensor, norm_eps: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    mean = inputs.new_empty(inputs.shape[:2], dtype=torch.float32)
    return mean, torch.empty_like(mean)


@torch.library.custom_op("slot_models::pool", mutates_args=())
def pool(inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, groups: int, added: float, half: bool) -> Tensor:
    from slot_models.iterations import kernels

    return kernels.pool(inputs, mean, rstd, rows, groups, added, half)


@pool.register_fake
def _(inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, groups: int, added: float, half: bool) -> Tensor:
    return rows.new_empty(rows.shape)


@torch.library.custom_op("slot_models::pool_backward", mutates_args=())
def pool_backward(
    inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, d_sums: Tensor, groups: int, half: bool
) -> Tensor:
    from slot_models.iterations import kernels

    return kernels.pool_backward(inputs, mean, rstd, rows, d_sums, groups, half)


@pool_backward.register_fake
def _(inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, d_sums: Tensor, groups: int, half: bool) -> Tensor:
    return rows.new_empty(rows.shape)


@torch.library.custom_op("slot_models::inputs_backward", mutates_args=())
def inputs_backward(
    inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, d_sums: Tensor, groups: int, added: float, half: bool
) -> Tensor:
    from slot_models.iterations import kernels

    return kernels.inputs_backward(inputs, mean, rstd, rows, d_sums, groups, added, half)


@inputs_backward.register_fake
def _(
    inputs: Tensor, mean: Tensor, rstd: Tensor, rows: Tensor, d_sums: Tensor, groups: int, added: float, half: bool
) -> Tensor:
    return torch.empty_like(inputs)
