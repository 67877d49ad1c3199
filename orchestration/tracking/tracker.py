"""The MLflow run of a run folder: its points, once each, its pictures, its status.

Points are made by rank 0, travel in checkpoints, and are sent by the driver from committed checkpoints alone. What
MLflow has already, from a driver or a try before, is asked for and not sent again.
"""

import fcntl
import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL.Image import Image, Resampling

from orchestration.recipe import Recipe
from orchestration.runs.checkpoints import DamagedCheckpointError, Points, committed, prune, put_aside
from orchestration.runs.folder import RunFolder
from orchestration.tracking.address import tracking_uri

logger = logging.getLogger(__name__)

MOST_POINTS, MOST_PARAMS = 1000, 100  # that one log_batch takes
KEY = "slotforge.key"  # a tag: of one run folder alone
IMAGES = "images"  # where MLflow keeps pictures of steps, as <key>+step+<step>+...
PICTURES = "pictures"  # where the newest are, by their keys
PAGE_WIDTH = 800  # pixels; wider ones push the right column of a run's page off a laptop's screen


class Tracker:
    """The run in MLflow of one run folder. Used by the driver that holds the lease, and by nobody else.

    Raises:
        MlflowException: MLflow does not answer, or refuses.
    """

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
        self._there: dict[str, set[int]] = {}  # steps of the curves that MLflow was asked about
        self._pictures: set[tuple[str, int]] | None = None
        self._sent: set[str] = set()

    @property
    def run_name(self) -> str:
        return str(self.client.get_run(self.run_id).info.run_name)

    @property
    def page(self) -> str:
        """Where a browser finds the run: on the server, or on the one that ``mlflow ui`` starts for a store."""
        server = self.uri.rstrip("/") if self.uri.startswith("http") else "http://127.0.0.1:5000"
        experiment = self.client.get_run(self.run_id).info.experiment_id
        return f"{server}/#/experiments/{experiment}/runs/{self.run_id}?workflowType=machine_learning"

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
        """Sends the points of steps that their curves do not have yet, in the order they are given.

        A call that fails may have arrived in part, and a step may be made again with another timestamp: what is there
        is then asked for anew.
        """
        new = [point for point in points if point[3] not in self._steps(point[0])]
        for start in range(0, len(new), MOST_POINTS):
            batch = new[start : start + MOST_POINTS]
            try:
                self.client.log_batch(
                    self.run_id, metrics=[Metric(name, value, when, step) for name, value, when, step in batch]
                )
            except BaseException:
                self._there.clear()
                raise
            for name, _, _, step in batch:
                self._there[name].add(step)

    def sent(self, name: str) -> int:
        """Points of a curve that are known to be there."""
        return len(self._there.get(name, ()))

    def _steps(self, name: str) -> set[int]:
        if name not in self._there:
            self._there[name] = {metric.step for metric in self.client.get_metric_history(self.run_id, name)}
        return self._there[name]

    def points(self, name: str) -> list[tuple[int, float]]:
        """A curve as (step, value), in the order of its steps; empty where there is none."""
        return sorted((metric.step, metric.value) for metric in self.client.get_metric_history(self.run_id, name))

    def summarise(self, metrics: Mapping[str, float], step: int) -> None:
        """Final metrics: points of the last step. Not sent twice."""
        when = int(self.client.get_run(self.run_id).info.start_time)
        self.send([(name, value, when, step) for name, value in metrics.items()])

    def picture(self, key: str, step: int, image: Image) -> None:
        """A picture of a step, for MLflow's image charts, and the newest as an artifact too. Not sent twice."""
        there = self._pictures_there()
        if (key, step) in there:
            return
        if all(newest < step for name, newest in there if name == key):
            self.show(key, image)
        self.client.log_image(self.run_id, image, key=key, step=step)
        there.add((key, step))

    def show(self, key: str, image: Image) -> None:
        """The newest picture of its kind, at a size for the run's page."""
        height = min(image.height, round(image.height * PAGE_WIDTH / image.width))
        small = image.resize((min(image.width, PAGE_WIDTH), height), Resampling.BOX)
        self.client.log_image(self.run_id, small, f"{PICTURES}/{key}.png")

    def pictured(self) -> list[str]:
        """The keys of the pictures that are there, in the order of their names."""
        return sorted({key for key, _ in self._pictures_there()})

    def _pictures_there(self) -> set[tuple[str, int]]:
        if self._pictures is None:
            names = [entry.path.rpartition("/")[2] for entry in self.client.list_artifacts(self.run_id, IMAGES)]
            found = (re.fullmatch(r"(.+?)\+step\+(\d+)\+.*compressed\.webp", name) for name in names)
            self._pictures = {(match[1], int(match[2])) for match in found if match}  # the last file of a picture
        return self._pictures

    def tag(self, **tags: str) -> None:
        """Sets tags, by their names without the prefix of ours."""
        self.client.log_batch(self.run_id, tags=[RunTag(f"slotforge.{name}", value) for name, value in tags.items()])

    def status(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        self.client.update_run(self.run_id, status=status)

    def child(self, name: str, **tags: str) -> str:
        """A run below this one; the same for the same name."""
        parent = self.client.get_run(self.run_id)
        ours = {"mlflow.parentRunId": self.run_id, **{f"slotforge.{key}": value for key, value in tags.items()}}
        return self.find_or_create(f"{self.run_id} {name}", parent.info.experiment_id, f"{self.run_name} {name}", ours)

    def find_or_create(self, key: str, experiment: str, name: str, tags: Mapping[str, str]) -> str:
        """The run with this key, so that a try that was cut off does not leave a second one."""
        found = self.client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
        run = found[0] if found else self.client.create_run(experiment, run_name=name, tags={KEY: key, **tags})
        return str(run.info.run_id)

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
        facts = self._folder.facts
        if "key" not in facts:
            self._folder.note(key=secrets.token_hex(8))
        tags = {"slotforge.recipe_digest": recipe.digest(), "slotforge.folder": self._folder.url}
        tags |= {f"slotforge.data.{name}": digest for name, digest in facts.get("data", {}).items()}
        run_id = self.find_or_create(self._folder.facts["key"], identity, recipe.name, tags)
        params = [Param(key, str(value)) for key, value in flat(recipe.model_dump(mode="json"))]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + MOST_PARAMS])
        self.client.log_text(run_id, recipe.yaml(), "recipe.yaml")
        return run_id

    def _artifacts(self) -> str | None:
        """Beside an sqlite store; a server knows its own place."""
        if not self.uri.startswith("sqlite:///"):
            return None
        return (Path(self.uri.removeprefix("sqlite:///")).parent / "mlflow-artifacts").as_uri()


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Two first runs at once would both make the tables of an sqlite store, and fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(f"{uri.removeprefix('sqlite:///')}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
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
