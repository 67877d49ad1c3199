"""A model's metrics on each image of a held-out set, and what is sure of their means."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestration.evaluate import Evaluation, image_metrics, is_finite, kept_slots
from orchestration.worker import Micro
from pipelines.noise import Purpose, generator
from slot_models import SlotCounts, SlotOutput, count_confusion

Values = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 5000
_AT_ONCE = 2**23  # values that a batch of resamples may hold


class NotFiniteError(Exception):
    """What a model makes of an image is not finite."""


@dataclass(frozen=True)
class Estimate:
    """A metric over a held-out set.

    Fields:
        value: over its images.
        low, high: the 95 % percentile bootstrap interval over images; NaN where there are fewer than two.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model makes of each of N images, in the set's order: of two models on the same set, row i is one image.

    Fields:
        values: float64 [N] by metric, see image_metrics; NaN in an image that has no such value.
        kept: int64 [N], kept slots.
        objects: int64 [N], -1 where unknown.
        num_slots: K.
        background_slots: kept slots that hold no object.
    """

    values: Mapping[str, Values]
    kept: NDArray[np.int64]
    objects: NDArray[np.int64]
    num_slots: int
    background_slots: int

    @property
    def images(self) -> int:
        return len(self.kept)

    def per_image(self) -> dict[str, Values]:
        """float64 [N] by metric, those of counts too: count_error, and count_accuracy, 1 where the number is right."""
        known = self.objects >= 0
        if not known.any():
            return dict(self.values)
        difference = np.abs(self.kept - self.background_slots - self.objects).astype(np.float64)
        counts = {"count_error": difference, "count_accuracy": (difference == 0).astype(np.float64)}
        return {**self.values, **{name: np.where(known, column, np.nan) for name, column in counts.items()}}

    def evaluation(self) -> Evaluation:
        """The means, and the confusion of counts."""
        told = {name: _told(column) for name, column in self.values.items()}
        means = {name: float(column.mean()) for name, column in told.items() if len(column)}
        return Evaluation(images=self.images, means=means, counts=self._counts())

    @cached_property
    def estimates(self) -> Mapping[str, Estimate]:
        """Each metric with its interval; a metric that no image has is left out. The same numbers each time."""
        found = {}
        for name, column in self.per_image().items():
            if len(told := _told(column)):
                found[name] = _estimate(np.mean, told)
        known = self.objects >= 0
        if known.any():
            kept, objects = (column[known].astype(np.float64) for column in (self.kept, self.objects))
            found["count_correlation"] = _estimate(_correlation, kept, objects)
            found["kept_mean"] = _estimate(np.mean, kept)
        return found

    def _counts(self) -> SlotCounts | None:
        if not (self.objects >= 0).any():
            return None
        kept, objects = torch.from_numpy(self.kept), torch.from_numpy(self.objects)
        confusion = count_confusion(kept, objects, self.num_slots, int(objects.max()))
        return SlotCounts(confusion, self.background_slots)


@torch.inference_mode()
def score(
    models: Mapping[Any, Callable[[Tensor], SlotOutput]],
    micro_batches: Iterable[Micro],
    *,
    background_slots: Mapping[Any, int],
    device: torch.device | str = "cpu",
    seen: Callable[[int], None] = lambda images: None,
) -> dict[Any, Scores]:
    """Runs models over a held-out set, all in one reading, in fp32 and by deterministic kernels.

    The same set gives the same numbers, and but for rounding an image's do not depend on what stands beside it.

    Args:
        models: float images [m, 3, H, W] in [-1, 1] -> SlotOutput, by any key.
        micro_batches: with masks where there are any; padding has weight 0.
        background_slots: of each model.
        seen: called with the number of images that were done.

    Raises:
        NotFiniteError: a model's masks or errors are not.
    """
    rows: dict[Any, list[dict[str, Tensor]]] = {key: [] for key in models}
    slots = dict.fromkeys(models, 0)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for micro in micro_batches:
            micro, real = micro.to(torch.device(device)), micro.weight > 0
            for key, model in models.items():
                output = model(micro.images)
                if not is_finite(output):
                    raise NotFiniteError(f"{key}: what the model makes of held-out images is not finite")
                found = image_metrics(output, micro.masks)
                found |= {"kept": kept_slots(output), "objects": micro.num_objects}
                slots[key] = output.keep.shape[1]
                rows[key].append({name: column.cpu()[real.cpu()] for name, column in found.items()})
            seen(int(real.sum()))
    return {key: _scores(rows[key], slots[key], background_slots[key]) for key in models}


def difference_bound(candidate: Values, champion: Values, confidence: float) -> tuple[float, float]:
    """How much better the candidate is on the same images: the mean difference, and its lower bound.

    The bound is one-sided, by the percentile bootstrap over images (Efron 1979), each resampled with both its values.

    Args:
        candidate, champion: float64 [N], row i is one image; larger is better.
        confidence: that the difference is above the bound.

    Returns:
        (NaN, NaN) where there are fewer than two images, or a value is not finite.
    """
    difference = candidate - champion
    if len(difference) < 2 or not np.isfinite(difference).all():
        return math.nan, math.nan
    return float(difference.mean()), _bootstrap(np.mean, (difference,), confidence, "greater")[0]


def _scores(rows: list[dict[str, Tensor]], num_slots: int, background_slots: int) -> Scores:
    columns = {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}
    kept, objects = columns.pop("kept"), columns.pop("objects")
    values = {name: column.astype(np.float64) for name, column in columns.items()}
    return Scores(values, kept, objects, num_slots, background_slots)


def _estimate(statistic: Callable[..., Any], *columns: Values) -> Estimate:
    low, high = _bootstrap(statistic, columns, CONFIDENCE, "two-sided") if len(columns[0]) > 1 else (math.nan, math.nan)
    return Estimate(float(statistic(*columns)), low, high)


def _bootstrap(
    statistic: Callable[..., Any], columns: tuple[Values, ...], confidence: float, alternative: str
) -> tuple[float, float]:
    """The percentile interval. Every metric of a set resamples the same images: the stream is the same."""
    found = scipy.stats.bootstrap(
        columns,
        statistic,
        n_resamples=RESAMPLES,
        batch=max(1, _AT_ONCE // len(columns[0])),
        paired=len(columns) > 1,
        vectorized=True,
        confidence_level=confidence,
        alternative=alternative,
        method="percentile",
        rng=generator(0, Purpose.BOOTSTRAP),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _told(column: Values) -> Values:
    """Without the images that have no such value."""
    return column[~np.isnan(column)]


def _correlation(kept: Values, objects: Values, axis: int = -1) -> Any:
    """Pearson's; 0 where either never varies, as SlotCounts has it."""
    kept = kept - kept.mean(axis=axis, keepdims=True)
    objects = objects - objects.mean(axis=axis, keepdims=True)
    spread = np.sqrt((kept**2).sum(axis=axis) * (objects**2).sum(axis=axis))
    # rounding leaves a little where nothing varies
    return np.where(spread > 1e-9, (kept * objects).sum(axis=axis) / np.maximum(spread, 1e-9), 0.0)[()]
