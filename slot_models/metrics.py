"""Metrics of segmentation in float64, one value an image, and their means over batches and ranks.

The true label 0 is background. It is no object: overlaps are averaged over the objects of an image, and an image
without any has no value (NaN), which means leave out. A predicted segmentation gives each pixel to the slot with the
largest mask, the first of several; slots have no order and none of them is the background's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from slot_models.checks import check_shape
from slot_models.matching import match

LABELS_AS_THEY_ARE = 1024  # a table of label against label stays small up to here


def adjusted_rand_index(true: Tensor, predicted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Adjusted Rand index (Hubert & Arabie 1985).

    Args:
        true: int [B, N], labels from 0.
        predicted: int [B, N], labels from 0.
        weight: bool [B, N], the points that count; all by default.

    Returns:
        float64 [B]; 1 where the index is 0 / 0 (a single cluster on both sides, or no points).

    Raises:
        ValueError: a shape or dtype does not fit, or a label that counts is negative.
    """
    check_shape("true", true, ("B", "N"))
    check_shape("predicted", predicted, tuple(true.shape))
    if weight is not None:
        check_shape("weight", weight, tuple(true.shape))
    counted = torch.ones_like(true, dtype=torch.bool) if weight is None else weight.bool()
    return _rand_index(_pair_counts(_labels("true", true, counted), _labels("predicted", predicted, counted), counted))


def foreground_ari(true_masks: Tensor, predicted_masks: Tensor, *, ignore: int | None = None) -> Tensor:
    """Adjusted Rand index over the true foreground (Locatello et al. 2020, section 4.1).

    Args:
        true_masks: int [B, H, W], 0 is background.
        predicted_masks: float [B, K, H, W], any scale; the argmax over K is used.
        ignore: a label of true_masks whose pixels count nowhere (255 for the borders of VOC).

    Returns:
        float64 [B], 1 is perfect; 1 too where the index is 0 / 0, so in an image without any object.

    Raises:
        ValueError: a shape or dtype does not fit, there is no slot, a label is negative, or a mask holds NaN.
    """
    return _rand_index(_overlaps(true_masks, predicted_masks, ignore)[:, 1:])


def mean_best_overlap(true_masks: Tensor, predicted_masks: Tensor, *, ignore: int | None = None) -> Tensor:
    """mBO: the best intersection over union that any slot has with an object, mean over objects (Seitzer et al. 2023).

    Several objects may have their best overlap with the same slot. Arguments and errors: see foreground_ari.

    Returns:
        float64 [B], 1 is perfect; NaN in an image without any object.
    """
    iou, objects = _intersection_over_union(_overlaps(true_masks, predicted_masks, ignore))
    return iou.amax(dim=2).sum(dim=1) / objects


def mean_iou(true_masks: Tensor, predicted_masks: Tensor, *, ignore: int | None = None) -> Tensor:
    """mIoU: intersection over union of objects matched one to one with slots (Hungarian), mean over objects.

    An object that is left without a slot counts as 0. Arguments and errors: see foreground_ari.

    Returns:
        float64 [B], 1 is perfect; NaN in an image without any object.

    Raises:
        ImportError: scipy is missing.
    """
    iou, objects = _intersection_over_union(_overlaps(true_masks, predicted_masks, ignore))
    return _matched(iou).sum(dim=1) / objects


def correct_localization(true_masks: Tensor, predicted_masks: Tensor, *, ignore: int | None = None) -> Tensor:
    """CorLoc: is there an object with an intersection over union above a half?

    Arguments and errors: see foreground_ari.

    Returns:
        float64 [B], 1 or 0; NaN in an image without any object.
    """
    iou, objects = _intersection_over_union(_overlaps(true_masks, predicted_masks, ignore))
    return _located(iou, objects)


def segmentation_metrics(
    true_masks: Tensor, predicted_masks: Tensor, *, ignore: int | None = None
) -> dict[str, Tensor]:
    """All of the above from one count of the pixels.

    Arguments and errors: see foreground_ari.

    Returns:
        float64 [B] under ari (the background is a cluster like any other), fg_ari, mbo, miou and corloc. An image
        without any object has an ari alone; the others are NaN, and fg_ari too, since its 1 would say nothing.

    Raises:
        ImportError: scipy is missing.
    """
    overlaps = _overlaps(true_masks, predicted_masks, ignore)  # [B, R, C]
    iou, objects = _intersection_over_union(overlaps)
    return {
        "ari": _rand_index(overlaps),
        "fg_ari": torch.where(objects > 0, _rand_index(overlaps[:, 1:]), torch.nan),
        "mbo": iou.amax(dim=2).sum(dim=1) / objects,
        "miou": _matched(iou).sum(dim=1) / objects,
        "corloc": _located(iou, objects),
    }


@dataclass(frozen=True, eq=False)
class MetricSums:
    """Sums of per-image metrics: what batches and ranks add up to a mean.

    A sum over ranks is one reduction: ``MetricSums.from_tensor(sums.names, total(sums.tensor()))``; a rank without
    images brings ``MetricSums.zeros(names)``.

    Fields:
        names: of the metrics, in order.
        total: float64 [M], sums over the images that have a value.
        count: float64 [M], how many those are.
    """

    names: tuple[str, ...]
    total: Tensor
    count: Tensor

    @classmethod
    def zeros(cls, names: Sequence[str]) -> "MetricSums":
        return cls.from_tensor(names, torch.zeros(2 * len(names), dtype=torch.float64))

    @classmethod
    def from_batch(cls, metrics: Mapping[str, Tensor], counted: Tensor | None = None) -> "MetricSums":
        """Sums over a batch.

        Args:
            metrics: [B] by name; NaN where an image has no value.
            counted: bool [B], the images that count (padding does not); all by default.

        Raises:
            ValueError: a shape does not fit.
        """
        if not metrics:
            return cls.zeros(())
        if counted is not None:
            check_shape("counted", counted, ("B",))
        sums = []
        for name, values in metrics.items():
            check_shape(name, values, ("B",) if counted is None else tuple(counted.shape))
            has_value = ~values.isnan() if counted is None else ~values.isnan() & counted.bool()
            sums.append(torch.stack([torch.where(has_value, values, 0).double().sum(), has_value.double().sum()]))
        return cls.from_tensor(tuple(metrics), torch.stack(sums, dim=1).flatten().cpu())  # [2, M] -> [2M]

    @classmethod
    def from_tensor(cls, names: Sequence[str], tensor: Tensor) -> "MetricSums":
        """From a flat float64 [2M], see tensor()."""
        check_shape("tensor", tensor, (2 * len(names),))
        total, count = tensor.double().chunk(2)
        return cls(tuple(names), total, count)

    def tensor(self) -> Tensor:
        """float64 [2M]: totals, then counts; tensors of the same names add up."""
        return torch.cat([self.total, self.count])

    def __add__(self, other: "MetricSums") -> "MetricSums":
        if self.names != other.names:
            raise ValueError(f"names: {self.names} differ from {other.names}")
        return MetricSums(self.names, self.total + other.total, self.count + other.count)

    def means(self) -> dict[str, float]:
        """Means over the images that have a value; a metric that no image has is left out."""
        sums = zip(self.names, self.total.tolist(), self.count.tolist(), strict=True)
        return {name: total / count for name, total, count in sums if count}


def _overlaps(true_masks: Tensor, predicted_masks: Tensor, ignore: int | None) -> Tensor:
    """How many pixels a label shares with a slot; label 0 comes first. float64 [B, R, C]"""
    check_shape("true_masks", true_masks, ("B", "H", "W"))
    check_shape("predicted_masks", predicted_masks, (len(true_masks), "K", "H", "W"))
    if true_masks.shape[-2:] != predicted_masks.shape[-2:]:
        raise ValueError(
            f"true_masks: size {tuple(true_masks.shape[-2:])} differs from predicted_masks' "
            f"{tuple(predicted_masks.shape[-2:])}"
        )
    if not predicted_masks.is_floating_point():
        raise ValueError(f"predicted_masks: dtype {predicted_masks.dtype} is not a floating one; take .float()")
    if predicted_masks.shape[1] == 0:
        raise ValueError("predicted_masks: there are no slots; a segmentation needs one")
    largest, slots = predicted_masks.max(dim=1)  # [B, H, W], the first slot of several
    if bool(largest.isnan().any()):
        raise ValueError("predicted_masks: it holds NaN; look for what the model diverged on")
    true = rearrange(true_masks, "b h w -> b (h w)")
    counted = torch.ones_like(true, dtype=torch.bool) if ignore is None else true != ignore
    return _pair_counts(_labels("true_masks", true, counted), rearrange(slots, "b h w -> b (h w)"), counted)


def _labels(name: str, labels: Tensor, counted: Tensor) -> Tensor:
    """The labels as int64, 0 where they do not count; small even where they were not, as 24-bit ids of panoptics."""
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{name}: dtype {labels.dtype} is not an integer one")
    labels = torch.where(counted, labels.long(), 0)
    if labels.numel() == 0:
        return labels
    least, most = (int(value) for value in labels.aminmax())
    if least < 0:
        raise ValueError(f"{name}: label {least} is negative; labels begin at 0")
    if most > LABELS_AS_THEY_ARE:
        with_zero = torch.cat([labels.new_zeros(1), labels.flatten()])  # so that 0 stays 0
        labels = torch.unique(with_zero, return_inverse=True)[1][1:].view_as(labels)
    return labels


def _pair_counts(rows: Tensor, columns: Tensor, counted: Tensor) -> Tensor:
    """Contingency tables: how often label r of ``rows`` [B, N] meets label c of ``columns`` [B, N].

    float64 [B, R, C]: the products of counts overflow half precision and round in float32.
    """
    batch = len(rows)
    sizes = [int(labels.max()) + 1 if labels.numel() else 1 for labels in (rows, columns)]
    image = torch.arange(batch, device=rows.device)[:, None]  # [B, 1]
    cells = (image * sizes[0] + rows) * sizes[1] + columns  # [B, N]
    counts = torch.bincount(cells[counted], minlength=batch * sizes[0] * sizes[1])
    return counts.double().view(batch, *sizes)


def _rand_index(table: Tensor) -> Tensor:
    """Adjusted Rand index of contingency tables [B, R, C]. [B]"""
    index = _pairs(table).sum(dim=(1, 2))
    in_rows, in_columns = _pairs(table.sum(dim=2)).sum(dim=1), _pairs(table.sum(dim=1)).sum(dim=1)
    expected = in_rows * in_columns / _pairs(table.sum(dim=(1, 2))).clamp(min=1)
    highest = (in_rows + in_columns) / 2
    spread = highest - expected
    return torch.where(spread == 0, 1.0, (index - expected) / torch.where(spread == 0, 1.0, spread))


def _pairs(count: Tensor) -> Tensor:
    return count * (count - 1) / 2


def _intersection_over_union(overlaps: Tensor) -> tuple[Tensor, Tensor]:
    """Of each label but the background with each slot [B, O, C], 0 for labels that an image lacks; and objects [B]."""
    intersection = overlaps[:, 1:]  # [B, O, C]
    label_pixels, slot_pixels = intersection.sum(dim=2), overlaps.sum(dim=1)  # [B, O], [B, C]
    union = label_pixels[:, :, None] + slot_pixels[:, None] - intersection
    return intersection / union.clamp(min=1), (label_pixels > 0).sum(dim=1)


def _matched(iou: Tensor) -> Tensor:
    """Overlaps of the matched pairs [B, min(O, C)]."""
    rows, columns = match(-iou)  # a label that the image lacks overlaps nothing, so it never costs another its slot
    return iou[torch.arange(len(iou), device=iou.device)[:, None], rows, columns]


def _located(iou: Tensor, objects: Tensor) -> Tensor:
    return torch.where(objects > 0, (iou > 0.5).any(dim=2).any(dim=1).double(), torch.nan)
