"""Where a run comes from, on its page: code, packages, data and machines."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag

from orchestration.assembly import sources_of
from orchestration.planning.measure import model_size
from orchestration.prepare import data_folders
from orchestration.recipe import Recipe
from orchestration.tracking.tracker import Tracker
from pipelines import Index, read_index
from pipelines.sets import Place, Sets
from pipelines.sources import shown

PACKAGES = ("orchestration", "pipelines", "slot_models")
ROOT = Path(__file__).parents[2]
MOST_DIGEST = 36  # characters that MLflow keeps of a data set's digest


@dataclass(frozen=True)
class Code:
    """Which code runs.

    Fields:
        version: of the package slotforge.
        digest: of the source files, with or without git.
        commit: None where the code is not in a git repository, as in a submitted job.
        dirty: whether files of the commit are changed.
    """

    version: str
    digest: str
    commit: str | None
    dirty: bool

    def __str__(self) -> str:
        commit = f", commit {self.commit[:12]}" if self.commit else ""
        return f"slotforge {self.version}{commit}{' with changes' if self.dirty else ''}, sources {self.digest}"


def code(root: Path = ROOT) -> Code:
    """The code in a folder that holds the packages."""
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    try:
        version = importlib.metadata.version("slotforge")
    except importlib.metadata.PackageNotFoundError:  # a job has the sources alone
        version = "from sources"
    commit, dirty = None, False
    # A file of ours has to be git's: a folder of packages may lie in somebody else's repository.
    if _git(root, "ls-files", "--error-unmatch", "orchestration/__init__.py") is not None:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--", *PACKAGES))
    return Code(version, digest.hexdigest()[:16], commit, dirty)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(root), *arguments]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)  # noqa: S603 fixed words
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None


def packages() -> str:
    """What is installed, as pip takes it."""
    found = {(entry.metadata["Name"] or "?").lower(): entry.version for entry in importlib.metadata.distributions()}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


def machines() -> list[dict[str, Any]]:
    """The nodes of the Ray that is connected."""
    import ray

    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return [
        {"address": node["NodeManagerAddress"]}
        | {name: value for name, value in sorted(node["Resources"].items()) if not name.startswith("node:")}
        for node in nodes
    ]


class Provenance:
    """Sends it once.

    Args:
        digests: of the training and the held-out set, by "train" and "eval".
    """

    def __init__(self, recipe: Recipe, digests: Mapping[str, str], code: Code) -> None:
        self._recipe, self._digests, self._code = recipe, digests, code
        self._size = model_size(recipe)
        self._machines: Sequence[Mapping[str, Any]] = ()
        self._told = False

    def runs_on(self, machines: Sequence[Mapping[str, Any]]) -> None:
        """Before anything is delivered, if they are known."""
        self._machines = machines

    def deliver(self, tracker: Tracker) -> None:
        if not self._told:
            self._tell(tracker)
            self._told = True

    def _tell(self, tracker: Tracker) -> None:
        client, run, sources = tracker.client, tracker.run_id, sources_of(self._recipe)
        data = data_folders(self._recipe)
        sets = {"train": (data.train, "training"), "eval": (data.eval, "evaluation")}
        indices = {name: read_index(place, sources) for name, (place, _) in sets.items()}
        client.log_inputs(
            run,
            datasets=[
                DatasetInput(
                    _dataset(name, place, indices[name], self._digests[name]),
                    [InputTag("mlflow.data.context", context)],
                )
                for name, (place, context) in sets.items()
            ],
        )
        client.log_text(run, packages(), "provenance/packages.txt")
        facts = {
            "code": asdict(self._code),
            "machines": list(self._machines),
            "driver": {"cpu": _cpu(), "cores": os.cpu_count()},
            "model": asdict(self._size),
            "seed": self._recipe.seed,
        }
        client.log_dict(run, facts, "provenance/facts.json")
        tracker.tag(code=str(self._code), parameters=str(self._size.parameters))
        if self._code.commit:
            client.set_tag(run, "mlflow.source.git.commit", self._code.commit)
        client.set_tag(run, "mlflow.source.name", "slotforge train")


def _dataset(name: str, place: Place, index: Index, digest: str) -> Dataset:
    urls = [entry.url for entry in place] if isinstance(place, Sets) else [str(place)]
    profile = {
        "images": index.num_samples,
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "size": index.size,
    }
    return Dataset(
        name=name,
        digest=digest[:MOST_DIGEST],
        source_type="webdataset",
        source=json.dumps({"urls": [shown(url) for url in urls]}),
        profile=json.dumps(profile),
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
