"""The training loop that each rank runs.

It knows torch and slot_models alone and is handed the rest: batches, an engine, a schedule, and hooks for what
should happen after a step. What it is not given it does without, so the same loop runs on a bare machine.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slot_models import SlotOutput, Stage


class Micro(Protocol):
    """m samples of this rank; see pipelines.stream.MicroBatch."""

    @property
    def images(self) -> Tensor: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def slot_noise(self) -> Tensor | None: ...
    @property
    def gate_noise(self) -> Tensor | None: ...
    @property
    def input_noise(self) -> Tensor | None: ...
    @property
    def num_objects(self) -> Tensor: ...
    @property
    def masks(self) -> Tensor | None: ...
    def to(self, device: torch.device) -> "Micro": ...


class Batches(Protocol):
    """This rank's slice of every step, as micro batches of one shape; ``waited`` counts the seconds lost on it."""

    waited: float

    def batch_size(self, step: int) -> int: ...
    def step(self, step: int) -> Sequence[Micro]: ...


class Schedule(Protocol):
    """What changes over a run, as functions of the step; see orchestration.schedule."""

    @property
    def steps(self) -> int: ...
    def learning_rate(self, step: int) -> float: ...
    def stage(self, step: int) -> Stage: ...
    def temperature(self, step: int) -> float: ...
    def keep_weight(self, step: int) -> float: ...


@dataclass(frozen=True)
class StepReport:
    """What a rank knows of a step that is done.

    Fields:
        step: the step, from 0.
        means: float [M + K + 1], this rank's part of the batch's means: M in the order of ``curve_names``, then the
            share of the images that keep 0 to K slots. The sum over ranks is the mean. Still on the device: reading
            it synchronises.
        learning_rate, keep_weight, temperature: of this step.
        batch_size: samples of this step over all ranks.
        seconds, waited: of the whole step, and of waiting for its data.
    """

    step: int
    means: Tensor
    learning_rate: float
    keep_weight: float
    temperature: float
    batch_size: int
    seconds: float
    waited: float

    @property
    def done(self) -> int:
        """Steps done so far."""
        return self.step + 1


class DivergedError(Exception):
    """The loss or the state is not finite any more.

    Fields:
        step: steps done when it was so first; 0 where who says it does not know.
        losses, norms: of the steps since the last checkpoint: loss/total, and the gradient's norm where it was taken.
        facts: a diagnosis, once there is one; see orchestration.diagnosis.
    """

    def __init__(
        self,
        message: str,
        step: int = 0,
        losses: Mapping[int, float] | None = None,
        norms: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__(message)
        self.step, self.losses, self.norms = step, losses or {}, norms or {}
        self.facts: dict[str, Any] = {}


Hook = Callable[[StepReport], None]


def train(
    engine: Any,
    batches: Batches,
    schedule: Schedule,
    *,
    start: int = 0,
    background_slots: int = 0,
    hooks: Sequence[Hook] = (),
) -> None:
    """Trains a slot autoencoder from step ``start`` to the schedule's end.

    Args:
        engine: an orchestration.engine.Engine around a SlotAutoencoder.
        batches: this rank's samples and their noise.
        schedule: learning rate, gate and penalty of each step.
        start: steps that are done already.
        background_slots: kept slots that hold no object, for slots/count_error.
        hooks: called after each step, in order, by every rank.
    """
    for step in range(start, schedule.steps):
        began, waited = time.perf_counter(), batches.waited
        size, keep_weight, temperature = (
            batches.batch_size(step),
            schedule.keep_weight(step),
            schedule.temperature(step),
        )
        means: Tensor | float = 0.0
        tally: Tensor | float = 0.0

        for micro in batches.step(step):  # this rank's slice: images [m, 3, H, W], noise, weight [m]
            micro = micro.to(engine.device)
            output = engine(
                micro.images,
                micro.slot_noise,
                micro.gate_noise,
                micro.input_noise,
                weight=micro.weight,
                temperature=temperature,
                stage=schedule.stage(step),
            )
            reconstruction = reconstruction_error(output)  # [m]
            penalty = keep_weight * output.keep.mean(dim=1)  # [m]
            share = micro.weight / size  # [m], of the global batch
            engine.backward(reconstruction + penalty + output.auxiliary, share)
            means = means + share @ _curves(output, reconstruction, penalty, micro.num_objects, background_slots)
            if output.code_tally is not None:
                tally = tally + output.code_tally

        learning_rate = schedule.learning_rate(step)
        engine.step(learning_rate)
        if isinstance(tally, Tensor):  # the codebook moves once a step, by the global batch
            engine.module.move_codes(engine.sum(tally))
        assert isinstance(means, Tensor)
        report = StepReport(
            step=step,
            means=means,
            learning_rate=learning_rate,
            keep_weight=keep_weight,
            temperature=temperature,
            batch_size=size,
            seconds=time.perf_counter() - began,
            waited=batches.waited - waited,
        )
        for hook in hooks:
            hook(report)


def reconstruction_error(output: SlotOutput) -> Tensor:
    """Mean squared error over the values of what is reconstructed: an image, or its features. [m]"""
    return (output.reconstruction - output.target).square().mean(dim=(1, 2, 3))


def curve_names(num_slots: int) -> list[str]:
    """Names of the first of StepReport.means. The terms loss/* are weighted: they add up to loss/total."""
    return [
        "loss/total",
        "loss/reconstruction",
        "loss/keep",
        "slots/kept_mean",
        "slots/kept_fraction",
        "slots/count_error",
        "loss/commitment",
        *(f"slots/keep_probability/{slot}" for slot in range(num_slots)),
    ]


@torch.no_grad()
def _curves(
    output: SlotOutput, reconstruction: Tensor, penalty: Tensor, num_objects: Tensor, background_slots: int
) -> Tensor:
    """Each sample's part of the curves, and of the histogram of kept slots: [m, M + K + 1].

    The count error is NaN where the number of objects is unknown; the commitment is zero where there is no codebook.
    """
    kept = output.keep.sum(dim=1)
    count_error = torch.where(num_objects < 0, torch.nan, (kept - background_slots - num_objects).abs())
    total = reconstruction + penalty + output.auxiliary
    commitment = output.auxiliary  # a gate's adds nothing in value
    columns = [total, reconstruction, penalty, kept, output.keep.mean(dim=1), count_error, commitment]
    histogram = kept[:, None].round() == torch.arange(output.keep.shape[1] + 1, device=kept.device)  # [m, K + 1]
    return torch.cat([torch.stack(columns, dim=1), output.keep_probability, histogram], dim=1).float()
