"""MLflow: a run's curves, once each, by one writer.

Points are made by rank 0, travel in checkpoints, and are sent by the driver from committed checkpoints alone. A point
that MLflow has already, from an attempt before, is not sent again.
"""

import fcntl
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Set before MLflow is imported: it would phone home, and its own progress bars would break ours.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from orchestration.recipe import Recipe, RecipeError, state_home
from orchestration.runs.checkpoints import DamagedCheckpointError, Points, committed, prune, put_aside
from orchestration.runs.folder import RunFolder

logger = logging.getLogger(__name__)
for noisy in ("mlflow.store.db.utils", "mlflow.pyfunc", "mlflow.tracking._model_registry.client", "alembic"):
    logging.getLogger(noisy).setLevel(logging.WARNING)  # tables created, examples validated: not news to a user

MOST_POINTS, MOST_PARAMS = 1000, 100  # that one log_batch takes


def tracking_uri(recipe: Recipe) -> str:
    """One absolute URI for everybody: Ray's workers change directory, and a relative one would be a store of theirs."""
    uri = recipe.tracking.uri
    if uri is None:
        state_home().mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{state_home() / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        path = uri.removeprefix("sqlite:///")
        raise RecipeError(f"tracking.uri: {uri!r} is relative; write sqlite:///{Path(path).absolute()}")
    return uri


class Tracker:
    """The run in MLflow of one run folder. Used by the driver that holds the lease, and by nobody else."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self.uri = tracking_uri(recipe)
        with _one_at_a_time(self.uri):
            self.client = MlflowClient(self.uri, registry_uri=self.uri)
        self._folder = folder
        self._kept, self._metric = recipe.train.checkpoints_kept, recipe.registry.metric
        known = folder.facts.get("mlflow", {})
        if known.get("uri") == self.uri and self._exists(known["run"]):
            self.run_id: str = known["run"]
        else:
            self.run_id = self._create(recipe)
            folder.note(mlflow={"uri": self.uri, "run": self.run_id})
        self._last = {name: self._last_step(name) for name in self.client.get_run(self.run_id).data.metrics}
        self._sent: set[str] = set()

    @property
    def run_name(self) -> str:
        return str(self.client.get_run(self.run_id).info.run_name)

    def send_committed(self) -> None:
        """Sends the points of new checkpoints, then deletes checkpoints that are no longer needed."""
        new = [one for one in committed(self._folder.checkpoints) if one.name not in self._sent]
        for checkpoint in new:
            try:
                points = checkpoint.points()
            except DamagedCheckpointError as error:
                put_aside(checkpoint, error)
                continue
            self.send(points)
            self._sent.add(checkpoint.name)
        if new:
            prune(self._folder.checkpoints, self._kept, self._sent, self._metric)

    def send(self, points: Points) -> None:
        """Sends the points that are new, in the order of their steps."""
        new = [point for point in points if point[3] > self._last.get(point[0], -1)]
        for start in range(0, len(new), MOST_POINTS):
            batch = [Metric(name, value, when, step) for name, value, when, step in new[start : start + MOST_POINTS]]
            self.client.log_batch(self.run_id, metrics=batch)
        for name, _, _, step in new:
            self._last[name] = max(step, self._last.get(name, -1))

    def points(self, name: str) -> list[tuple[int, float]]:
        """A curve as (step, value), in the order of its steps; empty where there is none."""
        return sorted((metric.step, metric.value) for metric in self.client.get_metric_history(self.run_id, name))

    def summarise(self, metrics: Mapping[str, float], step: int) -> None:
        """Final metrics: points of the last step. Not sent twice."""
        when = int(self.client.get_run(self.run_id).info.start_time)
        self.send([(name, value, when, step) for name, value in metrics.items()])

    def status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        self.client.update_run(self.run_id, status=status)

    def _exists(self, run_id: str) -> bool:
        try:
            return self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if not is_absent(error):
                raise
            logger.warning("MLflow run %s is not at %s; the curve goes on in a new one", run_id, self.uri)
            return False

    def _create(self, recipe: Recipe) -> str:
        experiment = self.client.get_experiment_by_name(recipe.tracking.experiment)
        identity = (
            experiment.experiment_id
            if experiment
            else self.client.create_experiment(recipe.tracking.experiment, artifact_location=self._artifacts())
        )
        run = self.client.create_run(identity, run_name=recipe.name)
        run_id: str = run.info.run_id
        params = [Param(key, str(value)) for key, value in flat(recipe.model_dump(mode="json"))]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + MOST_PARAMS])
        tags = [RunTag("slotforge.recipe_digest", recipe.digest()), RunTag("slotforge.folder", self._folder.url)]
        data = self._folder.facts.get("data", {})
        tags += [RunTag(f"slotforge.data.{name}", digest) for name, digest in data.items()]
        self.client.log_batch(run_id, tags=tags)
        self.client.log_text(run_id, recipe.yaml(), "recipe.yaml")
        return run_id

    def _artifacts(self) -> str | None:
        """Beside an sqlite store; a server knows its own place."""
        if not self.uri.startswith("sqlite:///"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts").as_uri()

    def _last_step(self, name: str) -> int:
        return max((metric.step for metric in self.client.get_metric_history(self.run_id, name)), default=-1)


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Two first runs at once would both make the tables of an sqlite store, and fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    with Path(f"{uri.removeprefix('sqlite:///')}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed
        yield


def is_absent(error: MlflowException) -> bool:
    """Whether an error says that something does not exist, rather than that MLflow could not be asked."""
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def flat(fields: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    """Nested fields as ("section.field", value)."""
    for key, value in fields.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            yield from flat(value, name)
        else:
            yield name, value
