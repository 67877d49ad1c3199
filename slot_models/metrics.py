"""Metrics of segmentation and of slot counts, in float64."""

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional


def adjusted_rand_index(true: Tensor, predicted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Adjusted Rand index (Hubert & Arabie 1985).

    Args:
        true: int [B, N], labels from 0.
        predicted: int [B, N], labels from 0.
        weight: bool [B, N], the points that count; all by default.

    Returns:
        float64 [B]; 1 where the index is 0 / 0 (a single cluster on both sides, or no points).
    """
    # float64: the products of pair counts overflow half precision and round in float32
    rows, columns = _indicators(true), _indicators(predicted)  # [B, N, R], [B, N, C]
    if weight is not None:
        rows = rows * weight[..., None]
    table = einsum(rows, columns, "b n r, b n c -> b r c")
    index = _pairs(table).sum((1, 2))
    in_rows, in_columns = _pairs(table.sum(2)).sum(1), _pairs(table.sum(1)).sum(1)
    expected = in_rows * in_columns / _pairs(table.sum((1, 2))).clamp(min=1)
    highest = (in_rows + in_columns) / 2
    spread = highest - expected
    return torch.where(spread == 0, 1.0, (index - expected) / torch.where(spread == 0, 1.0, spread))


def foreground_ari(true_masks: Tensor, predicted_masks: Tensor) -> Tensor:
    """Adjusted Rand index over the true foreground (Locatello et al. 2020, section 4.1).

    Args:
        true_masks: int [B, H, W], 0 is background.
        predicted_masks: float [B, K, H, W], any scale; the argmax over K is used.

    Returns:
        float64 [B], 1 is perfect.

    Raises:
        ValueError: the spatial sizes differ.
    """
    if true_masks.shape[-2:] != predicted_masks.shape[-2:]:
        raise ValueError(
            f"true_masks: size {tuple(true_masks.shape[-2:])} differs from predicted_masks' "
            f"{tuple(predicted_masks.shape[-2:])}"
        )
    true = rearrange(true_masks, "b h w -> b (h w)").long()
    predicted = rearrange(predicted_masks.argmax(dim=1), "b h w -> b (h w)")
    return adjusted_rand_index(true, predicted, weight=true > 0)


def _indicators(labels: Tensor) -> Tensor:
    return functional.one_hot(labels, int(labels.max()) + 1 if labels.numel() else 1).double()


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1) / 2
