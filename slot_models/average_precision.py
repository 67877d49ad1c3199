"""Average precision of predicted sets of objects."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slot_models.checks import check_shape
from slot_models.set_prediction import COORDINATE_RANGE, COORDINATES, FACTORS, IS_REAL, ROW_WIDTH

THRESHOLDS = (math.inf, 1.0, 0.5, 0.25, 0.125)  # the published ones


@torch.no_grad()
def average_precision(predictions: Tensor, targets: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """Average precision of CLEVR's set prediction (Locatello et al. 2020, section 4.2, and its code).

    All predictions of all images are taken by falling confidence (the last column). A prediction names, among the
    objects of its image whose size, material, shape and colour it has right (argmax), the nearest one, detected or not,
    the first of several. It is a true positive where that distance is below the threshold and no prediction before it
    detected the same object. The precision is made monotone from the right, and its area over recall is taken.

    Equal confidences keep the order of images and slots, so only where two are exactly equal does that order matter.

    Args:
        predictions: float [B, K, 19]; the columns: see clevr_targets.
        targets: float [B, N, 19], is_real 0 or 1. N may differ from K.
        thresholds: T distances in the units of the scene, above 0.

    Returns:
        float64 [T], in 0..1; NaN where there is no object at all.

    Raises:
        ValueError: a shape does not fit, there are no slots, a number is NaN or infinite, is_real is neither 0 nor 1,
            or a threshold is not positive.
    """
    _check_rows(predictions, targets)
    for threshold in thresholds:
        if not threshold > 0:
            raise ValueError(f"thresholds: {threshold} is not positive")
    batch, slots, _ = predictions.shape
    rows = targets.shape[1]
    confidence = predictions[..., IS_REAL].flatten()  # [B * K]
    nearest, distance = _nearest_objects(predictions.double(), targets.double())  # [B, K]
    first_row = torch.arange(batch, device=targets.device)[:, None] * rows
    order = confidence.argsort(descending=True, stable=True)
    named, distance = (nearest + first_row).flatten()[order], distance.flatten()[order]  # [P], P = B * K

    # An object is detected by the first prediction that is near enough among those that name it.
    total, limits = batch * slots, torch.tensor(thresholds, dtype=torch.float64, device=distance.device)
    place = torch.arange(total, device=distance.device)  # [P]
    near = distance < limits[:, None]  # [T, P]
    named = named.expand_as(near)
    detected_at = torch.full((len(limits), batch * rows), total, device=distance.device)  # [T, B * N]
    detected_at = detected_at.scatter_reduce(1, named, torch.where(near, place, total), "amin")
    true_positive = near & (detected_at.gather(1, named) == place)  # [T, P]

    precision = true_positive.cumsum(dim=1).double() / (place + 1)
    envelope = precision.flip(1).cummax(dim=1).values.flip(1)
    # each true positive raises the recall by 1 / objects
    return (envelope * true_positive).sum(dim=1) / targets[..., IS_REAL].double().sum()


@dataclass(frozen=True, eq=False)
class SetResults:
    """Predicted sets and their targets, kept for an average precision over batches and ranks.

    Fields:
        predictions: float64 [I, K, 19], on the CPU.
        targets: float64 [I, N, 19], on the CPU.
    """

    predictions: Tensor
    targets: Tensor

    @classmethod
    def empty(cls, slots: int, rows: int) -> "SetResults":
        """Of no images: what a rank without any begins with."""
        return cls(*(torch.zeros(0, size, ROW_WIDTH, dtype=torch.float64) for size in (slots, rows)))

    @classmethod
    def from_batch(cls, predictions: Tensor, targets: Tensor, counted: Tensor | None = None) -> "SetResults":
        """Keeps a batch.

        Args:
            predictions, targets: see average_precision.
            counted: bool [B], the images that count (padding does not); all by default.

        Raises:
            ValueError: see average_precision.
        """
        _check_rows(predictions, targets)
        if counted is not None:
            check_shape("counted", counted, (len(predictions),))
            predictions, targets = predictions[counted], targets[counted]
        return cls(*(values.detach().double().cpu() for values in (predictions, targets)))

    def __add__(self, other: "SetResults") -> "SetResults":
        return SetResults(torch.cat([self.predictions, other.predictions]), torch.cat([self.targets, other.targets]))

    def over_ranks(self, total: Callable[[Tensor], Tensor], rank: int, world: int) -> "SetResults":
        """The images of all ranks, in the order of the ranks, on every rank; K and N are the same on all of them.

        Args:
            total: the sum of a tensor over ranks; called twice by every rank. What is added to a number is zero, so
                nothing rounds.
        """
        images = torch.zeros(world, dtype=torch.float64)
        images[rank] = len(self.predictions)
        images = total(images)
        before, everyone = int(images[:rank].sum()), int(images.sum())
        both = torch.cat([self.predictions, self.targets], dim=1)  # [I, K + N, 19]
        rows = both.new_zeros(everyone, *both.shape[1:])
        rows[before : before + len(both)] = both
        rows = total(rows)
        slots = self.predictions.shape[1]
        return SetResults(rows[:, :slots], rows[:, slots:])

    def average_precision(self, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
        """See average_precision. float64 [T]"""
        return average_precision(self.predictions, self.targets, thresholds)


def _nearest_objects(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The row of the object that each prediction names [B, K], and how far it is [B, K]; infinity if it names none."""
    offset = predictions[:, :, None, COORDINATES] - targets[:, None, :, COORDINATES]  # [B, K, N, 3]
    distance = torch.linalg.vector_norm(offset * COORDINATE_RANGE, dim=3)  # [B, K, N]
    same = (_factors(predictions)[:, :, None] == _factors(targets)[:, None]).all(dim=3)  # [B, K, N]
    real = targets[:, None, :, IS_REAL] == 1  # [B, 1, N]
    nearest = torch.where(same & real, distance, math.inf).min(dim=2)
    return nearest.indices, nearest.values


def _factors(rows: Tensor) -> Tensor:
    """Classes of size, material, shape and colour. [B, K, 19] -> int64 [B, K, 4]"""
    return torch.stack([rows[..., place].argmax(dim=-1) for place in FACTORS.values()], dim=-1)


def _check_rows(predictions: Tensor, targets: Tensor) -> None:
    check_shape("predictions", predictions, ("B", "K", ROW_WIDTH))
    check_shape("targets", targets, (len(predictions), "N", ROW_WIDTH))
    for name, values in (("predictions", predictions), ("targets", targets)):
        if values.shape[1] == 0:
            raise ValueError(f"{name}: shape {tuple(values.shape)} has no rows; a set needs one")
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name}: it holds NaN or infinity")
    is_real = targets[..., IS_REAL]
    if not bool(((is_real == 0) | (is_real == 1)).all()):
        raise ValueError("targets: is_real, the last column, is neither 0 nor 1 in some row")
