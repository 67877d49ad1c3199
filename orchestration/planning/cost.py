"""What a run will take, as arithmetic: memory, micro batches, checkpoints, time and money. Nothing here measures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines import micro_batches

STAGES = (0, 1, 2, 3)
HOPELESS = 100.0
"""A run that takes so many times longer for its failures does not end."""
RECOVERY_SECONDS = 30.0
"""From the loss of a node to the next step."""
LEAST_SECONDS, MOST_SECONDS = 10.0, 1800.0
"""Between checkpoints, where a run chooses: costs that are tiny or huge, or measured wrongly, do not set its pace."""


@dataclass(frozen=True)
class ModelSize:
    """Numbers of values, and the bytes of what is state beside them.

    Fields:
        parameters: all of them.
        trained: those that the optimizer has.
        buffer_bytes: persistent buffers, such as a codebook.
        tensors: of what is trained; ``large`` of its values are in tensors that ZeRO-3 does not keep gathered.
    """

    parameters: int
    trained: int
    buffer_bytes: int
    tensors: int = 0
    large: int = 0

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights, two moments of what is trained, and buffers."""
        return 4 * self.parameters + 2 * 4 * self.trained + self.buffer_bytes


@dataclass(frozen=True)
class StateMemory:
    """Bytes that one rank holds from step to step; see `state_memory`."""

    weights: float
    copy: float
    gradients: float
    moments: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.copy + self.gradients + self.moments + self.buffers


@dataclass(frozen=True)
class WorldPlan:
    """A run at one number of workers.

    Fields:
        workers: W.
        accumulation, micro_batch: each rank runs A micro batches of m samples a step.
        padding: samples that a step computes for nothing, over all ranks.
        state: bytes of a rank's state for each ZeRO stage.
        activations: bytes of a rank's micro batch between forward and backward; an estimate.
        step_seconds: of one step.
        checkpoint_seconds: between two checkpoints: of train.checkpoint_every steps, or what the run chooses.
        stall_seconds: that writing a checkpoint takes if nothing hides it.
        best_seconds: between checkpoints, by Young and Daly.
        best_steps: the same in steps, at least one.
        hours: from the first step to the last, with checkpoints and the failures to be expected; None without a step's
            time, or where failures leave no hope of an end.
        cost: of all workers for as long; None without hours or a price.
    """

    workers: int
    accumulation: int
    micro_batch: int
    padding: int
    state: tuple[StateMemory, ...]
    activations: float
    step_seconds: float | None
    checkpoint_seconds: float | None
    stall_seconds: float
    best_seconds: float
    best_steps: int | None
    hours: float | None
    cost: float | None


def state_memory(size: ModelSize, stage: int, workers: int) -> StateMemory:
    """Bytes of a rank's weights, gradients and Adam's moments, all fp32, as DeepSpeed's ZeRO shares them out.

    Stage 0 shares nothing, 1 the moments, 2 the gradients as well, 3 everything (Rajbhandari et al. 2020, sec. 5). From
    stage 1 on each rank also keeps a copy of its share of the weights, which Adam steps. Stage 3 leaves small tensors
    gathered on every rank, beside its share of them. DeepSpeed's padding, and its communication buckets (64 MiB each at
    most), come on top.

    Raises:
        ValueError: the stage or the number of workers is out of range.
    """
    if stage not in STAGES:
        raise ValueError(f"stage: {stage} is not one of {STAGES}")
    if workers < 1:
        raise ValueError(f"workers: {workers} is less than 1; use a positive number")

    def shared(values: int, since: int) -> float:
        return 4 * values / (workers if stage >= since else 1)

    gathered = 4 * (size.trained - size.large) if stage == 3 and workers > 1 else 0
    return StateMemory(
        weights=shared(size.parameters, 3) + gathered,
        copy=shared(size.trained, 1) if stage > 0 else 0.0,
        gradients=shared(size.trained, 2),
        moments=2 * shared(size.trained, 1),
        buffers=size.buffer_bytes,
    )


def best_interval(stall: float, mtbf: float) -> float:
    """Seconds between checkpoints that lose least time, sqrt(2 * stall * mtbf) (Young 1974; Daly 2006).

    Args:
        stall: seconds that a checkpoint stops training for.
        mtbf: mean seconds between failures of the whole run.

    Raises:
        ValueError: a number is not positive.
    """
    for name, value in (("stall", stall), ("mtbf", mtbf)):
        if not value > 0:
            raise ValueError(f"{name}: {value} seconds is not above 0; use a positive number")
    return math.sqrt(2 * stall * mtbf)


def chosen_interval(stall: float, mtbf: float) -> float:
    """Seconds between checkpoints that a run takes by itself: the best ones, within reason."""
    return min(max(best_interval(stall, mtbf), LEAST_SECONDS), MOST_SECONDS)


def slowdown(stall: float, interval: float, mtbf: float, recovery: float = RECOVERY_SECONDS) -> float:
    """Expected time of a run over its time without failures and checkpoints (Daly 2006, eq. 13).

    Failures are a Poisson process; each loses what came since the last checkpoint and ``recovery`` seconds, in which
    it may fail again. Infinite, in effect, where checkpoints are many times further apart than failures.
    """
    try:
        return mtbf * math.exp(recovery / mtbf) * math.expm1((interval + stall) / mtbf) / interval
    except OverflowError:
        return math.inf


def worlds(least: int, most: int) -> list[int]:
    """The numbers of workers to show: both ends and the powers of two between them."""
    powers = [2**power for power in range(most.bit_length()) if least <= 2**power <= most]
    return sorted({least, most, *powers})


def world_plans(
    size: ModelSize,
    workers: Sequence[int],
    *,
    steps: int,
    batch_size: int,
    largest: int,
    checkpoint_every: int | None,
    activations: tuple[float, float],
    sample_seconds: float | None,
    mtbf_hours: float,
    disk_rate: float,
    price_per_hour: float | None,
) -> list[WorldPlan]:
    """A run at each number of workers; the global batch is the same at all of them.

    Args:
        size: of the model.
        steps, batch_size, checkpoint_every: of the recipe.
        largest: samples that a worker runs at a time at most.
        activations: bytes at no sample, and for each sample more.
        sample_seconds: of one sample's part of a step, on one worker; communication is not counted.
        mtbf_hours: mean time between failures of one node, with a worker on each.
        disk_rate: bytes a second that one rank writes.
        price_per_hour: of one worker's machine.
    """
    return [
        _world_plan(
            size,
            count,
            steps,
            micro_batches(batch_size, count, largest),
            batch_size,
            checkpoint_every,
            activations,
            sample_seconds,
            mtbf_hours * 3600 / count,
            size.checkpoint_bytes / count / disk_rate,
            price_per_hour,
        )
        for count in workers
    ]


def _world_plan(
    size: ModelSize,
    count: int,
    steps: int,
    cut: tuple[int, int],
    batch_size: int,
    every: int | None,
    activations: tuple[float, float],
    sample_seconds: float | None,
    mtbf: float,
    stall: float,
    price: float | None,
) -> WorldPlan:
    accumulation, micro_batch = cut
    best = best_interval(stall, mtbf)
    step = checkpoint = hours = None
    if sample_seconds is not None:
        step = sample_seconds * accumulation * micro_batch
        checkpoint = step * every if every is not None else max(chosen_interval(stall, mtbf), step)
        factor = slowdown(stall, checkpoint, mtbf)
        hours = steps * step * factor / 3600 if factor < HOPELESS else None
    return WorldPlan(
        workers=count,
        accumulation=accumulation,
        micro_batch=micro_batch,
        padding=accumulation * micro_batch * count - batch_size,
        state=tuple(state_memory(size, stage, count) for stage in STAGES),
        activations=activations[0] + activations[1] * micro_batch,
        step_seconds=step,
        checkpoint_seconds=checkpoint,
        stall_seconds=stall,
        best_seconds=best,
        best_steps=None if step is None else max(1, round(best / step)),
        hours=hours,
        cost=None if hours is None or price is None else hours * price * count,
    )
