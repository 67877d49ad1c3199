"""Decoding, in this thread or in processes of its own. Which one decides nothing but the speed.

A whole step is decoded into one array of pixels. A worker is this module run by Python: it imports no torch and not the
caller's main module. It gets the members' bytes through a socket and writes pixels into memory that it shares with the
reader; what cannot be decoded comes back as the reason. A worker that dies or stalls is replaced once by a new one,
which gets the same task; then the stream stops.
"""

import contextlib
import json
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
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError
from pipelines.noise import Purpose, generator
from pipelines.samples import UNKNOWN, BadSample, decode
from pipelines.transforms import AUGMENTATION_NOISE, Augmentation, count_objects

__all__ = ["Decoded", "Decoder", "Decoding", "InThread", "Processes"]

logger = logging.getLogger(__name__)

_START = 60.0  # seconds that a new worker may take to import what it needs, on a busy machine

Members = Mapping[str, bytes]
Found = int | str | None
"""What decoding a sample finds: how many objects it has (-1: unknown), why it is bad, or None: it was not decoded."""


@dataclass(frozen=True)
class Decoding:
    """From members to pixels: a pure function of the bytes, the step and the place.

    Fields:
        size: (height, width) of every image.
        with_masks: decode the masks too, which must be there.
        augment: what is done to every sample; None leaves them as they are.
        seed: of the augmentation's noise.
    """

    size: tuple[int, int]
    with_masks: bool = False
    augment: Augmentation | None = None
    seed: int = 0

    def fill(
        self, members: Members, step: int, place: int, image: NDArray[np.uint8], masks: NDArray[np.uint16]
    ) -> Found:
        """Decode a sample into `image` [H, W, 3] and, where they are wanted, `masks` [H, W].

        Returns:
            The number of objects in view, -1 where that is unknown, or why the sample can never be one.
        """
        try:
            sample = decode(members, self.with_masks, self.size, image)
        except BadSample as error:
            return str(error)
        pixels, ids, count = sample.image, sample.masks, sample.num_objects
        if self.augment is not None:
            noise = generator(self.seed, Purpose.AUGMENTATION, step, place).random(AUGMENTATION_NOISE)
            pixels, ids = self.augment(pixels, ids, noise)
            if self.augment.crops:  # objects may be out of view now
                count = UNKNOWN if ids is None or count == UNKNOWN else count_objects(ids)
        if pixels is not image:
            image[...] = pixels
        if ids is not None:
            masks[...] = ids
        return count

    def text(self) -> str:
        """JSON that `Decoding.of` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> "Decoding":
        fields = json.loads(text)
        if (augment := fields["augment"]) is not None:
            augment = Augmentation(augment["flip"], tuple(augment["crop"]))
        return cls(tuple(fields["size"]), fields["with_masks"], augment, fields["seed"])


@dataclass(frozen=True, slots=True)
class Decoded:
    """The samples of a step. Rows that hold no good sample, and those beyond the samples, are for the caller to fill.

    Fields:
        images: uint8 [rows, H, W, 3].
        masks: uint16 [rows, H, W]; no rows where they are not wanted.
        found: what was found in each sample.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint16]
    found: list[Found]


class Decoder(Protocol):
    """Decodes steps in order."""

    def submit(self, samples: Sequence[Members | None], step: int, place: int) -> None:
        """Take a step's samples to decode, of which the first stands at a place; None leaves its row out."""

    def take(self) -> Decoded:
        """The oldest step that was submitted and not taken yet. Its arrays are good until `release`."""

    def release(self) -> None:
        """The oldest step that was taken is not needed any more."""

    def close(self) -> None:
        """End what was started, and forget what was submitted."""


class InThread:
    """Decodes where it is asked.

    Args:
        decoding: what is done.
        rows: the most samples of a step.
    """

    def __init__(self, decoding: Decoding, rows: int) -> None:
        self._decoding = decoding
        images, masks = _shapes(decoding, rows)
        self._images, self._masks = np.empty(images, dtype=np.uint8), np.empty(masks, dtype=np.uint16)
        self._submitted: deque[tuple[Sequence[Members | None], int, int]] = deque()

    def submit(self, samples: Sequence[Members | None], step: int, place: int) -> None:
        self._submitted.append((samples, step, place))

    def take(self) -> Decoded:
        found = _filled(self._decoding, *self._submitted.popleft(), self._images, self._masks)
        return Decoded(self._images, self._masks, found)

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._submitted.clear()


def _filled(
    decoding: Decoding,
    samples: Sequence[Members | None],
    step: int,
    place: int,
    images: NDArray[np.uint8],
    masks: NDArray[np.uint16],
) -> list[Found]:
    """The one decode loop: samples into rows."""
    nothing = masks[:0] if decoding.with_masks else masks
    return [
        None
        if members is None
        else decoding.fill(members, step, place + row, images[row], masks[row] if decoding.with_masks else nothing)
        for row, members in enumerate(samples)
    ]


@dataclass
class _Task:
    """Samples that a worker has, or is to have, and the rows of a slot in shared memory where their pixels go."""

    samples: Sequence[Members | None]
    step: int
    place: int
    slot: int
    row: int
    worker: "_Worker | None" = None
    result: list[Found] | None = None


class Processes:
    """Decodes in worker processes, a few samples at a time; see `Decoder`.

    Args:
        workers: number of processes, at least 1.
        decoding: what they do.
        rows: the most samples of a step.
        chunk: samples that a worker gets at a time.
        timeout: seconds after which a worker that does not answer is given up.
    """

    def __init__(self, workers: int, decoding: Decoding, rows: int, chunk: int = 16, timeout: float = 60.0) -> None:
        if workers < 1 or chunk < 1:
            raise ValueError(f"workers: {workers} and chunk: {chunk} must be positive")
        self._decoding, self._rows, self._timeout = decoding, rows, timeout
        # Some chunks for each worker, so that none waits long for another at the end of a step.
        self._chunk = max(1, min(chunk, -(-rows // (2 * workers))))
        self._count = workers
        self._arena = _Arena(decoding, rows)
        self._workers: list[_Worker] = []
        self._submitted: deque[tuple[int, list[_Task]]] = deque()
        self._taken: deque[tuple[int, list[_Task]]] = deque()
        self._free: list[int] = []

    def submit(self, samples: Sequence[Members | None], step: int, place: int) -> None:
        if not self._workers:
            self._workers = [self._started() for _ in range(self._count)]
        slot = self._free.pop() if self._free else self._arena.more()
        tasks = [
            _Task(samples[row : row + self._chunk], step, place + row, slot, row)
            for row in range(0, len(samples), self._chunk)
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
        return Decoded(*self._arena.views(slot), found)

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
        return _Worker(self._arena.descriptor, (str(self._rows), self._decoding.text()), self._timeout)

    def _give(self, worker: "_Worker", task: _Task) -> None:
        task.worker = worker
        worker.tasks.append(task)
        try:
            worker.send((task.slot, task.row, task.step, task.place, task.samples))
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

    def __init__(self, arena: int, settings: tuple[str, ...], timeout: float) -> None:
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
    """Memory shared with the workers: slots, each for a step's images and masks; it grows and never moves."""

    def __init__(self, decoding: Decoding, rows: int) -> None:
        self._layout = _layout(decoding, rows)
        # Not in /dev/shm, which containers often limit to 64 MB.
        memory = os.memfd_create("decoded") if hasattr(os, "memfd_create") else None
        self._file: IO[bytes] = tempfile.TemporaryFile() if memory is None else os.fdopen(memory, "r+b")  # noqa: SIM115 held
        self._slots: list[mmap.mmap] = []

    @property
    def descriptor(self) -> int:
        return self._file.fileno()

    def more(self) -> int:
        each = self._layout[2]
        self._file.truncate((len(self._slots) + 1) * each)
        self._slots.append(mmap.mmap(self.descriptor, each, offset=len(self._slots) * each))
        return len(self._slots) - 1

    def views(self, slot: int) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
        return _views(self._slots[slot], *self._layout[:2])


Shape = tuple[int, ...]


def _shapes(decoding: Decoding, rows: int) -> tuple[Shape, Shape]:
    return (rows, *decoding.size, 3), (rows if decoding.with_masks else 0, *decoding.size)


def _layout(decoding: Decoding, rows: int) -> tuple[Shape, Shape, int]:
    """The shapes in a slot, masks first since they take two bytes each, and its bytes."""
    images, masks = _shapes(decoding, rows)
    used = math.prod(images) + 2 * math.prod(masks)
    return images, masks, -(-used // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _views(memory: mmap.mmap, images: Shape, masks: Shape) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    ids, pixels = math.prod(masks), math.prod(images)
    return (
        np.frombuffer(memory, np.uint8, pixels, 2 * ids).reshape(images),
        np.frombuffer(memory, np.uint16, ids).reshape(masks),
    )


_PROGRAM = f"import sys; sys.path[:0] = [{str(Path(__file__).parents[1])!r}]; import pipelines.decoding as d; d.work()"


def work() -> None:
    """What a worker runs, until its socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the reader's to handle
    descriptor, arena, rows = map(int, sys.argv[1:4])
    connection, decoding = Connection(descriptor), Decoding.of(sys.argv[4])
    *shapes, each = _layout(decoding, rows)
    slots: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint16]]] = {}
    # The next task is received while one is done: the reader never waits for room in the socket.
    tasks: queue.SimpleQueue[tuple[int, int, int, int, list[Members | None]] | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    while (task := tasks.get()) is not None:
        slot, row, step, place, samples = task
        if slot not in slots:
            slots[slot] = _views(mmap.mmap(arena, each, offset=slot * each), *shapes)
        images, masks = slots[slot]
        found = _filled(decoding, samples, step, place, images[row:], masks[row:])
        with contextlib.suppress(OSError):
            connection.send(found)


def _receive(connection: Connection, tasks: "queue.SimpleQueue[Any]") -> None:
    try:
        while True:
            tasks.put(connection.recv())
    except (EOFError, OSError):
        tasks.put(None)
