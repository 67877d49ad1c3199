"""A run's folder: who the run is, and who may write it."""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestration.files import read_json, write_json
from orchestration.recipe import Recipe, RecipeError, state_home

LEASE_SECONDS = 30.0  # without a heartbeat, a holder on another machine counts as dead
HEARTBEAT_SECONDS = 5.0


class LeaseHeldError(Exception):
    """Another driver writes this run."""


class LeaseLostError(Exception):
    """Another driver has taken this run over; nothing may be committed any more."""


@dataclass(frozen=True)
class RunFolder:
    """<home>/runs/<name>: identity in run.json, checkpoints, leases, logs."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe) -> "RunFolder":
        return cls(state_home() / "runs" / recipe.name)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def live(self) -> Path:
        """Values of the newest step, for the terminal."""
        return self.path / "live.json"

    def failure(self, lease: int) -> Path:
        """What stopped a driver's ranks for good; each driver looks at its own alone."""
        return self.path / f"failure-{lease:06d}.json"

    def stop_request(self, lease: int) -> Path:
        """Made by a driver that wants its ranks to save and stop; gone when they have."""
        return self.path / f"stop-{lease:06d}"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def facts(self) -> dict[str, Any]:
        """run.json: recipe, digests of the data, the MLflow run; empty before the first submission."""
        path = self.path / "run.json"
        return read_json(path) if path.exists() else {}

    def note(self, **facts: Any) -> None:
        """Adds facts to run.json. Only the driver with the lease does."""
        write_json(self.path / "run.json", {**self.facts, **facts})

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

    def put_aside(self) -> Path:
        """Moves everything but the leases to a folder of its own, under the next free name, so that the run can
        start anew. Only the driver with the lease does."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}~{number}")).exists():
            number += 1
        aside.mkdir()
        for path in self.path.iterdir():
            if path.name != "leases":
                path.rename(aside / path.name)
        return aside


class Lease:
    """The right to write a run, with a fencing number that grows with each holder.

    A lease is a file that only one driver can create, named by its number; its age is that of the last heartbeat. A
    holder that is dead (no such process on this machine, or no heartbeat) is succeeded by the next number.

    Raises:
        LeaseHeldError: a living driver holds it; the message names it.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder.path / "leases"
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self.number = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        newest = _newest_lease(self._folder)
        if newest:
            holder = self._living_holder(newest)
            if holder:
                raise LeaseHeldError(
                    f"run {self._folder.parent.name}: process {holder['pid']} on {holder['host']} is writing it "
                    f"(since {holder['since']}); wait for it or stop it"
                )
        self.number = newest + 1
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            with self._path(self.number).open("x") as file:
                json.dump(holder, file)
        except FileExistsError:
            raise LeaseHeldError(
                f"run {self._folder.parent.name}: another driver took it this moment; wait for it or stop it"
            ) from None
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        write_json(self._path(self.number), {"released": True})

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.json"

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a hiccup of the storage; the next beat comes in time
                os.utime(self._path(self.number))

    def _living_holder(self, number: int) -> dict[str, Any] | None:
        path = self._path(number)
        fresh = time.time() - path.stat().st_mtime < LEASE_SECONDS
        try:
            holder: dict[str, Any] = read_json(path)
        except ValueError:  # it is writing its name, or died before it could
            return {"pid": "?", "host": "?", "since": "just now"} if fresh else None
        if holder.get("released"):
            return None
        if holder["host"] == socket.gethostname():
            return holder if _start_time(holder["pid"]) == holder["started"] else None
        return holder if fresh else None


def check_lease(folder: RunFolder, number: int) -> None:
    """Fencing: whoever commits asks first whether a later driver has taken over.

    Raises:
        LeaseLostError: it has.
    """
    newest = _newest_lease(folder.path / "leases")
    if newest > number:
        raise LeaseLostError(f"run {folder.path.name}: driver {newest} has taken over from driver {number}; stopping")


def _newest_lease(folder: Path) -> int:
    return max((int(path.stem) for path in folder.glob("*.json") if path.stem.isdigit()), default=0)


def _start_time(pid: int) -> str | None:
    """When a process of this machine started, to tell it from a later one with the same number; None: no such one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))]
    return [] if old == new else [f"{path}: {old!r} there, {new!r} here"]
