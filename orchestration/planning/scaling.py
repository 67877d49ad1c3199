"""How fast a recipe will train on more workers: compute, bytes and latency, fitted from a few small runs.

    seconds of a step = A (fixed + sample m) + byte sent + hop hops

A micro batches of m samples on each rank; ``sent`` bytes and ``hops`` messages one after the other follow from the
ZeRO stage and the number of ranks alone (`wire`). The four coefficients are not negative and are found by least squares
of the relative errors. Nothing is taken to be hidden behind compute, so it promises no more than it holds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestration.planning.cost import ModelSize
from pipelines import micro_batches

PERSISTENT = 100_000
"""Values: from here on DeepSpeed's stage 3 gathers a tensor anew for each micro batch; smaller ones stay gathered."""


@dataclass(frozen=True)
class Wire:
    """What a rank sends in a step.

    Fields:
        sent: bytes, on average over the ranks.
        hops: messages that wait for each other.
    """

    sent: float
    hops: float


def wire(size: ModelSize, stage: int, workers: int, accumulation: int) -> Wire:
    """What DeepSpeed sends for a step, with a ring's bytes and a tree's messages, the least that there can be.

    Bytes in units of (W - 1) / W of the gradients' 4 bytes a value, as DeepSpeed 0.19 does it:

    - stage 0 sums gradients for all ranks, once a step: 2;
    - stage 1 does so too, and gathers the weights: 3;
    - stage 2 sums in each of A micro batches: 2 A + 1;
    - stage 3 scatters the sums, A, and gathers each small tensor once, each large one A times.

    The norm of the gradient is a sum of one number more. A single rank sends nothing.
    """
    large = size.large / max(size.trained, 1)
    sums, gathers, gathered = {
        0: (2.0, 0, 0.0),
        1: (2.0, 1, 1.0),
        2: (2.0 * accumulation, 1, 1.0),
        3: (1.0 * accumulation, size.tensors, 1 + (accumulation - 1) * large),
    }[stage]
    share = 4 * size.trained * (workers - 1) / workers
    return Wire(share * (sums + gathered), math.ceil(math.log2(workers)) * (sums + gathers + 2))


@dataclass(frozen=True)
class Observation:
    """A small run: its workers, global batch and ZeRO stage, the most samples of a micro batch, seconds of a step."""

    workers: int
    batch_size: int
    seconds: float
    stage: int
    largest: int


@dataclass(frozen=True)
class Network:
    """What is taken of a network that no run has shown: bytes a second that a rank sends, seconds of a message."""

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class ScalingModel:
    """Seconds for each micro batch, sample of one, byte sent and hop."""

    fixed: float
    sample: float
    byte: float
    hop: float

    def step_seconds(self, size: ModelSize, stage: int, workers: int, batch_size: int, largest: int) -> float:
        """Of a step of a global batch on so many workers."""
        return float(np.dot(_terms(size, stage, workers, batch_size, largest), self._coefficients))

    @property
    def _coefficients(self) -> tuple[float, float, float, float]:
        return self.fixed, self.sample, self.byte, self.hop


def fitted(size: ModelSize, runs: Sequence[Observation], network: Network) -> ScalingModel:
    """The model that small runs fit best; the network's part is taken as given where none had a second worker.

    Raises:
        ValueError: no run, or a time that is not positive.
    """
    from scipy.optimize import nnls

    if not runs or min(run.seconds for run in runs) <= 0:
        raise ValueError("runs: each needs a time above 0, and there must be one; give their seconds a step")
    seconds = np.array([run.seconds for run in runs])
    terms = np.array([_terms(size, run.stage, run.workers, run.batch_size, run.largest) for run in runs])
    assumed = np.array([0.0, 0.0, 1 / network.bytes_per_second, network.latency])
    known = [2, 3] if all(run.workers == 1 for run in runs) else []
    if len({(run.workers, run.batch_size) for run in runs if run.workers > 1}) == 1:
        known = [3]  # a single time cannot tell bytes from messages
    free = [column for column in range(4) if column not in known]
    if len({tuple(term[:2] / term[0]) for term in terms}) == 1:
        free.remove(0)  # one size of micro batch cannot tell what it costs from what its samples cost
    rest = np.maximum(seconds - terms[:, known] @ assumed[known], 0)
    scale = np.abs(terms[:, free]).max(axis=0)
    found, _ = nnls(terms[:, free] / scale / seconds[:, None], rest / seconds)
    coefficients = np.zeros(4)
    coefficients[known], coefficients[free] = assumed[known], found / scale
    return ScalingModel(*(float(value) for value in coefficients))


@dataclass(frozen=True)
class Scale:
    """A number of workers.

    Fields:
        workers: W.
        fixed_batch: images a second with the recipe's batch; None where it has no sample for each of them.
        grown_batch: the same with as many images on each worker as one runs at a time.
        efficiency: of the latter, against W times one worker.
        sent: bytes that a rank sends in a step of it.
    """

    workers: int
    fixed_batch: float | None
    grown_batch: float
    efficiency: float
    sent: float


def scales(
    model: ScalingModel, size: ModelSize, stage: int, workers: Sequence[int], batch_size: int, largest: int
) -> list[Scale]:
    """Images a second at each number of workers."""
    each = min(batch_size, largest)
    alone = each / model.step_seconds(size, stage, 1, each, largest)
    found = []
    for count in workers:
        grown = each * count / model.step_seconds(size, stage, count, each * count, largest)
        fixed = (
            batch_size / model.step_seconds(size, stage, count, batch_size, largest) if count <= batch_size else None
        )
        found.append(Scale(count, fixed, grown, grown / (count * alone), wire(size, stage, count, 1).sent))
    return found


def _terms(size: ModelSize, stage: int, workers: int, batch_size: int, largest: int) -> tuple[float, ...]:
    accumulation, micro_batch = micro_batches(batch_size, workers, largest)
    sends = wire(size, stage, workers, accumulation)
    return float(accumulation), float(accumulation * micro_batch), sends.sent, sends.hops
