"""Held-out evaluation: while training, on all ranks and in the run's precision, and at the end, in fp32."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestration.worker import Micro, reconstruction_error
from slot_models import SlotCounts, SlotOutput, count_confusion, foreground_ari

MOST_OBJECTS = 255  # masks are 8-bit ids


@dataclass(frozen=True)
class Evaluation:
    """Means over a held-out set.

    Fields:
        images: how many.
        reconstruction: mean squared error over all values.
        fg_ari: mean foreground ARI; None without true masks.
        counts: kept slots against objects; None where the numbers of objects are unknown.
    """

    images: int
    reconstruction: float
    fg_ari: float | None
    counts: SlotCounts | None

    def metrics(self) -> dict[str, float]:
        """By their names in MLflow, without the group eval/."""
        metrics = {"reconstruction": self.reconstruction}
        if self.fg_ari is not None:
            metrics["fg_ari"] = self.fg_ari
        if self.counts is not None:
            metrics |= {
                "count_error": self.counts.mean_absolute_error,
                "count_error_of_best_constant": self.counts.best_constant_error,
                "count_correlation": self.counts.correlation,
                "count_accuracy": self.counts.accuracy,
                "kept_mean": self.counts.kept_mean,
            }
        return metrics


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor], SlotOutput],
    micro_batches: Iterable[Micro],
    *,
    num_slots: int,
    background_slots: int,
    device: torch.device | str = "cpu",
    total: Callable[[Tensor], Tensor] = lambda values: values,
) -> Evaluation:
    """Evaluates a model on this rank's samples and adds up over ranks.

    Args:
        forward: images [m, 3, H, W] -> SlotOutput, without noise: deterministic, and independent of the batch.
        micro_batches: with masks where there are any; padding has weight 0.
        total: the sum of a tensor over ranks.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # images, reconstruction, images with masks, FG-ARI
    confusion = torch.zeros(num_slots + 1, MOST_OBJECTS + 1, dtype=torch.float64)
    for micro in micro_batches:
        micro = micro.to(torch.device(device))
        output = forward(micro.images)
        real = micro.weight > 0
        sums[0] += real.sum().cpu()
        sums[1] += reconstruction_error(output)[real].double().sum().cpu()
        if micro.masks is not None:
            sums[2] += real.sum().cpu()
            sums[3] += foreground_ari(micro.masks, output.masks_at(*micro.masks.shape[-2:]))[real].sum().cpu()
        kept = output.keep.sum(dim=1).round().long()
        confusion += count_confusion(kept[real], micro.num_objects[real], num_slots, MOST_OBJECTS).cpu()
    everything = total(torch.cat([sums, confusion.flatten()]))
    images, reconstruction, masked, fg_ari = everything[:4].tolist()
    confusion = everything[4:].view_as(confusion)
    return Evaluation(
        images=int(images),
        reconstruction=reconstruction / images,
        fg_ari=fg_ari / masked if masked else None,
        counts=SlotCounts(_trimmed(confusion), background_slots) if confusion.sum() else None,
    )


def _trimmed(confusion: Tensor) -> Tensor:
    """Without the columns of more objects than any image has."""
    return confusion[:, : int(confusion.sum(dim=0).nonzero().max()) + 1].clone()
