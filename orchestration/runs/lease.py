"""The right to write a run: one driver at a time."""

import contextlib
import logging
import os
import random
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from orchestration.recipe import RecipeError
from orchestration.runs.folder import RunFolder
from orchestration.runs.storage import File, Storage, read_json, to_json

logger = logging.getLogger(__name__)

LEASE_SECONDS = 30.0  # without a heartbeat, a holder on another machine counts as dead
HEARTBEAT_SECONDS = 5.0
TRIES, WAIT_SECONDS = 10, 0.05  # of several who want a lease at once; the wait doubles


class LeaseHeldError(Exception):
    """Another driver writes this run."""


class LeaseLostError(Exception):
    """Another driver has taken this run over; nothing may be committed any more."""


class Lease:
    """The right to write a run, with a fencing number that grows with each holder.

    A lease is a file that only one driver can make, named by its number; its age is that of the last heartbeat, by the
    storage's clock alone. A holder that is dead (no such process on this machine, or no heartbeat) is succeeded by the
    next number. Leases stay, so that no number is given twice.

    Raises:
        LeaseHeldError: a living driver holds it; the message names it.
        RecipeError: the run's folder cannot be written.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._run, self._leases = folder, folder.storage / "leases"
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._content = to_json(
            {
                "host": socket.gethostname(),
                "machine": _machine(),
                "pid": os.getpid(),
                "started": _start_time(os.getpid()),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            }
        )
        self.number = 0

    def __enter__(self) -> Self:
        try:
            self.number, self._name = self._claimed()
        except OSError as error:
            raise RecipeError(
                f"{self._run.url}: the run's folder cannot be written ({error}); make it writable, or set "
                "SLOTFORGE_RUNS to another place"
            ) from error
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._heart.join()
        try:
            self._leases.write(self._name, to_json({"released": True}))
        except OSError as problem:  # it is free all the same, as soon as this process has ended
            logger.warning("%s: lease %d could not be returned (%s)", self._run.url, self.number, problem)

    def _claimed(self) -> tuple[int, str]:
        """The next number, once it is this driver's, and the name of its file."""
        wait = random.SystemRandom()  # who waits how long must not be the same for all
        for attempt in range(TRIES):
            newest, files = _newest(self._leases)
            with contextlib.suppress(FileNotFoundError):  # withdrawn: this number may yet be another's
                for file in files:
                    self._refuse_if_held(file)
                number = newest + 1
                name = self._leases.claim(f"{number:06d}.json", self._content)
                if name is not None and _newest(self._leases)[0] == number:  # not slept so long that it was succeeded
                    return number, name
            time.sleep(wait.uniform(0, WAIT_SECONDS * 2**attempt))
        raise LeaseHeldError(f"run {self._run.name}: several drivers want it this moment; leave it to one of them")

    def _refuse_if_held(self, file: File) -> None:
        holder = self._living_holder(file)
        if holder:
            raise LeaseHeldError(
                f"run {self._run.name}: process {holder['pid']} on {holder['host']} is writing it "
                f"(since {holder['since']}); wait for it or stop it"
            )

    def _living_holder(self, file: File) -> dict[str, Any] | None:
        holder: dict[str, Any]
        try:
            holder = read_json(self._leases, file.name)
        except ValueError:  # it is writing its name, or died before it could
            holder = {"pid": "?", "host": "?", "since": "just now"}
        if holder.get("released"):
            return None
        if holder.get("machine") == _machine():
            return holder if _start_time(holder["pid"]) == holder["started"] else None
        return holder if self._leases.now() - file.modified < LEASE_SECONDS else None

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a hiccup of the storage; the next beat comes in time
                self._leases.touch(self._name, self._content)


def check_lease(folder: RunFolder, number: int) -> None:
    """Fencing: whoever commits asks first whether a later driver has taken over.

    Raises:
        LeaseLostError: it has.
        OSError: the storage cannot be asked.
    """
    newest, _ = _newest(folder.storage / "leases")
    if newest > number:
        raise LeaseLostError(f"run {folder.name}: driver {newest} has taken over from driver {number}; stopping")


def _newest(leases: Storage) -> tuple[int, list[File]]:
    """The largest number, 0 where there is none, and its files: several while it is not decided whose it is."""
    found: dict[int, list[File]] = {}
    for file in leases.files():
        number = file.name.removesuffix(".json").partition("-")[0]
        if number.isdigit():
            found.setdefault(int(number), []).append(file)
    newest = max(found, default=0)
    return newest, found.get(newest, [])


def _machine() -> str:
    """What process numbers are of: this boot of this machine, or of a container on it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _start_time(pid: int) -> str | None:
    """When a process of this machine started, to tell it from a later one with the same number; None: no such one."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]
