"""A stop that saves first: the driver asks, and all ranks stop after the same step."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

LOOK_SECONDS = 0.5  # between looks for the driver's request
ANSWER_SECONDS = 60.0  # that rank 0 may take to answer the others


class Stopped(Exception):
    """Training has stopped because it was asked to; its state is saved."""


class StopRequest:
    """Tells every rank after each step whether the run stops there.

    Rank 0 alone looks for the request, a file in the run's folder, and says the next step in a store that the ranks
    share. Nobody ends that step without rank 0's part of its gradient, so all have heard of it by its end: asking costs
    a rank one round trip a step, and no collective. Rank 0 keeps it until the others are done, as it does where a
    checkpoint ends a run: its commit waits for their parts.

    Args:
        path: the request; the driver makes it.
        rank, world: this rank, and how many there are.
        address: rank 0's address, as the others reach it.
        agree: gives every rank what rank 0 decides; all ranks call it together.
        now: seconds of a clock that only goes forward.
    """

    def __init__(
        self,
        path: Path,
        rank: int,
        world: int,
        address: str,
        agree: Callable[[Callable[[], Any]], Any],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._rank, self._now = path, rank, now
        self._next_look = now()
        self._stop: int | None = None
        self._store: TCPStore | None = None
        if world > 1:
            patience = timedelta(seconds=ANSWER_SECONDS)
            if rank == 0:
                self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=patience)
            host, port = agree(lambda: (address, self._store.port if self._store else 0))
            if rank > 0:
                self._store = TCPStore(host, port, is_master=False, timeout=patience)

    def due(self, done: int) -> bool:
        """Whether the run stops after ``done`` steps; every rank asks after each step."""
        if self._stop is None:
            self._stop = self._asked(done) if self._rank == 0 else self._heard()
        return self._stop == done

    def _asked(self, done: int) -> int | None:
        now = self._now()
        if now < self._next_look:
            return None
        self._next_look = now + LOOK_SECONDS
        if not self._path.exists():
            return None
        if self._store is not None:
            self._store.set("stop", str(done + 1))
        return done + 1

    def _heard(self) -> int | None:
        assert self._store is not None
        return int(self._store.get("stop")) if self._store.check(["stop"]) else None
