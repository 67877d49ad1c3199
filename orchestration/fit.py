"""Trains by Ray Train, while the driver shows progress."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from rich.progress import Progress

from orchestration.assembly import Data
from orchestration.clusters.capacity import cpus_per_worker, use_gpu
from orchestration.elastic import Trainer
from orchestration.files import write_json
from orchestration.kept_memory import keeping_memory
from orchestration.mailbox import SEND_SECONDS, STOP_SECONDS, News, TrainingError, open_mailbox
from orchestration.process_group import ProcessGroup
from orchestration.profiling.profile import TRACED_STEPS, WARM_STEPS, StepProfile
from orchestration.profiling.show import Wish, profile_table, write_trace
from orchestration.rank import FINAL_ERRORS, train_rank
from orchestration.recipe import Recipe, state_home
from orchestration.runs.folder import RunFolder
from orchestration.terminal import tell
from orchestration.tracking.page import Page, newest_step
from orchestration.tracking.provenance import machines
from orchestration.wording import counted

POLL_SECONDS = 1.0
UNSCHEDULED_LIMIT = 30  # times that a worker group of a fixed size may find no room

TIMES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # a dead worker is seen this soon
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "45",  # one that is hung or paused
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # orchestration.elastic looks for itself
}
GROUP_START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Elastic: a node that has just died is still counted for a while, and a start on it only times out."""


def fit(
    recipe: Recipe,
    data: Data,
    folder: RunFolder,
    lease: int,
    page: Page,
    progress: Progress,
    profiling: Wish | None = None,
) -> None:
    """Trains a run from its newest checkpoint to its end, on the Ray that is connected.

    Raises:
        TrainingError: training has stopped for good; or it is done, and MLflow has not taken all that is to be shown.
        KeyboardInterrupt: it was asked to stop, and has saved; says where.
        MlflowException: MLflow answers, and refuses.
    """
    mailbox = open_mailbox(folder.facts.get("micro_batch"))
    training = _Training(_trainer(recipe, data, folder, lease, mailbox, profiling))
    watch = _Watch(mailbox, training, folder, page, progress, recipe.train.steps, profiling)
    training.start()  # its workers need longer than MLflow, which may refuse: then they end with the driver's Ray
    with page:
        page.begins(newest_step(folder), machines())
        try:
            try:
                watch.until(lambda: False)
            except KeyboardInterrupt:
                progress.console.print("stopping: the workers save first; once more stops them at once", style="yellow")
                mailbox.ask.remote("stop")
                deadline = time.monotonic() + STOP_SECONDS
                watch.until(lambda: watch.stopped or time.monotonic() > deadline)
                raise
            if training.error is not None:
                raise TrainingError(
                    "parallel.max_failures: the workers failed more than "
                    f"{counted(recipe.parallel.max_failures, 'time')} without a new step, or found no room for "
                    f"{recipe.parallel.workers.min} of them; the last time:\n{training.error}"
                )
        except (KeyboardInterrupt, TrainingError) as stop:
            if isinstance(stop, KeyboardInterrupt):
                page.close("KILLED", SEND_SECONDS)  # who stops it does not wait for long, and then kills
                raise KeyboardInterrupt(f"the newest checkpoint is of step {newest_step(folder)}") from None
            page.close("FAILED")
            raise
        watch.close()
        if not page.close("FINISHED"):
            raise TrainingError(
                "tracking.uri: the run is trained and saved, but MLflow has not taken all of its curves; once it does, "
                "the same command sends the rest, evaluates the model and registers it"
            )


def _trainer(
    recipe: Recipe, data: Data, folder: RunFolder, lease: int, mailbox: Any, profiling: Wish | None
) -> Trainer:
    gpu, threads, workers = use_gpu(recipe), cpus_per_worker(recipe), recipe.parallel.workers
    elastic = workers.min < workers.max
    for name, seconds in {**TIMES, GROUP_START_SECONDS: "5" if elastic else "60"}.items():
        os.environ.setdefault(name, seconds)  # Ray Train hands them on to its controller
    return Trainer(
        train_rank,
        mailbox=mailbox,
        final=FINAL_ERRORS,
        train_loop_config={
            "recipe": json.dumps(recipe.model_dump(mode="json")),
            "folder": folder.url,
            "train": str(data.train),
            "eval": str(data.eval),
            "lease": lease,
            "gpu": gpu,
            "threads": threads,
            "mailbox": mailbox,
            "profile": profiling is not None,
            "trace": profiling is not None and profiling.trace is not None,
        },
        # A lost peer hangs a collective for this long: minutes, not the default half hour.
        backend_config=ProcessGroup("nccl" if gpu else "gloo", timeout_s=120),
        scaling_config=ScalingConfig(
            num_workers=(workers.min, workers.max) if elastic else workers.max,
            use_gpu=gpu,
            resources_per_worker={"GPU": 1} if gpu else {"CPU": threads},
            elastic_resize_monitor_interval_s=recipe.parallel.resize_seconds,
        ),
        run_config=RunConfig(
            name=f"{recipe.name}-{lease}",  # a name of its own: our checkpoints are the truth, not Ray's
            worker_runtime_env={} if gpu else {"env_vars": keeping_memory()},
            storage_path=str(state_home() / "ray" / f"{recipe.name}-{lease}"),
            failure_config=FailureConfig(
                max_failures=recipe.parallel.max_failures,
                controller_failure_limit=-1 if elastic else UNSCHEDULED_LIMIT,
            ),
        ),
    )


class _Training:
    """Ray Train's run, in a thread: in the main thread Ray would take Ctrl-C for itself."""

    def __init__(self, trainer: Trainer) -> None:
        self.error: BaseException | None = None
        # Not Thread.is_alive: a join that Ctrl-C interrupts takes the thread for dead.
        self.finished = threading.Event()
        self._trainer = trainer

    def start(self) -> None:
        threading.Thread(target=self._fit, name="ray-train", daemon=True).start()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # raised again by the main thread
            self.error = error
        finally:
            shutil.rmtree(self._trainer.run_config.storage_path or "", ignore_errors=True)  # Ray's own notes
            self.finished.set()


class _Watch:
    """Shows what the ranks do."""

    def __init__(
        self,
        mailbox: Any,
        training: _Training,
        folder: RunFolder,
        page: Page,
        progress: Progress,
        steps: int,
        profiling: Wish | None,
    ) -> None:
        self._mailbox, self._training, self._folder, self._profiling = mailbox, training, folder, profiling
        self._page, self._progress = page, progress
        self._bar = progress.add_task("starting workers", total=steps)
        self.news = News()
        self._shown = profiling is None

    def until(self, over: Callable[[], bool]) -> None:
        """Until training is done, or it is over.

        Raises:
            TrainingError: the ranks have met what a restart would only repeat.
        """
        while not over():
            finished = self._training.finished.wait(POLL_SECONDS)
            self._look()
            if self.news.failure is not None:
                self._fail()
            if finished:
                return

    @property
    def stopped(self) -> bool:
        """The ranks have stopped as they were asked, and said all they had to say."""
        return self.news.stopped and self._shown

    def close(self) -> None:
        self._progress.remove_task(self._bar)

    def _look(self) -> None:
        limit = self.news.micro_batch
        self.news = ray.get(self._mailbox.news.remote())
        if self.news.micro_batch != limit:
            self._folder.note(micro_batch=self.news.micro_batch)
        for rank, line in self.news.lines:
            usual = " INFO " in line
            if rank == 0 or not usual:
                self._say(f"rank {rank}: {line}", "dim" if usual else "yellow")
        if self.news.events:
            self._page.happened(*self.news.events)
        for step, glimpse in self.news.glimpses:
            self._page.picture(step, glimpse)
        for node, attempt, samples in self.news.samples:
            self._page.measured(node, attempt, samples)
        if self._profiling is not None and self.news.profile is not None:
            self._show(self.news.profile, self.news.trace, self._profiling.trace)
        if live := self.news.live:
            text = f"loss {live['loss']:.4f}  kept {live['kept']:.1f}  {live['images_per_second']:.0f} images/s"
            self._progress.update(self._bar, completed=live["step"], description=f"training  {text}")

    def _show(self, profile: StepProfile, trace: bytes | None, path: Path | None) -> None:
        self._shown = True
        if profile.steps:
            self._progress.console.print(profile_table(profile))
        if path is not None and trace is not None:
            write_trace(trace, path)
            self._say(f"trace: {path}; open it in https://ui.perfetto.dev", "dim")
        elif path is not None:
            self._say(f"trace: the run ended before the {WARM_STEPS + TRACED_STEPS} steps that it takes", "yellow")

    def _fail(self) -> None:
        failure = self.news.failure
        assert failure is not None
        message = f"{failure.error}: {failure.message}"
        if failure.facts:
            path = self._folder.path / "diagnosis.json"
            write_json(path, failure.facts)
            message += f"\nThe step, its samples and norms are in {path}"
        raise TrainingError(message)

    def _say(self, text: str, style: str) -> None:
        tell(self._progress, text, style)
