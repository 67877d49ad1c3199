"""Real runs: the driver in a process of its own, on a real Ray with real workers and a real MLflow store."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import psutil
import yaml

RECIPE = {
    "name": "chain",
    "data": {"scenes": {"pieces": [1, 3], "grid": 5, "cell": 3, "train": 600, "eval": 90, "per_shard": 100}},
    "model": {
        "image_size": 15,
        "num_slots": 4,
        "encoder": {"strides": [3, 1]},
        "attention": {"initial": "per_slot", "gradient": "bilevel"},
        "gate": {"gradient": "difference"},
        "decoder": {"layers": 2, "kernel": 3, "patch": 3},
    },
    "train": {
        "steps": 600,
        "batch_size": 31,
        "learning_rate": 2e-3,
        "warmup_steps": 20,
        "clip_norm": 1.0,
        "keep_weight": 0.05,
        "gate_from": 150,
        "checkpoint_every": 30,
    },
    "parallel": {"workers": {"min": 2, "max": 2}, "device": "cpu"},
    "tracking": {"every": 10},
    "evaluate": {"every": 150, "batch_size": 32},
}
PATIENCE = 480  # seconds that a step of a test may take on a busy machine


@dataclass
class Run:
    """A run of the recipe above, by name, in one state folder.

    Fields:
        changes: of the recipe, as --set takes them.
        cluster: environment variables of the cluster it runs on; none: a Ray of its own.
    """

    home: Path
    name: str
    changes: tuple[str, ...] = ()
    cluster: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.home / "runs" / self.name

    @property
    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        return {**inherited, "SLOTFORGE_HOME": str(self.home), "COLUMNS": "200", **self.cluster}

    def command(self, *more: str) -> list[str]:
        recipe = self.home / "chain.yaml"
        recipe.write_text(yaml.safe_dump(RECIPE))
        return [
            *(sys.executable, "-m", "orchestration.train", "--recipe", str(recipe)),
            *("--set", f"name={self.name}", *(part for change in self.changes for part in ("--set", change)), *more),
        ]

    def start(self, *more: str) -> subprocess.Popen[str]:
        """A driver in a session of its own, so that Ctrl-C reaches it and nothing of ours."""
        return subprocess.Popen(
            self.command(*more),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, driver: "subprocess.Popen[str]") -> tuple[int, str]:
        output, _ = driver.communicate(timeout=PATIENCE)
        return driver.returncode, output

    def newest_step(self) -> int:
        manifests = self.folder.glob("checkpoints/[0-9]*/manifest.json")
        return max((int(path.parent.name.partition("-")[0]) for path in manifests), default=0)

    def wait_for_step(self, step: int, driver: "subprocess.Popen[str]") -> None:
        """Until a checkpoint of this step or a later one is committed."""
        wait(lambda: self.newest_step() >= step or driver.poll() is not None)
        assert driver.poll() is None, driver.communicate()[0]

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.uri, registry_uri=self.uri)

    @property
    def run_id(self) -> str:
        return str(json.loads((self.folder / "run.json").read_text())["mlflow"]["run"])

    def curves(self, run_id: str | None = None) -> dict[str, list[tuple[int, float]]]:
        """All points of what training computes; those of time and speed are never the same twice."""
        names = self.client.get_run(run_id or self.run_id).data.metrics
        kept = [name for name in names if name.startswith(("loss/", "slots/", "eval/", "train/", "final/"))]
        return {name: self.points(name, run_id) for name in kept}

    def points(self, name: str, run_id: str | None = None) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run_id or self.run_id, name))


def wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def workers(driver: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The rank processes of a driver's local Ray."""
    return [process for process in _family(driver) if "RayTrainWorker" in " ".join(_command(process))]


def actors(driver: "subprocess.Popen[str]") -> set[str]:
    """What runs in the processes of a driver's local Ray, by the titles that Ray gives them."""
    titles = [" ".join(_command(process)) for process in _family(driver)]
    return {title.removeprefix("ray::").split(".")[0].strip() for title in titles if title.startswith("ray::")}


def kill_everything(driver: "subprocess.Popen[str]") -> None:
    """kill -9 of a driver; its Ray dies with it, or is ended here."""
    family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    for process in alive:
        process.kill()


def _family(driver: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(driver.pid).children(recursive=True)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
