"""The driver of a run, from a recipe to a registered model.

    python -m orchestration.train --recipe demo
    ray job submit --working-dir . -- python -m orchestration.train --recipe demo

Exit codes: 0 done, 1 failed, 2 wrong recipe, 3 another driver writes this run, 130 interrupted. The same command goes
on from the last checkpoint.
"""

import argparse
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from orchestration.recipe import Recipe, RecipeError, load_recipe, recipe_names
from orchestration.run_folder import Lease, LeaseHeldError, LeaseLostError, RunFolder
from orchestration.terminal import complain, new_progress

POLL_SECONDS = 0.5
STOP_SECONDS = 60.0  # that the workers have to save before they are stopped
UNSCHEDULED_LIMIT = 30  # minutes that a cluster may take to find room for the workers
INTERRUPTED = 130


class TrainingError(Exception):
    """Training has stopped for good; the message says why."""


def run(recipe: Recipe, *, fresh: bool = False, console: Console | None = None) -> None:
    """Runs a recipe to its end: shards, training, evaluation, registry, report. What is done already is not repeated.

    Raises:
        RecipeError: the recipe cannot run.
        LeaseHeldError: another driver writes this run.
        TrainingError: training has stopped for good.
        DataError: shards are missing or damaged.
    """
    console = console or Console()
    _check_parts(recipe)
    folder = RunFolder.of(recipe)
    with Lease(folder) as lease:
        if fresh and folder.facts:
            console.print(f"run [bold]{recipe.name}[/]: the existing one is now {folder.put_aside().name}")
        folder.claim(recipe)
        _run(recipe, folder, lease.number, console)


def _run(recipe: Recipe, folder: RunFolder, lease: int, console: Console) -> None:
    # Heavy imports wait until the recipe is known to be right.
    from orchestration.checkpoints import newest_valid
    from orchestration.clusters.connection import ray_cluster
    from orchestration.prepare import check_data, data_folders, is_prepared, prepare
    from orchestration.show import report
    from orchestration.tracking import Tracker

    newest = newest_valid(folder.checkpoints)
    if newest is None or newest.steps < recipe.train.steps or not is_prepared(recipe):
        console.print(f"run [bold]{recipe.name}[/]: starting Ray")
        with ray_cluster(recipe.parallel.workers.max), new_progress(console) as progress:
            prepare(recipe, progress)
            digests = check_data(recipe)
            _pin_data(folder, digests)
            tracker = Tracker(recipe, folder)
            if newest is not None:
                console.print(f"run [bold]{recipe.name}[/]: going on from step {newest.steps}")
            _fit(recipe, folder, lease, tracker, progress)
    else:
        console.print(f"run [bold]{recipe.name}[/]: finished at step {newest.steps}; evaluating")
        _pin_data(folder, check_data(recipe))
        tracker = Tracker(recipe, folder)
    tracker.send_committed()
    report(recipe, folder, tracker, data_folders(recipe), console)


def _fit(recipe: Recipe, folder: RunFolder, lease: int, tracker: Any, progress: Progress) -> None:
    """Trains by Ray Train, while this process shows progress and sends committed points to MLflow."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from orchestration.clusters.connection import cpus_per_worker, use_gpu
    from orchestration.prepare import data_folders
    from orchestration.rank import train_rank

    data, gpu, threads = data_folders(recipe), use_gpu(recipe), cpus_per_worker(recipe)
    workers = recipe.parallel.workers
    failure = folder.failure(lease)
    folder.live.unlink(missing_ok=True)
    trainer = TorchTrainer(
        train_rank,
        train_loop_config={
            "recipe": json.dumps(recipe.model_dump(mode="json")),
            "folder": str(folder.path),
            "train": str(data.train),
            "eval": str(data.eval),
            "lease": lease,
            "gpu": gpu,
            "threads": threads,
        },
        # A lost peer hangs a collective for this long: minutes, not the default half hour.
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=120),
        scaling_config=ScalingConfig(
            num_workers=workers.max if workers.min == workers.max else (workers.min, workers.max),  # type: ignore[arg-type]
            use_gpu=gpu,
            resources_per_worker={"GPU": 1} if gpu else {"CPU": threads},
        ),
        run_config=RunConfig(
            name=f"{recipe.name}-{lease}",  # a name of its own: our checkpoints are the truth, not Ray's
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(
                max_failures=recipe.parallel.max_failures,
                controller_failure_limit=UNSCHEDULED_LIMIT,  # type: ignore[call-arg]
            ),
        ),
    )
    outcome: list[BaseException] = []
    finished = threading.Event()  # not Thread.is_alive: a join that Ctrl-C interrupts takes the thread for dead

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # raised again below, in the main thread
            outcome.append(error)
        finally:
            finished.set()

    # Not in the main thread, where Ray would take Ctrl-C for itself.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    bar = progress.add_task("starting workers", total=recipe.train.steps)
    logs = LogTail(folder.logs)
    tracker.status("RUNNING")
    outage = False

    def watch(over: Callable[[], bool] = lambda: False) -> None:
        """Shows what the ranks do until they are done, or it is over."""
        nonlocal outage
        while not finished.is_set() and not failure.exists() and not over():
            finished.wait(POLL_SECONDS)
            _show_live(folder.live, progress, bar)
            for line in logs.news():
                progress.console.print(
                    line, style="dim" if " INFO " in line else "yellow", highlight=False, markup=False
                )
            outage = _send(tracker, progress, outage)

    try:
        thread.start()
        try:
            watch()
        except KeyboardInterrupt:
            progress.console.print("stopping: the workers save first; once more stops them at once", style="yellow")
            request, deadline = folder.stop_request(lease), time.monotonic() + STOP_SECONDS
            request.touch()
            watch(lambda: not request.exists() or time.monotonic() > deadline)
            raise
        if failure.exists():
            facts = json.loads(failure.read_text())
            raise TrainingError(f"{facts['error']}: {facts['message']}")
        if outcome:
            raise TrainingError(
                f"parallel.max_failures: the workers failed more than {recipe.parallel.max_failures} times, or found "
                f"no room for {workers.min} of them; the last time:\n{outcome[0]}"
            )
    except (KeyboardInterrupt, TrainingError) as stop:
        if not _send(tracker, progress, outage):  # an MLflow that is down does not hide why the run stopped
            tracker.status("KILLED" if isinstance(stop, KeyboardInterrupt) else "FAILED")
        if isinstance(stop, KeyboardInterrupt):
            raise KeyboardInterrupt(f"the newest checkpoint is of step {_newest_step(folder)}") from None
        raise
    progress.remove_task(bar)
    tracker.send_committed()
    tracker.status("FINISHED")
    shutil.rmtree(folder.path / "ray", ignore_errors=True)  # Ray's own notes; the run's folder is the truth


def _newest_step(folder: RunFolder) -> int:
    from orchestration.checkpoints import committed

    return max((checkpoint.steps for checkpoint in committed(folder.checkpoints)), default=0)


def _send(tracker: Any, progress: Progress, outage: bool) -> bool:
    """Sends what is committed; an MLflow that does not answer costs nothing but a warning: the points wait."""
    from mlflow.exceptions import MlflowException

    try:
        tracker.send_committed()
    except MlflowException as error:
        if not outage:
            progress.console.print(f"MLflow does not take points now, they wait: {error}", style="yellow", markup=False)
        return True
    return False


class LogTail:
    """What the ranks write to their logs from now on: all of rank 0, warnings and errors of the others."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read = {path: path.stat().st_size for path in folder.glob("rank-*.log")}

    def news(self) -> list[str]:
        lines = []
        for path in sorted(self._folder.glob("rank-*.log")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            lines += [
                f"{path.stem}: {line}"
                for line in whole.decode(errors="replace").splitlines()
                if path.stem == "rank-0" or " INFO " not in line
            ]
        return lines


def _show_live(path: Path, progress: Progress, bar: Any) -> None:
    try:
        live = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return
    text = f"training  loss {live['loss']:.4f}  kept {live['kept']:.1f}  {live['images_per_second']:.0f} images/s"
    progress.update(bar, completed=live["step"], description=text)


def _check_parts(recipe: Recipe) -> None:
    """Makes what only torch and the renderer can judge, before anything starts."""
    import torch

    from orchestration.prepare import renderer
    from slot_models import build_autoencoder

    try:
        with torch.device("meta"):
            build_autoencoder(**recipe.without_weights().model.model_dump())
    except (ValueError, ImportError) as error:
        raise RecipeError(f"model: {error}") from error
    if recipe.data.scenes is not None:
        try:
            renderer(recipe.data.scenes).render(recipe.data.scenes.seed, 0, 1)
        except ValueError as error:
            raise RecipeError(f"data.scenes: {error}") from error


def _pin_data(folder: RunFolder, digests: dict[str, str]) -> None:
    known = folder.facts.get("data")
    if known is not None and known != digests:
        raise RecipeError(
            f"data: the shards have changed since this run began ({known} then, {digests} now); "
            "restore them, or start anew with --fresh"
        )
    folder.note(data=digests)


def main(recipe: str, overrides: list[str], fresh: bool) -> int:
    """Runs a recipe by name; returns the exit code."""
    from mlflow.exceptions import MlflowException

    from orchestration.checkpoints import DamagedCheckpointError
    from pipelines import DataError

    console = Console()
    began = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped job ends like Ctrl-C: with its lease returned
    try:
        run(load_recipe(recipe, overrides), fresh=fresh, console=console)
    except RecipeError as error:
        return _fail(str(error), 2)
    except LeaseHeldError as error:
        return _fail(str(error), 3)
    except (TrainingError, LeaseLostError, DataError, DamagedCheckpointError, MlflowException) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt as stop:
        where = f"; {stop}" if str(stop) else ""
        return _fail(f"interrupted{where}; the same command goes on from the last checkpoint", INTERRUPTED)
    console.print(f"done in {time.monotonic() - began:.0f} s")
    return 0


def _fail(message: str, code: int) -> int:
    complain(message)
    return code


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m orchestration.train",
        description="Train a recipe, evaluate and register its model; goes on from the last checkpoint of its run.",
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe, or path to a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="e.g. train.batch_size=256")
    parser.add_argument("--fresh", action="store_true", help="put the existing run aside and train anew")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _arguments()
    sys.exit(main(arguments.recipe, arguments.set, arguments.fresh))
