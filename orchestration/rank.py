"""One rank of a run under Ray Train: puts the training loop's parts together, and goes on from the newest checkpoint.

A restart, at any world size, comes here too: the run folder knows the rest.
"""

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
import torch

from orchestration.agreement import Agreement, Pause, departure, open_board
from orchestration.assembly import Data, build_model, training_order, training_stream
from orchestration.curves import Curves
from orchestration.diagnosis import diagnose
from orchestration.driver_line import DriverLine, log_to
from orchestration.engine import DeepSpeedEngine, emulation
from orchestration.interval import SaveInterval, mtbf_of_run
from orchestration.mailbox import Failure, Leaving, Stopped
from orchestration.node_metrics import NodeMetrics, gpu_sample, node_sample
from orchestration.periodic_evaluation import PeriodicEvaluation
from orchestration.profiling.profiler import Profiler
from orchestration.recipe import Recipe, parse_recipe
from orchestration.recovery import recovery_line
from orchestration.runs.checkpoints import DamagedCheckpointError, newest_valid, restore
from orchestration.runs.folder import RunFolder
from orchestration.runs.lease import LeaseLostError, check_lease
from orchestration.runs.saver import NotSavedError, Saver, new_token
from orchestration.schedule import Schedule
from orchestration.wording import counted
from orchestration.worker import DivergedError, Hook, StepReport, train
from pipelines import DataError, Sources, micro_batches
from pipelines.sets import place_of

logger = logging.getLogger(__name__)


class StateFolderError(Exception):
    """This node does not see the run's folder."""


class TooLargeError(Exception):
    """Not even a single sample fits into memory."""


FINAL_ERRORS = (
    *(DivergedError, DataError, DamagedCheckpointError, NotSavedError),
    *(LeaseLostError, StateFolderError, TooLargeError),
)
"""What a restart would only repeat."""


def train_rank(config: Mapping[str, Any]) -> None:
    """What every Ray Train worker runs.

    Raises:
        Leaving: the workers start anew, as was asked, or with smaller micro batches.
        FINAL_ERRORS: the driver is told, and stops.
    """
    mailbox = config["mailbox"]
    try:
        try:
            with _profiler(config) as profiler:
                _train_rank(config, profiler)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # their tensors: telling the driver takes memory too
            raise _smaller(mailbox, error) from error
    except Stopped:
        logger.info("stopped, saved")
    except FINAL_ERRORS as error:
        facts = error.facts if isinstance(error, DivergedError) else {}
        ray.get(mailbox.fail.remote(Failure(type(error).__name__, str(error), facts)))
        raise


def _train_rank(config: Mapping[str, Any], profiler: Profiler | None) -> None:
    import ray.train

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    mailbox = config["mailbox"]
    log_to(mailbox, rank)
    recipe = _with_micro_batch(parse_recipe(json.loads(config["recipe"])), ray.get(mailbox.micro_batch.remote()))
    folder = RunFolder(config["folder"])
    data = Data(place_of(config["train"]), place_of(config["eval"]))
    device = f"cuda:{torch.cuda.current_device()}" if config["gpu"] else "cpu"
    if device == "cpu":
        torch.set_num_threads(config["threads"])

    if not folder.facts:
        raise StateFolderError(
            f"{folder.url}: rank {rank} does not see the run's folder; set SLOTFORGE_RUNS for the driver to a folder "
            "that all nodes share, or to s3://bucket/prefix"
        )
    checkpoint, token = _agree(lambda: (newest_valid(folder.checkpoints), new_token()), rank)
    model = build_model(recipe)
    noise = model.noise_shapes()
    moments = restore(checkpoint, model) if checkpoint else None
    start = checkpoint.steps if checkpoint else 0
    count, micro_batch = micro_batches(recipe.train.batch_size, world, recipe.train.micro_batch)
    engine = DeepSpeedEngine(
        model,
        micro_batches=count,
        zero_stage=recipe.parallel.zero_stage,
        clip_norm=recipe.train.clip_norm,
        precision=recipe.parallel.precision,
        device=device,
    )
    if moments is not None:
        engine.load_moments(moments, start)
    workers = counted(world, "worker")
    logger.info("training from step %d on %s, %s, ZeRO stage %d", start, workers, device, engine.zero_stage)

    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    board = open_board(rank, world, address, lambda decide: _agree(decide, rank))
    driver = DriverLine(mailbox, world) if rank == 0 else None
    if driver is not None:
        mailbox.attempt.remote(micro_batch)
        mailbox.mark.remote("loaded", time.time())
        if slow := emulation(engine.precision, engine.device):
            driver.warn(slow)
    mtbf = mtbf_of_run(recipe.train.mtbf_hours, world, context.get_local_world_size())
    interval = SaveInterval(recipe.train.checkpoint_every, mtbf)

    def decide(done: int) -> Pause | None:
        assert driver is not None  # only rank 0 decides
        return driver.request() or ("save" if interval.due(done) else None)

    agreement = Agreement(board, rank, start, decide)
    agree = agreement.after if profiler is None else profiler.call("agreement", agreement.after)
    commitment = recipe.model.codebook.commitment if recipe.model.codebook else None
    curves = Curves(engine, recipe.tracking.every, recipe.model.num_slots, commitment)
    if driver is not None and engine.device.type == "cuda":
        curves.count_flops(recipe)
    saver = Saver(
        folder.checkpoints, token, rank, world, allowed=lambda: check_lease(folder, config["lease"]), board=board
    )
    schedule = Schedule(recipe.train)
    evaluation = PeriodicEvaluation(recipe, engine, data.eval, schedule, curves, driver)
    done = start

    def back(report: StepReport) -> None:
        """After the first step: how long a restart took, if it was one."""
        nonlocal done
        done = report.done
        if driver is not None and report.step == start:
            parts = driver.recovery()
            if "total" in parts:
                logger.info("%s", recovery_line(parts))
                curves.add({f"recovery/{part}": seconds for part, seconds in parts.items()}, report.done)

    def save(report: StepReport) -> None:
        pause = agree(report.done)
        if pause is None and report.done != recipe.train.steps:
            return
        began = time.perf_counter()
        if profiler is not None:
            curves.add(profiler.points(), report.done)
        points = curves.take()  # raises if the loss has diverged: such a state is never saved
        facts = {"steps": report.done, "recipe": recipe.digest(), "world": world, "eval": evaluation.measured}
        saver.save(report.done, engine, points, facts)
        interval.saved(time.perf_counter() - began)
        if pause in (None, "save"):
            return
        heard = saver.wait(must=pause == "stop")
        saved, newest = _agree(lambda: (heard, saver.newest or start), rank)  # rank 0 has committed it, or not
        end = departure(pause, report.done, newest, saved)
        if end is None:
            if driver is not None:
                driver.stay()
            return
        if driver is not None and not saved:
            logger.warning("%s", end)
        if world > 1:
            torch.distributed.barrier()  # or a rank that is done would end the others before they have saved
        if rank == 0 and isinstance(end, Stopped):
            ray.get(mailbox.stopped.remote())
        raise end

    hooks: list[tuple[str, Hook]] = [("logging", back), ("logging", curves.record)]
    if driver is not None:
        hooks.insert(1, ("logging", driver.show))
    hooks += [("evaluation", evaluation), ("checkpoint", save)]
    ledger = _ledger(recipe, f"{start:09d}-{token}-rank-{rank}.txt")
    with (
        training_stream(recipe, data.train, noise, rank, world, device=device, ledger=ledger) as stream,
        _node_metrics(recipe, mailbox, address, token, context.get_local_rank(), engine.device),
    ):
        background = recipe.evaluate.background_slots
        try:
            given = engine, stream, [hook for _, hook in hooks]
            learner, batches, after = given if profiler is None else profiler.around(engine, stream, hooks)
            train(learner, batches, schedule, start=start, background_slots=background, hooks=after)
            saver.wait(must=True)
        except DivergedError as error:
            error.step = error.step or done
            sources = Sources(tries=1, timeout=recipe.data.timeout, allow_pipe=recipe.data.allow_pipe)
            error.facts = diagnose(error, model, training_order(recipe, data.train), data.train, sources)
            raise


@contextmanager
def _profiler(config: Mapping[str, Any]) -> Iterator[Profiler | None]:
    """Rank 0's, where the driver wishes for it; the driver hears what it has found however the rank ends."""
    import ray.train

    if not config["profile"] or ray.train.get_context().get_world_rank() > 0:
        yield None
        return
    with Profiler("cuda" if config["gpu"] else "cpu", trace=config["trace"]) as profiler:
        try:
            yield profiler
        finally:
            ray.get(config["mailbox"].profiled.remote(profiler.profile(), profiler.trace()))


def _node_metrics(
    recipe: Recipe, mailbox: Any, node: str, attempt: str, local_rank: int, device: torch.device
) -> AbstractContextManager[Any]:
    """One rank of a node looks at the machine, and each at its GPU."""
    gpu = device.type == "cuda"
    if not recipe.tracking.system_metrics or not (gpu or local_rank == 0):
        return nullcontext()

    def look() -> dict[str, float]:
        machine = node_sample() if local_rank == 0 else {}
        return machine | (gpu_sample(device, local_rank) if gpu else {})

    return NodeMetrics(look, lambda samples: mailbox.measured.remote(node, attempt, samples))


def _ledger(recipe: Recipe, name: str) -> Path | None:
    """A file of its own for each rank of each attempt."""
    if recipe.data.ledger is None:
        return None
    folder = Path(recipe.data.ledger)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def _agree(decide: Callable[[], Any], rank: int) -> Any:
    """Rank 0 decides, all ranks know."""
    decision = [decide() if rank == 0 else None]
    torch.distributed.broadcast_object_list(decision)
    return decision[0]


def _with_micro_batch(recipe: Recipe, limit: int | None) -> Recipe:
    """The recipe with micro batches that fit into memory, where larger ones did not."""
    if limit is None or limit >= recipe.train.micro_batch:
        return recipe
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"micro_batch": limit})})


def _is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a type for it; on a CPU torch tells it in words alone, and oneDNN, which convolves, in words of its own.

    What oneDNN cannot do at all it names as the descriptor of a primitive.
    """
    text = str(error).strip()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "can't allocate memory" in text
        or text in ("std::bad_alloc", "could not create a primitive", "could not create a memory object")
    )


def _smaller(mailbox: Any, error: BaseException) -> Exception:
    """What follows from a micro batch that did not fit."""
    limit = ray.get(mailbox.out_of_memory.remote())
    if limit is None:
        return TooLargeError(f"out of memory with a single image at a time ({error}); use a smaller model or image")
    return Leaving(f"out of memory: micro batches of {limit} from now on, the batch stays as it is")
