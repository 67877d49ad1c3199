"""Decoding, in this thread or in processes of its own. Which one decides nothing but the speed.

A worker is this module run by Python: it imports no torch and not the caller's main module. It gets the members' bytes
through a socket and writes pixels into memory that it shares with the reader; what cannot be decoded comes back as the
reason. A worker that dies or stalls is replaced once by a new one, which gets the same task; then the stream stops.
"""

import contextlib
import logging
import math
import mmap
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.samples import BadSample, Sample, decode

__all__ = ["Decoder", "InThread", "Processes"]

logger = logging.getLogger(__name__)

_START = 60.0  # seconds that a new worker may take to import what it needs, on a busy machine

Members = Mapping[str, bytes]
Result = Sample | BadSample


class Decoder(Protocol):
    """Decodes samples in order."""

    def submit(self, samples: Sequence[Members]) -> None:
        """Take samples to decode."""

    def take(self) -> list[Result]:
        """The samples of the oldest `submit` that was not taken yet. Their arrays are good until `release`."""

    def release(self) -> None:
        """The samples of the oldest `take` are not needed any more."""

    def close(self) -> None:
        """End what was started, and forget what was submitted."""


class InThread:
    """Decodes where it is asked."""

    def __init__(self, with_masks: bool, size: tuple[int, int]) -> None:
        self._with_masks, self._size = with_masks, size
        self._submitted: deque[Sequence[Members]] = deque()

    def submit(self, samples: Sequence[Members]) -> None:
        self._submitted.append(samples)

    def take(self) -> list[Result]:
        return [decoded(members, self._with_masks, self._size) for members in self._submitted.popleft()]

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._submitted.clear()


def decoded(members: Members, with_masks: bool, size: tuple[int, int]) -> Result:
    """A sample, or why it can never be one."""
    try:
        return decode(members, with_masks, size)
    except BadSample as error:
        return error


@dataclass
class _Task:
    """Samples that a worker has, or is to have, and the place in shared memory where their pixels go."""

    samples: Sequence[Members]
    slot: int
    worker: "_Worker | None" = None
    result: list[Any] | None = None


class Processes:
    """Decodes in worker processes, a few samples at a time; see `Decoder`.

    Args:
        workers: number of processes, at least 1.
        with_masks, size: as of `decode`; every image has this size or is bad.
        chunk: samples that a worker gets at a time.
        timeout: seconds after which a worker that does not answer is given up.
    """

    def __init__(
        self, workers: int, with_masks: bool, size: tuple[int, int], chunk: int = 8, timeout: float = 60.0
    ) -> None:
        if workers < 1 or chunk < 1:
            raise ValueError(f"workers: {workers} and chunk: {chunk} must be positive")
        self._with_masks, self._size, self._chunk, self._timeout = with_masks, size, chunk, timeout
        self._count = workers
        self._arena = _Arena(chunk, size, with_masks)
        self._workers: list[_Worker] = []
        self._submitted: deque[list[_Task]] = deque()
        self._taken: deque[list[_Task]] = deque()
        self._free: list[int] = []

    def submit(self, samples: Sequence[Members]) -> None:
        if not self._workers:
            self._workers = [self._started() for _ in range(self._count)]
        tasks = [_Task(samples[i : i + self._chunk], self._slot()) for i in range(0, len(samples), self._chunk)]
        self._submitted.append(tasks)
        for task in tasks:  # all at once: a worker must not wait for us to come by
            self._give(min(self._workers, key=lambda worker: len(worker.tasks)), task)

    def take(self) -> list[Result]:
        tasks = self._submitted.popleft()
        for task in tasks:
            while task.result is None:
                self._collect(task)
        self._taken.append(tasks)
        return [result for task in tasks for result in self._results(task)]

    def release(self) -> None:
        self._free += [task.slot for task in self._taken.popleft()]

    def close(self) -> None:
        for worker in self._workers:  # all first: they end side by side
            worker.hang_up()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        for tasks in (*self._submitted, *self._taken):
            self._free += [task.slot for task in tasks]
        self._submitted.clear()
        self._taken.clear()

    # --- inside --------------------------------------------------------------------------------------------------

    def _started(self) -> "_Worker":
        return _Worker(self._arena.descriptor, (self._chunk, *self._size, int(self._with_masks)), self._timeout)

    def _slot(self) -> int:
        return self._free.pop() if self._free else self._arena.more()

    def _give(self, worker: "_Worker", task: _Task) -> None:
        task.worker = worker
        worker.tasks.append(task)
        try:
            worker.send((task.slot, [dict(members) for members in task.samples]))
        except OSError as error:
            self._replace(worker, str(error))

    def _collect(self, task: _Task) -> None:
        """Take what the task's worker has done, or wait for it."""
        worker = task.worker
        assert worker is not None
        try:
            result = worker.receive(self._timeout)
        except (OSError, EOFError) as error:
            self._replace(worker, str(error) or type(error).__name__)
            return
        worker.failures = 0
        worker.tasks.popleft().result = result

    def _replace(self, worker: "_Worker", problem: str) -> None:
        code = worker.end()
        failures = worker.failures + 1
        name = f"decode worker {worker.process.pid} ended with {code} ({problem})"
        if failures > 1:
            raise DataError(
                f"{name}, as did the one before it on the same samples; give the node more memory, or set "
                "data.decode_workers: 0 to see the error"
            )
        logger.warning("%s; starting another", name)
        new = self._started()
        new.failures = failures
        self._workers[self._workers.index(worker)] = new
        for task in worker.tasks:
            self._give(new, task)

    def _results(self, task: _Task) -> list[Result]:
        assert task.result is not None
        images, masks = self._arena.views(task.slot)
        return [
            BadSample(found)
            if isinstance(found, str)
            else Sample(images[i], masks[i] if self._with_masks else None, found)
            for i, found in enumerate(task.result)
        ]


class _Worker:
    """A process and the socket to it."""

    def __init__(self, arena: int, settings: tuple[int, ...], timeout: float) -> None:
        ours, theirs = socket.socketpair()
        # A worker that has stopped reading must not block us for ever.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", math.ceil(timeout), 0))
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 this very file
                [sys.executable, "-P", "-c", _PROGRAM, *map(str, (theirs.fileno(), arena, *settings))],
                pass_fds=(theirs.fileno(), arena),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self._connection = Connection(ours.detach())
        self.tasks: deque[_Task] = deque()
        self.failures = 0
        self._answered = False

    def send(self, message: Any) -> None:
        self._connection.send(message)

    def receive(self, timeout: float) -> list[Any]:
        if not self._connection.poll(timeout if self._answered else timeout + _START):
            raise TimeoutError(f"no answer in {timeout:g} s")
        answer: list[Any] = self._connection.recv()
        self._answered = True
        return answer

    def hang_up(self) -> None:
        self._connection.close()

    def end(self) -> int:
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(0.2)  # without us it ends by itself
        self.process.kill()
        return self.process.wait()


class _Arena:
    """Memory shared with the workers: slots of `chunk` images, and masks, uint8; it grows and never moves."""

    def __init__(self, chunk: int, size: tuple[int, int], with_masks: bool) -> None:
        self._shapes = _shapes(chunk, size, with_masks)
        self._bytes = _slot_bytes(chunk, size, with_masks)
        # Not in /dev/shm, which containers often limit to 64 MB.
        memory = os.memfd_create("decoded") if hasattr(os, "memfd_create") else None
        self._file: IO[bytes] = tempfile.TemporaryFile() if memory is None else os.fdopen(memory, "r+b")  # noqa: SIM115 held
        self._slots: list[mmap.mmap] = []

    @property
    def descriptor(self) -> int:
        return self._file.fileno()

    def more(self) -> int:
        self._file.truncate((len(self._slots) + 1) * self._bytes)
        self._slots.append(mmap.mmap(self.descriptor, self._bytes, offset=len(self._slots) * self._bytes))
        return len(self._slots) - 1

    def views(self, slot: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return _views(self._slots[slot], *self._shapes)


def _shapes(chunk: int, size: tuple[int, int], with_masks: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (chunk, *size, 3), (chunk if with_masks else 0, *size)


def _slot_bytes(chunk: int, size: tuple[int, int], with_masks: bool) -> int:
    images, masks = _shapes(chunk, size, with_masks)
    used = int(np.prod(images)) + int(np.prod(masks))
    return -(-used // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _views(
    memory: mmap.mmap, images: tuple[int, ...], masks: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    pixels = int(np.prod(images))
    return (
        np.frombuffer(memory, np.uint8, pixels).reshape(images),
        np.frombuffer(memory, np.uint8, int(np.prod(masks)), pixels).reshape(masks),
    )


_PROGRAM = f"import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}]; import pipelines.decoding as d; d.work()"


def work() -> None:
    """What a worker runs, until its socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the reader's to handle
    descriptor, arena, chunk, height, width, with_masks = map(int, sys.argv[1:])
    connection, size = Connection(descriptor), (height, width)
    shapes, each = _shapes(chunk, size, bool(with_masks)), _slot_bytes(chunk, size, bool(with_masks))
    slots: dict[int, mmap.mmap] = {}
    # The next task is received while one is done: the reader never waits for room in the socket.
    tasks: queue.SimpleQueue[tuple[int, list[Members]] | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    while (task := tasks.get()) is not None:
        slot, samples = task
        if slot not in slots:
            slots[slot] = mmap.mmap(arena, each, offset=slot * each)
        images, masks = _views(slots[slot], *shapes)
        answer: list[int | str] = []
        for i, members in enumerate(samples):
            result = decoded(members, bool(with_masks), size)
            if isinstance(result, BadSample):
                answer.append(str(result))
                continue
            images[i] = result.image
            if result.masks is not None:
                masks[i] = result.masks
            answer.append(result.num_objects)
        with contextlib.suppress(OSError):
            connection.send(answer)


def _receive(connection: Connection, tasks: "queue.SimpleQueue[tuple[int, list[Members]] | None]") -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        tasks.put(None)
