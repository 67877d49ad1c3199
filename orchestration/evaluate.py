"""Held-out evaluation: while training, on all ranks and in the run's precision, and at the end, in fp32."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestration.usage import SlotUsage
from orchestration.worker import DivergedError, Micro, reconstruction_error
from slot_models import MetricSums, SlotCounts, SlotOutput, count_confusion, segmentation_metrics

MOST_OBJECTS = 255  # masks are 8-bit ids
SEGMENTATION = ("ari", "fg_ari", "mbo", "miou", "corloc")
LESS_IS_BETTER = {"reconstruction", "count_error"}


@dataclass(frozen=True)
class Evaluation:
    """Means over a held-out set.

    Fields:
        images: how many.
        means: by name: reconstruction, the mean squared error over all values; with true masks ari, fg_ari, mbo, miou
            and corloc, those of objects over the images that have any.
        counts: kept slots against objects; None where the numbers of objects are unknown.
        usage: of the slots; None where it was not summed.
    """

    images: int
    means: Mapping[str, float]
    counts: SlotCounts | None
    usage: SlotUsage | None = None

    @property
    def reconstruction(self) -> float:
        return self.means["reconstruction"]

    @property
    def fg_ari(self) -> float | None:
        """None without true masks."""
        return self.means.get("fg_ari")

    def collapses(self) -> list[str]:
        """What has gone wrong with the slots, a sentence each; see SlotUsage."""
        if self.usage is None:
            return []
        if self.counts is None:
            return self.usage.collapses(None)
        images = self.counts.confusion.sum(dim=0)  # by objects
        objects = float((images * torch.arange(len(images))).sum() / images.sum())
        return self.usage.collapses(objects + self.counts.background_slots)

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


def yardstick(metrics: Container[str], wished: str | None = None) -> tuple[str, int]:
    """The metric by which models are compared, and its sign: the one that is wished for, or the highest fg_ari, or,
    without true masks, the lowest reconstruction error."""
    metric = wished or ("fg_ari" if "fg_ari" in metrics else "reconstruction")
    return metric, -1 if metric in LESS_IS_BETTER else 1


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
    look: Callable[[Micro, SlotOutput], None] = lambda micro, output: None,
) -> Evaluation:
    """Evaluates a model on this rank's samples and adds up over ranks.

    Args:
        forward: images [m, 3, H, W] -> SlotOutput, without noise: deterministic, and independent of the batch.
        micro_batches: with masks where there are any; padding has weight 0.
        total: the sum of a tensor over ranks.
        look: is shown every micro batch and what the model makes of it.

    Raises:
        DivergedError: a mask or an error is not finite.
    """
    errors, segmentation = MetricSums.zeros(("reconstruction",)), MetricSums.zeros(SEGMENTATION)
    confusion = torch.zeros(num_slots + 1, MOST_OBJECTS + 1, dtype=torch.float64)
    usage = SlotUsage.zeros(num_slots)
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
        usage += SlotUsage.from_tensor(num_slots, SlotUsage.of(output, real).tensor().cpu())
        look(micro, output)
    mine = [errors.tensor(), segmentation.tensor(), usage.tensor(), confusion.flatten()]
    sums = torch.split(total(torch.cat(mine)), [len(part) for part in mine])
    errors = MetricSums.from_tensor(errors.names, sums[0])
    segmentation = MetricSums.from_tensor(SEGMENTATION, sums[1])
    usage = SlotUsage.from_tensor(num_slots, sums[2])
    confusion = sums[3].view_as(confusion)
    return Evaluation(
        images=int(errors.count.sum()),
        means=errors.means() | segmentation.means(),
        counts=SlotCounts(_trimmed(confusion), background_slots) if confusion.sum() else None,
        usage=usage,
    )


def _trimmed(confusion: Tensor) -> Tensor:
    """Without the columns of more objects than any image has."""
    return confusion[:, : int(confusion.sum(dim=0).nonzero().max()) + 1].clone()
