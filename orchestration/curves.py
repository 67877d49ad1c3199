"""A run's curves: reports of steps become points, which travel in checkpoints."""

import math
import threading
import time
from collections.abc import Callable, Sequence

import torch

from orchestration.engine import Engine
from orchestration.flops import Flops, peak_flops, training_flops
from orchestration.recipe import Recipe
from orchestration.runs.checkpoints import Points
from orchestration.worker import DivergedError, StepReport, curve_names

QUANTILES = {"slots/kept_p10": 0.1, "slots/kept_p50": 0.5, "slots/kept_p90": 0.9}
"""Of kept slots an image, over the batch."""


class Curves:
    """Collects the points of one rank's steps until a checkpoint takes them.

    Recording a step synchronises nothing but every nth step's gradient norm; ``take`` adds up over the ranks, once for
    all steps.

    Args:
        every: steps between points; the step counts from 1, as steps done.
        num_slots: of the model.
        commitment_weight: of the model's codebook; None without one.
        now: the time in seconds since the epoch.
    """

    def __init__(
        self,
        engine: Engine,
        every: int,
        num_slots: int,
        commitment_weight: float | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._engine, self._every, self._now = engine, every, now
        self._weights = {} if commitment_weight is None else {"train/commitment_weight": commitment_weight}
        self._names = curve_names(num_slots)
        self._reports: list[tuple[StepReport, int, float]] = []
        self._points: Points = []
        self._flops: Flops | None = None

    def count_flops(self, recipe: Recipe) -> None:
        """Tells from now on how much the GPUs compute; counted in a thread, on the CPU."""

        def count() -> None:
            self._flops = Flops(training_flops(recipe), peak_flops(torch.cuda.get_device_name(self._engine.device)))

        threading.Thread(target=count, name="flops", daemon=True).start()

    def record(self, report: StepReport) -> None:
        """A hook of the training loop."""
        wanted = report.done % self._every == 0
        norm = self._engine.gradient_norm() if wanted else math.nan
        self._reports.append((report, int(self._now() * 1000), norm))

    def add(self, values: dict[str, float], step: int) -> None:
        """Points of something else, such as an evaluation."""
        when = int(self._now() * 1000)
        self._points += [(name, value, when, step) for name, value in values.items()]

    def take(self) -> Points:
        """All points since the last call, in the order of their steps. All ranks call it together.

        Raises:
            DivergedError: a loss is not finite; names the step.
        """
        if self._reports:
            means = self._engine.sum(torch.stack([report.means for report, _, _ in self._reports]))  # [steps, M]
            self._check([row[0] for row in means.tolist()])
            for (report, when, norm), values in zip(self._reports, means.tolist(), strict=True):
                if report.done % self._every == 0:
                    histogram = values[len(self._names) :]
                    named = dict(zip(self._names, values, strict=False)) | {
                        name: float(quantile(histogram, q)) for name, q in QUANTILES.items()
                    }
                    if not self._weights:
                        del named["loss/commitment"]
                    named |= self._host_values(report, norm)
                    self._points += [(name, v, when, report.done) for name, v in named.items() if math.isfinite(v)]
        taken = sorted(self._points, key=lambda point: point[3])
        self._points, self._reports = [], []
        return taken

    def _host_values(self, report: StepReport, norm: float) -> dict[str, float]:
        return {
            "train/learning_rate": report.learning_rate,
            "train/keep_weight": report.keep_weight,
            **self._weights,
            "train/temperature": report.temperature,
            "train/gradient_norm": norm,
            "train/world_size": float(self._engine.world),
            "time/step": report.seconds,
            "time/data_wait": report.waited,
            "throughput/images_per_second": report.batch_size / report.seconds,
            **(self._flops.rates(report.batch_size / report.seconds / self._engine.world) if self._flops else {}),
        }

    def _check(self, losses: list[float]) -> None:
        """Of the steps that are reported."""
        steps = [report.done for report, _, _ in self._reports]
        bad = next(((step, loss) for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)), None)
        if bad is not None:
            raise DivergedError(
                f"loss/total: {bad[1]} at step {bad[0]}; lower train.learning_rate or set train.clip_norm, "
                "under another name or with --fresh",
                step=bad[0],
                losses=dict(zip(steps, losses, strict=True)),
                norms={report.done: norm for report, _, norm in self._reports if report.done % self._every == 0},
            )


def quantile(shares: Sequence[float], q: float) -> int:
    """The least number that at least q of the images do not exceed, from the shares [K + 1] with 0 to K."""
    total = 0.0
    for number, share in enumerate(shares):
        total += share
        if total >= q - 1e-6:  # shares are sums of float32
            return number
    return len(shares) - 1
