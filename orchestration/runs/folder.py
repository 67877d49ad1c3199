"""A run's folder, and who the run is."""

import os
import threading
from pathlib import Path
from typing import Any

from orchestration.recipe import Recipe, RecipeError, state_home
from orchestration.runs.storage import LocalStorage, Storage, read_json, storage_at, to_json

_NOTING = threading.Lock()


def runs_home() -> Storage:
    """Where runs are: $SLOTFORGE_RUNS, a path or s3://bucket/prefix; or runs in the state folder.

    Raises:
        RecipeError: it is no such place.
    """
    try:
        return storage_at(os.environ.get("SLOTFORGE_RUNS") or state_home() / "runs")
    except ValueError as error:
        raise RecipeError(f"SLOTFORGE_RUNS: {error}") from error


class RunFolder:
    """<runs>/<name>: identity in run.json, leases, checkpoints. What lies there is the only truth about a run.

    Args:
        where: the folder's path, or its address in object storage.
    """

    def __init__(self, where: str | Path) -> None:
        self.storage = storage_at(where)

    @classmethod
    def of(cls, recipe: Recipe) -> "RunFolder":
        return cls((runs_home() / recipe.name).url)

    @property
    def url(self) -> str:
        """For those who open it elsewhere: an absolute path, or its address in object storage."""
        return self.storage.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def path(self) -> Path:
        """This machine's folder for what it shows of the run; the run's own, where that is on disk."""
        return self.storage.path if isinstance(self.storage, LocalStorage) else state_home() / "runs" / self.name

    @property
    def checkpoints(self) -> Storage:
        return self.storage / "checkpoints"

    @property
    def facts(self) -> dict[str, Any]:
        """run.json: recipe, digests of the data, the MLflow run; empty before the first submission."""
        try:
            facts: dict[str, Any] = read_json(self.storage, "run.json")
        except FileNotFoundError:
            return {}
        return facts

    def note(self, **facts: Any) -> None:
        """Adds facts to run.json. Only the driver with the lease does, in any of its threads."""
        with _NOTING:
            self.storage.write("run.json", to_json({**self.facts, **facts}))

    def claim(self, recipe: Recipe) -> None:
        """Makes the folder this recipe's, or checks that it is.

        Raises:
            RecipeError: a run of this name has another recipe; the fields are named.
        """
        known = self.facts.get("identity")
        if known is None:
            self.note(name=recipe.name, digest=recipe.digest(), identity=recipe.identity())
        elif known != recipe.identity():
            fields = "; ".join(_differences(known, recipe.identity()))
            raise RecipeError(
                f"name: {recipe.name!r} is a run with another recipe ({fields}); "
                f"take its values, give a name of your own (--set name=...), or start anew with --fresh"
            )

    def put_aside(self) -> "RunFolder":
        """Moves everything but the leases to a folder of its own, under the next free name, so that the run can
        start anew. Only the driver with the lease does."""
        runs = storage_at(self.url.removesuffix(f"/{self.name}"))
        number = 1
        while (aside := runs / f"{self.name}~{number}").files():
            number += 1
        names = {file.name.partition("/")[0] for file in self.storage.files()} - {"leases"}
        for name in sorted(names, key=lambda name: name == "run.json"):  # last: until then the run is not a new one
            runs.move(f"{self.name}/{name}", f"{self.name}~{number}/{name}")
        return RunFolder(aside.url)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))]
    return [] if old == new else [f"{path}: {old!r} there, {new!r} here"]
