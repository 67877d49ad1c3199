"""Held-out evaluation: while training, on all ranks and in the run's precision, and at the end, in fp32."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestration.worker import DivergedError, Micro, reconstruction_error
from slot_models import MetricSums, SlotCounts, SlotOutput, count_confusion, segmentation_metrics

MOST_OBJECTS = 255  # masks are 8-bit ids
SEGMENTATION = ("ari", "fg_ari", "mbo", "miou", "corloc")


@dataclass(frozen=True)
class Evaluation:
    """Means over a held-out set.

    Fields:
        images: how many.
        means: by name: reconstruction, the mean squared error over all values; with true masks ari, fg_ari, mbo, miou
            and corloc, those of objects over the images that have any.
        counts: kept slots against objects; None where the numbers of objects are unknown.
    """

    images: int
    means: Mapping[str, float]
    counts: SlotCounts | None

    @property
    def reconstruction(self) -> float:
        return self.means["reconstruction"]

    @property
    def fg_ari(self) -> float | None:
        """None without true masks."""
        return self.means.get("fg_ari")

    def metrics(self) -> dict[str, float]:
        """By their names in MLflow, without the group eval/."""
        metrics = dict(self.means)
        if self.counts is not None:
            metrics |= {
                "count_error": self.counts.mean_absolute_error,
                "count_error_of_best_constant": self.counts.best_constant_error,
                "count_correlation": self.counts.correlation,
                "count_accuracy": self.counts.accuracy,
                "kept_mean": self.counts.kept_mean,
            }
        return metrics


def yardstick(metrics: Mapping[str, float]) -> tuple[str, int]:
    """The metric by which models are compared, and its sign: the highest fg_ari; without masks, the lowest error."""
    return ("fg_ari", 1) if "fg_ari" in metrics else ("reconstruction", -1)


def image_metrics(output: SlotOutput, masks: Tensor | None) -> dict[str, Tensor]:
    """Each image's metrics: reconstruction [m]; with true masks [m, H, W] those of SEGMENTATION too, float64 [m]."""
    error = reconstruction_error(output)
    if masks is None:
        return {"reconstruction": error}
    found = segmentation_metrics(masks, output.masks_at(*masks.shape[-2:]).float())
    return {"reconstruction": error, **found}


def is_finite(output: SlotOutput) -> bool:
    """Whether the masks and the reconstruction error of every image are."""
    return bool(output.masks.isfinite().all() and reconstruction_error(output).isfinite().all())


def kept_slots(output: SlotOutput) -> Tensor:
    """How many slots each image keeps. int64 [m]"""
    return output.keep.sum(dim=1).round().long()


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

    Raises:
        DivergedError: a mask or an error is not finite.
    """
    errors, segmentation = MetricSums.zeros(("reconstruction",)), MetricSums.zeros(SEGMENTATION)
    confusion = torch.zeros(num_slots + 1, MOST_OBJECTS + 1, dtype=torch.float64)
    for micro in micro_batches:
        micro = micro.to(torch.device(device))
        output = forward(micro.images)
        if not is_finite(output):
            raise DivergedError("what the model makes of held-out images is not finite; lower train.learning_rate")
        found, real = image_metrics(output, micro.masks), micro.weight > 0
        errors += MetricSums.from_batch({"reconstruction": found.pop("reconstruction")}, real)
        if found:
            segmentation += MetricSums.from_batch(found, real)
        confusion += count_confusion(kept_slots(output)[real], micro.num_objects[real], num_slots, MOST_OBJECTS).cpu()
    everything = total(torch.cat([errors.tensor(), segmentation.tensor(), confusion.flatten()]))
    first, second = 2, 2 + 2 * len(SEGMENTATION)
    errors = MetricSums.from_tensor(errors.names, everything[:first])
    segmentation = MetricSums.from_tensor(SEGMENTATION, everything[first:second])
    confusion = everything[second:].view_as(confusion)
    return Evaluation(
        images=int(errors.count.sum()),
        means=errors.means() | segmentation.means(),
        counts=SlotCounts(_trimmed(confusion), background_slots) if confusion.sum() else None,
    )


def _trimmed(confusion: Tensor) -> Tensor:
    """Without the columns of more objects than any image has."""
    return confusion[:, : int(confusion.sum(dim=0).nonzero().max()) + 1].clone()
