"""The driver of a run, from a recipe to a registered model.

    python -m orchestration.train --recipe demo
    ray job submit --working-dir . -- python -m orchestration.train --recipe demo

Exit codes: 0 done, 1 failed, 2 wrong recipe, 3 another driver writes this run, 130 interrupted. The same command goes
on from the last checkpoint.
"""

import argparse
import signal
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

from orchestration.mailbox import TrainingError
from orchestration.profiling.show import Wish
from orchestration.recipe import Recipe, RecipeError, load_recipe
from orchestration.recipe_files import recipe_names
from orchestration.runs.folder import RunFolder
from orchestration.runs.lease import Lease, LeaseHeldError, LeaseLostError
from orchestration.terminal import complain, new_progress, tell

INTERRUPTED = 130


def run(recipe: Recipe, *, fresh: bool = False, console: Console | None = None, profiling: Wish | None = None) -> None:
    """Runs a recipe to its end: shards, training, evaluation, registry, report. What is done already is not repeated.

    Raises:
        RecipeError: the recipe cannot run.
        LeaseHeldError: another driver writes this run.
        NoRayError: Ray does not start, or the cluster does not answer.
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
        _run(recipe, folder, lease.number, console, profiling)


def _run(recipe: Recipe, folder: RunFolder, lease: int, console: Console, profiling: Wish | None) -> None:
    # Heavy imports wait until the recipe is known to be right.
    from orchestration.clusters.connection import ray_cluster
    from orchestration.prepare import check_data, data_folders, is_prepared, prepare
    from orchestration.runs.checkpoints import newest_valid
    from orchestration.tracking import tracking_uri

    tracking_uri(recipe)  # raises before anything starts
    newest = newest_valid(folder.checkpoints)
    if newest is None or newest.steps < recipe.train.steps or not is_prepared(recipe):
        console.print(f"run [bold]{recipe.name}[/]: starting Ray")
        threading.Thread(target=_import_tracking, name="imports", daemon=True).start()  # while Ray's processes start
        with ray_cluster(recipe.parallel.workers.max), new_progress(console) as progress:
            from orchestration.fit import fit  # after Ray has its token
            from orchestration.tracking.page import Page

            prepare(recipe, progress)
            digests = check_data(recipe)
            _pin_data(folder, digests)
            if newest is not None:
                console.print(f"run [bold]{recipe.name}[/]: going on from step {newest.steps}")
            page = Page(recipe, folder, lambda text, style: tell(progress, text, style))
            fit(recipe, data_folders(recipe), folder, lease, page, progress, profiling)
            tracker = page.tracker
    else:
        console.print(f"run [bold]{recipe.name}[/]: finished at step {newest.steps}; evaluating")
        _pin_data(folder, check_data(recipe))
        from orchestration.tracking import Tracker

        tracker = Tracker(recipe, folder)
        tracker.send_committed()
    from orchestration.show import report  # scipy's statistics: not before training

    report(recipe, folder, tracker, data_folders(recipe), console)


def _import_tracking() -> None:
    import orchestration.tracking.page  # noqa: F401


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


def main(recipe: str, overrides: list[str], fresh: bool, profile: bool = False, trace: Path | None = None) -> int:
    """Runs a recipe by name; returns the exit code."""
    console = Console()
    began = time.monotonic()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stopped job ends like Ctrl-C: with its lease returned
    try:
        profiling = Wish(trace) if profile or trace else None
        run(load_recipe(recipe, overrides), fresh=fresh, console=console, profiling=profiling)
    except RecipeError as error:
        return _fail(str(error), 2)
    except LeaseHeldError as error:
        return _fail(str(error), 3)
    except _failures() as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt as stop:
        where = f"; {stop}" if str(stop) else ""
        return _fail(f"interrupted{where}; the same command goes on from the last checkpoint", INTERRUPTED)
    console.print(f"done in {time.monotonic() - began:.0f} s")
    return 0


def _failures() -> tuple[type[Exception], ...]:
    """What ends a run with a sentence; looked up when something is raised, since it takes seconds to import."""
    from mlflow.exceptions import MlflowException

    from orchestration.clusters.connection import NoRayError
    from orchestration.runs.checkpoints import DamagedCheckpointError
    from pipelines import DataError

    return TrainingError, LeaseLostError, NoRayError, DataError, DamagedCheckpointError, MlflowException


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
    parser.add_argument("--profile", action="store_true", help="tell at the end where a step's time went")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="the same, and a trace of a few steps for Perfetto")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = _arguments()
    sys.exit(main(arguments.recipe, arguments.set, arguments.fresh, arguments.profile, arguments.trace))
