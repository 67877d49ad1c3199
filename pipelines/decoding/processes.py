"""A decoder that hands a step's samples to worker processes, a few at a time.

Encoded bytes and pixels lie in memory that is shared with the workers; a socket to each says where. A worker that dies
or stalls is replaced once by a new one, which gets the same tasks; then the stream stops.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.decoding.arena import Arena
from pipelines.decoding.decoder import Decoded, Decoding, Found, Members
from pipelines.decoding.memory import Layout
from pipelines.decoding.messages import receive, send
from pipelines.decoding.worker import PROGRAM
from pipelines.errors import DataError

logger = logging.getLogger(__name__)

_START = 60.0  # seconds that a new worker may take to import what it needs, on a busy machine

_Named = list[tuple[str, int, int]] | None
"""Where the members of a sample lie in a block: name, begin and end of each; None: it is left out."""


class _Slot:
    """Shared memory for a step: its pixels, and what they are decoded from."""

    def __init__(self, arena: Arena, layout: Layout) -> None:
        self._arena = arena
        self._layout = layout
        self.pixels = arena.block(layout.bytes)
        self.encoded = arena.block(0)

    def take(self, samples: Sequence[Members | None]) -> list[_Named]:
        """Put samples where workers read them."""
        needed = sum(len(data) for members in samples if members for data in members.values())
        if needed > len(self.encoded.memory):  # twice, or it would grow with every step that is a little larger
            self.encoded = self._arena.block(max(needed, 2 * len(self.encoded.memory)))
        memory, end = self.encoded.memory, 0
        listed: list[_Named] = []
        for members in samples:
            if members is None:
                listed.append(None)
                continue
            named = []
            for name, data in members.items():
                begin, end = end, end + len(data)
                memory[begin:end] = data
                named.append((name, begin, end))
            listed.append(named)
        return listed

    def decoded(self, found: list[Found]) -> Decoded:
        return Decoded(*self._layout.views(self.pixels.memory), found)


@dataclass
class _Task:
    """Samples that a worker has, or is to have, and the slot from which they come and whose rows get their pixels."""

    samples: list[_Named]
    step: int
    place: int
    slot: _Slot
    row: int
    worker: "_Worker | None" = None
    result: list[Found] | None = None


class Processes:
    """Decodes in worker processes; see `Decoder`.

    Args:
        workers: number of processes, at least 1.
        decoding: what they do.
        rows: the most samples of a step.
        chunk: samples that a worker gets at a time.
        timeout: seconds after which a worker that does not answer is given up.
    """

    def __init__(self, workers: int, decoding: Decoding, rows: int, chunk: int = 64, timeout: float = 60.0) -> None:
        if workers < 1 or chunk < 1:
            raise ValueError(f"workers: {workers} and chunk: {chunk} must be positive")
        self._decoding, self._rows, self._timeout = decoding, rows, timeout
        # Few messages, since each wakes somebody; every worker has a part of every step.
        self._chunk = max(1, min(chunk, -(-rows // workers)))
        self._count = workers
        self._arena, self._layout = Arena(), Layout(rows, decoding.size, decoding.with_masks)
        self._workers: list[_Worker] = []
        self._submitted: deque[tuple[_Slot, list[_Task]]] = deque()
        self._taken: deque[tuple[_Slot, list[_Task]]] = deque()
        self._free: list[_Slot] = []

    def submit(self, samples: Sequence[Members | None], step: int, place: int) -> None:
        if not self._workers:
            self._workers = [self._started() for _ in range(self._count)]
        slot = self._free.pop() if self._free else _Slot(self._arena, self._layout)
        listed = slot.take(samples)
        tasks = [
            _Task(listed[row : row + self._chunk], step, place + row, slot, row)
            for row in range(0, len(listed), self._chunk)
        ]
        self._submitted.append((slot, tasks))
        for task in tasks:  # all at once: a worker must not wait for us to come by
            self._give(min(self._workers, key=lambda worker: len(worker.tasks)), task)

    def take(self) -> Decoded:
        slot, tasks = self._submitted.popleft()
        self._taken.append((slot, tasks))
        found: list[Found] = []
        for task in tasks:
            while task.result is None:
                self._collect(task)
            found += task.result
        return slot.decoded(found)

    def release(self) -> None:
        self._free.append(self._taken.popleft()[0])

    def close(self) -> None:
        for worker in self._workers:  # all first: they end side by side
            worker.hang_up()
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._free += [slot for slot, _ in (*self._submitted, *self._taken)]
        self._submitted.clear()
        self._taken.clear()

    # --- inside --------------------------------------------------------------------------------------------------

    def _started(self) -> "_Worker":
        return _Worker(self._arena.descriptor, (str(self._rows), self._decoding.text()))

    def _give(self, worker: "_Worker", task: _Task) -> None:
        task.worker = worker
        worker.tasks.append(task)
        try:
            worker.send(task, self._timeout)
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


class _Worker:
    """A process and the socket to it."""

    def __init__(self, arena: int, settings: tuple[str, ...]) -> None:
        self._connection, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 our own program
                [sys.executable, "-P", "-c", PROGRAM, *map(str, (theirs.fileno(), arena, *settings))],
                pass_fds=(theirs.fileno(), arena),
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        self.tasks: deque[_Task] = deque()
        self.failures = 0
        self._answered = False

    def send(self, task: _Task, timeout: float) -> None:
        self._connection.settimeout(timeout)  # one that has stopped reading must not block us for ever
        encoded = task.slot.encoded
        where = (task.slot.pixels.offset, encoded.offset, len(encoded.memory), task.row)
        send(self._connection, (*where, task.step, task.place, task.samples))

    def receive(self, timeout: float) -> list[Found]:
        self._connection.settimeout(timeout if self._answered else timeout + _START)
        found: list[Found] = receive(self._connection)
        self._answered = True
        return found

    def hang_up(self) -> None:
        self._connection.close()

    def end(self) -> int:
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(0.2)  # without us it ends by itself
        self.process.kill()
        return self.process.wait()
