"""One rank of a run: puts the training loop's parts together, under Ray Train or on its own."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestration.checkpoints import DamagedCheckpointError, Saver, new_token, newest_valid, restore
from orchestration.curves import Curves
from orchestration.engine import DeepSpeedEngine, PlainEngine
from orchestration.evaluate import evaluate
from orchestration.files import write_bytes, write_json
from orchestration.recipe import Recipe, parse_recipe
from orchestration.run_folder import LeaseLostError, RunFolder, check_lease
from orchestration.schedule import Schedule
from orchestration.stopping import Stopped, StopRequest
from orchestration.worker import DivergedError, Hook, StepReport, train
from pipelines import Cache, DataError, Index, Plan, Purpose, Sources, micro_batches, read_index
from pipelines.mixture import Order
from pipelines.noise import generator
from pipelines.sets import Place, Sets, mixture, place_of
from pipelines.stream import Stream
from pipelines.transforms import Augmentation
from slot_models import SlotAutoencoder, build_autoencoder

logger = logging.getLogger(__name__)

LIVE_SECONDS = 0.5


class StateFolderError(Exception):
    """This node does not see the run's folder."""


FINAL_ERRORS = (DivergedError, DataError, DamagedCheckpointError, LeaseLostError, StateFolderError)


@dataclass(frozen=True)
class Data:
    """Where a run's shards are."""

    train: Place
    eval: Place


def build_model(recipe: Recipe) -> SlotAutoencoder:
    """The recipe's model, initialised from its seed."""
    words = generator(recipe.seed, Purpose.WEIGHTS).integers(2**63)
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator alone
        torch.manual_seed(int(words))
        return build_autoencoder(**recipe.model.model_dump())


def sources_of(recipe: Recipe) -> Sources:
    """What reads a recipe's shards."""
    return Sources(tries=recipe.data.tries, timeout=recipe.data.timeout, allow_pipe=recipe.data.allow_pipe)


def training_stream(
    recipe: Recipe, place: Place, noise: Mapping[str, tuple[int, ...]], rank: int = 0, world: int = 1, **options: Any
) -> Stream:
    """A rank's part of the training set, with the noise that the model wants of it."""
    sources = sources_of(recipe)
    if isinstance(place, Sets) and len(place) > 1:
        order: Order = mixture(place, sources, batch_size=recipe.train.batch_size, seed=recipe.seed, **_shape(recipe))
    else:
        order = _plan(recipe, read_index(place, sources), recipe.train.batch_size)
    return Stream(
        order,
        str(place),
        rank=rank,
        world=world,
        micro_batch=recipe.train.micro_batch,
        seed=recipe.seed,
        noise=noise,
        augment=_augmentation(recipe),
        bad_limit=recipe.data.bad_samples,
        sources=sources,
        cache=_cache(recipe),
        decode_workers=recipe.data.decode_workers,
        **options,
    )


def evaluation_batches(recipe: Recipe, place: Place, rank: int = 0, world: int = 1) -> tuple[Stream, int]:
    """A rank's part of the held-out set, and the number of steps that cover it once."""
    sources = sources_of(recipe)
    index = read_index(place, sources)
    plan = _plan(recipe, index, min(recipe.evaluate.batch_size, index.num_samples))
    stream = Stream(
        plan,
        str(place),
        rank=rank,
        world=world,
        micro_batch=recipe.train.micro_batch,
        seed=recipe.seed,
        noise={},
        with_masks=bool(index.about.get("masks")),
        bad_limit=recipe.data.bad_samples,
        sources=sources,
        cache=_cache(recipe),
        decode_workers=recipe.data.decode_workers,
    )
    return stream, plan.steps_per_epoch


def train_bare(recipe: Recipe, data: Data, hooks: tuple[Hook, ...] = (), device: str = "cpu") -> SlotAutoencoder:
    """The same loop without Ray, DeepSpeed, MLflow and checkpoints: the baseline of what the service costs."""
    model = build_model(recipe)
    engine = PlainEngine(
        model,
        clip_norm=recipe.train.clip_norm,
        precision=recipe.parallel.precision,
        device=device,
    )
    with training_stream(recipe, data.train, model.noise_shapes()) as stream:
        background = recipe.evaluate.background_slots
        train(engine, stream, Schedule(recipe.train), background_slots=background, hooks=hooks)
    return model


def train_rank(config: Mapping[str, Any]) -> None:
    """What every Ray Train worker runs. A restart, at any world size, comes here too: the run folder knows the rest.

    An error that a restart would only repeat is noted in the run folder, where the driver sees it and stops.
    """
    try:
        _train_rank(config)
    except Stopped:
        logger.info("stopped, saved")
    except FINAL_ERRORS as error:
        failure = {"error": type(error).__name__, "message": str(error)}
        write_json(RunFolder(Path(config["folder"])).failure(config["lease"]), failure)
        raise


def _train_rank(config: Mapping[str, Any]) -> None:
    import ray.train

    context = ray.train.get_context()
    recipe = parse_recipe(json.loads(config["recipe"]))
    folder = RunFolder(Path(config["folder"]))
    data = Data(place_of(config["train"]), place_of(config["eval"]))
    rank, world = context.get_world_rank(), context.get_world_size()
    device = f"cuda:{torch.cuda.current_device()}" if config["gpu"] else "cpu"
    _log_to(folder.logs / f"rank-{rank}.log")
    if device == "cpu":
        torch.set_num_threads(config["threads"])

    if not folder.facts:
        raise StateFolderError(
            f"{folder.path}: rank {rank} does not see the run's folder; set SLOTFORGE_HOME, where Ray is started on "
            "every node, to a folder that all nodes share"
        )
    checkpoint, token = _agree(lambda: (newest_valid(folder.checkpoints), new_token()), rank)
    model = build_model(recipe)
    noise = model.noise_shapes()
    moments = restore(checkpoint, model) if checkpoint else None
    start = checkpoint.steps if checkpoint else 0
    engine = DeepSpeedEngine(
        model,
        micro_batches=micro_batches(recipe.train.batch_size, world, recipe.train.micro_batch)[0],
        zero_stage=recipe.parallel.zero_stage,
        clip_norm=recipe.train.clip_norm,
        precision=recipe.parallel.precision,
        device=device,
    )
    if moments is not None:
        engine.load_moments(moments, start)

    logger.info("training from step %d on %d workers, %s, ZeRO stage %d", start, world, device, engine.zero_stage)
    curves = Curves(engine, recipe.tracking.every, recipe.model.num_slots)
    saver = Saver(folder.checkpoints, token, rank, world, allowed=lambda: check_lease(folder, config["lease"]))
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    stop = StopRequest(folder.stop_request(config["lease"]), rank, world, address, lambda decide: _agree(decide, rank))
    held_out, evaluation_steps = evaluation_batches(recipe, data.eval, rank, world)

    def evaluate_held_out(report: StepReport) -> None:
        if report.done % recipe.evaluate.every and report.done != recipe.train.steps:
            return
        evaluation = evaluate(
            engine.evaluate,
            (micro for step in range(evaluation_steps) for micro in held_out.step(step)),
            num_slots=recipe.model.num_slots,
            background_slots=recipe.evaluate.background_slots,
            device=engine.device,
            total=engine.sum,
        )
        held_out.close()
        curves.add({f"eval/{name}": value for name, value in evaluation.metrics().items()}, report.done)

    def save(report: StepReport) -> None:
        asked = stop.due(report.done)
        if report.done % recipe.train.checkpoint_every and report.done != recipe.train.steps and not asked:
            return
        points = curves.take()  # raises if the loss has diverged: such a state is never saved
        saver.save(report.done, engine, points, {"steps": report.done, "recipe": recipe.digest(), "world": world})
        ray.train.report({"step": report.done})
        if asked:
            saver.wait()
            if rank == 0:
                folder.stop_request(config["lease"]).unlink(missing_ok=True)
            raise Stopped

    hooks: list[Hook] = [curves.record, evaluate_held_out, save]
    if rank == 0:
        hooks.append(live_values(folder.live, recipe, world))
    with training_stream(recipe, data.train, noise, rank, world, device=device) as stream:
        background = recipe.evaluate.background_slots
        train(engine, stream, Schedule(recipe.train), start=start, background_slots=background, hooks=hooks)
    saver.wait()


def live_values(path: Path, recipe: Recipe, world: int) -> Hook:
    """A hook that shows the newest step's values to the driver, twice a second at most: rank 0's mean for the batch's,
    since the terminal is not worth a collective."""
    last = 0.0

    def show(report: StepReport) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LIVE_SECONDS and report.done != recipe.train.steps:
            return
        last = now
        values = {
            "step": report.done,
            "loss": float(report.means[0]) * world,
            "kept": float(report.means[3]) * world,
            "images_per_second": report.batch_size / report.seconds,
        }
        write_bytes(path, json.dumps(values).encode())

    return show


def _agree(decide: Callable[[], Any], rank: int) -> Any:
    """Rank 0 decides, all ranks know."""
    decision = [decide() if rank == 0 else None]
    torch.distributed.broadcast_object_list(decision)
    return decision[0]


def _plan(recipe: Recipe, index: Index, batch_size: int) -> Plan:
    return Plan(index, batch_size=batch_size, seed=recipe.seed, **_shape(recipe))


def _shape(recipe: Recipe) -> dict[str, int]:
    return {"lanes": recipe.data.lanes, "window": recipe.data.window}


def _augmentation(recipe: Recipe) -> Augmentation | None:
    wish = recipe.data.augment
    return Augmentation(0.5 if wish.flip else 0.0, wish.crop or (1.0, 1.0)) if wish else None


def _cache(recipe: Recipe) -> Cache | None:
    """This node's cache: in the user's own folder, since it may hold what only this user can read."""
    limit = int(recipe.data.cache.gigabytes * 10**9)
    folder = recipe.data.cache.folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "slotforge"
    return Cache(Path(folder).expanduser(), limit) if limit else None


def _log_to(path: Path) -> None:
    """The driver shows what stands in this file; Ray's own log streaming would break its progress bars."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    for name in ("orchestration", "pipelines"):
        package = logging.getLogger(name)
        package.handlers = [handler]
        package.setLevel(logging.INFO)
        package.propagate = False
