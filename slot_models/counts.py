"""Kept slots against objects: does the gate decide the right number?"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


def count_confusion(kept: Tensor, objects: Tensor, most_kept: int, most_objects: int) -> Tensor:
    """How often each number of kept slots met each number of objects.

    Args:
        kept: int [B], at most ``most_kept``.
        objects: int [B]; images with an unknown number (below 0) are left out.

    Returns:
        float64 [most_kept + 1, most_objects + 1]; sums over batches and ranks add up.

    Raises:
        ValueError: a number is above its most.
    """
    known = objects >= 0
    kept, objects = kept[known].long(), objects[known].long()
    for name, values, most in (("kept", kept, most_kept), ("objects", objects, most_objects)):
        if values.numel() and int(values.max()) > most:
            raise ValueError(f"{name}: {int(values.max())} is above {most}")
    cells = functional.one_hot(kept * (most_objects + 1) + objects, (most_kept + 1) * (most_objects + 1))
    return cells.sum(dim=0).double().view(most_kept + 1, most_objects + 1)


@dataclass(frozen=True)
class SlotCounts:
    """Metrics of a confusion of counts.

    Fields:
        confusion: float64 [K + 1, N + 1], see count_confusion.
        background_slots: kept slots that hold no object; taken off the kept ones.
    """

    confusion: Tensor
    background_slots: int = 0

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        """Share of the images with exactly the right number."""
        return self._mean(self._difference() == 0)

    @property
    def mean_absolute_error(self) -> float:
        return self._mean(self._difference().abs())

    @property
    def best_constant_error(self) -> float:
        """Mean absolute error of the best answer that does not look at the image: what a gate has to beat."""
        objects = torch.arange(self.confusion.shape[1])
        return min(self._mean((objects - constant).abs().expand_as(self.confusion)) for constant in objects)

    @property
    def correlation(self) -> float:
        """Pearson's; 0 where the kept slots never vary."""
        weight = self.confusion / self.confusion.sum()
        kept, objects = self._grids()
        kept = kept - (weight * kept).sum()
        objects = objects - (weight * objects).sum()
        spread = ((weight * kept**2).sum() * (weight * objects**2).sum()).sqrt()
        return float((weight * kept * objects).sum() / spread) if spread > 0 else 0.0

    @property
    def kept_mean(self) -> float:
        """Kept slots an image, the background's among them."""
        return self._mean(self._grids()[0])

    def _grids(self) -> tuple[Tensor, Tensor]:
        kept, objects = (torch.arange(size, dtype=torch.float64) for size in self.confusion.shape)
        return kept[:, None].expand_as(self.confusion), objects[None].expand_as(self.confusion)

    def _difference(self) -> Tensor:
        kept, objects = self._grids()
        return kept - self.background_slots - objects

    def _mean(self, values: Tensor) -> float:
        return float((self.confusion * values).sum() / self.confusion.sum())
