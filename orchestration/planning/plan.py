"""What a recipe will take: memory, time, storage and money, found without training."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestration.assembly import sources_of
from orchestration.planning.cost import ModelSize, WorldPlan, world_plans, worlds
from orchestration.planning.measure import StepTime, activation_bytes, model_size, scene_bytes, step_time
from orchestration.planning.scaling import Network, Observation, Scale, fitted, scales
from orchestration.prepare import data_folders, is_prepared
from orchestration.recipe import Recipe, RecipeError
from orchestration.wording import counted
from pipelines import DataError, Sources, micro_batches, read_index
from pipelines.sets import Sets, mixture

MEASURE_SECONDS = 20.0
SHOWN = (1, 2, 8, 64, 512)


@dataclass(frozen=True)
class Assumptions:
    """What the plan takes as given.

    Fields:
        step_seconds: of one step of the whole batch, measured elsewhere; None: measured here, or unknown.
        step_workers: how many workers that step ran on; None: parallel.workers.min.
        measure: a step on this machine's CPU, if no time is given.
        disk_mb_per_second: that one rank writes.
        price_per_hour: of one worker's machine; None: parallel.price_per_hour.
        observed: (workers, global batch, seconds of a step) of small runs, for what more workers would do.
        network_gbit, latency_us: of the network, where no run had a second worker.
    """

    step_seconds: float | None = None
    step_workers: int | None = None
    measure: bool = True
    disk_mb_per_second: float = 200.0
    price_per_hour: float | None = None
    observed: tuple[tuple[int, int, float], ...] = ()
    network_gbit: float = 10.0
    latency_us: float = 30.0

    def check(self) -> None:
        """Raises: RecipeError, a number is out of range."""
        for name in ("step_seconds", "step_workers", "disk_mb_per_second", "network_gbit", "latency_us"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise RecipeError(f"--{name.replace('_', '-')}: {value} is not above 0; give a positive number")
        if self.price_per_hour is not None and not (self.price_per_hour >= 0 and math.isfinite(self.price_per_hour)):
            raise RecipeError(f"--price-per-hour: {self.price_per_hour} is negative; give what a worker costs an hour")
        if self.step_workers is not None and self.step_seconds is None:
            raise RecipeError(f"--step-workers: {self.step_workers} has no time to go with; give --step-seconds too")


@dataclass(frozen=True)
class DataPlan:
    """The training set.

    Fields:
        samples, bytes: None where they are not known yet.
        estimated: whether the bytes are those of a few rendered scenes, scaled.
        steps_per_epoch, epochs: None without samples.
        cache_bytes: that each node's cache will hold; 0 where shards are read where they lie.
        cache_limit: data.cache.gigabytes, in bytes.
        note: why something is not known.
    """

    samples: int | None
    bytes: float | None
    estimated: bool
    steps_per_epoch: int | None
    epochs: float | None
    cache_bytes: float | None
    cache_limit: float
    note: str | None


@dataclass(frozen=True)
class RunPlan:
    """All that is known before a run; `timing` says where its times are from."""

    recipe: str
    size: ModelSize
    checkpoint_bytes: int
    steps: int
    batch_size: int
    micro_batch: int
    checkpoint_every: int | None
    mtbf_hours: float
    zero_stage: int
    data: DataPlan
    activations_per_sample: float
    timing: str
    worlds: tuple[WorldPlan, ...]
    scales: tuple[Scale, ...]


def plan_run(recipe: Recipe, given: Assumptions) -> RunPlan:
    """Plans a run.

    Raises:
        RecipeError: the model does not fit together, or an assumption is out of range.
    """
    given.check()
    train, workers = recipe.train, recipe.parallel.workers
    price = recipe.parallel.price_per_hour if given.price_per_hour is None else given.price_per_hour
    size = model_size(recipe)
    activations = activation_bytes(recipe)
    seconds, timing = _sample_seconds(recipe, given)
    plans = world_plans(
        size,
        worlds(workers.min, min(workers.max, train.batch_size)),
        steps=train.steps,
        batch_size=train.batch_size,
        largest=train.micro_batch,
        checkpoint_every=train.checkpoint_every,
        activations=activations,
        sample_seconds=seconds,
        mtbf_hours=train.mtbf_hours,
        disk_rate=given.disk_mb_per_second * 1e6,
        price_per_hour=price,
    )
    return RunPlan(
        recipe=recipe.name,
        size=size,
        checkpoint_bytes=size.checkpoint_bytes,
        steps=train.steps,
        batch_size=train.batch_size,
        micro_batch=train.micro_batch,
        checkpoint_every=train.checkpoint_every,
        mtbf_hours=train.mtbf_hours,
        zero_stage=recipe.parallel.zero_stage,
        data=_data(recipe),
        activations_per_sample=activations[1],
        timing=timing,
        worlds=tuple(plans),
        scales=tuple(_scales(recipe, size, given, seconds)),
    )


def _sample_seconds(recipe: Recipe, given: Assumptions) -> tuple[float | None, str]:
    """Seconds of a sample's part of a step, and where they are from."""
    if given.step_seconds is None and given.observed:
        workers, batch, seconds = given.observed[0]
        count, size = micro_batches(batch, workers, recipe.train.micro_batch)
        return seconds / (
            count * size
        ), f"from a step of {seconds:g} s for {counted(batch, 'image')} on {counted(workers, 'worker')}"
    if given.step_seconds is not None:
        workers = given.step_workers or recipe.parallel.workers.min
        if workers > recipe.train.batch_size:
            raise RecipeError(
                f"--step-workers: {workers} is more than train.batch_size: {recipe.train.batch_size}, so some had no "
                "image; give the number of workers that the step ran on, at most one for each image"
            )
        count, size = micro_batches(recipe.train.batch_size, workers, recipe.train.micro_batch)
        return given.step_seconds / (
            count * size
        ), f"from a step of {given.step_seconds:g} s on {counted(workers, 'worker')}"
    if not given.measure:
        return None, "unknown; give --step-seconds, or measure"
    found: StepTime = step_time(recipe, MEASURE_SECONDS)
    return found.sample_seconds, (
        f"measured on this machine's CPU ({counted(torch.get_num_threads(), 'thread')}, "
        f"{counted(found.steps, 'step')} of {counted(found.micro_batch, 'image')}): for GPUs give --step-seconds"
    )


def _scales(recipe: Recipe, size: ModelSize, given: Assumptions, sample_seconds: float | None) -> list[Scale]:
    """What more workers would do; nothing where no time is known."""
    stage, batch, largest = recipe.parallel.zero_stage, recipe.train.batch_size, recipe.train.micro_batch
    runs = [Observation(workers, size_, taken, stage, largest) for workers, size_, taken in given.observed]
    if not runs and sample_seconds is not None:
        each = min(batch, largest)
        runs = [Observation(1, each, each * sample_seconds, stage, largest)]
    if not runs:
        return []
    network = Network(given.network_gbit * 1e9 / 8, given.latency_us * 1e-6)
    return scales(fitted(size, runs, network), size, stage, SHOWN, batch, largest)


def _data(recipe: Recipe) -> DataPlan:
    limit, scenes = recipe.data.cache.gigabytes * 1e9, recipe.data.scenes
    if scenes is not None and not is_prepared(recipe):
        each = scene_bytes(scenes)
        note = "its size is unknown: the renderer is not installed" if each is None else None
        total = None if each is None else each * scenes.train
        return _data_plan(recipe, scenes.train, total, True, -(-scenes.train // recipe.train.batch_size), 0.0, note)
    place = data_folders(recipe).train
    sources = Sources(tries=1, timeout=recipe.data.timeout, allow_pipe=recipe.data.allow_pipe)
    try:
        index = read_index(place, sources)
        steps = -(-index.num_samples // recipe.train.batch_size)
        if isinstance(place, Sets) and len(place) > 1:
            shape = {"lanes": recipe.data.lanes, "window": recipe.data.window}
            order = mixture(place, sources_of(recipe), batch_size=recipe.train.batch_size, seed=recipe.seed, **shape)
            steps = order.steps_per_epoch
    except (DataError, ValueError) as error:
        return DataPlan(None, None, False, None, None, None, limit, f"unknown: {error}")
    total = sum(shard.bytes for shard in index.shards)
    cached = 0.0 if isinstance(place, Path) else min(float(total), limit)
    return _data_plan(recipe, index.num_samples, float(total), False, steps, cached, None)


def _data_plan(
    recipe: Recipe, samples: int, total: float | None, estimated: bool, steps: int, cached: float, note: str | None
) -> DataPlan:
    limit = recipe.data.cache.gigabytes * 1e9
    return DataPlan(samples, total, estimated, steps, recipe.train.steps / steps, cached, limit, note)
