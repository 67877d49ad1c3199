"""A decode worker: what `Processes` starts. It imports no torch and not the caller's main module.

    python -c PROGRAM socket arena rows decoding

It takes messages [slot, row, step, place, [[[name, length], ...] or null, ...]], each with the bytes of those members,
writes pixels into rows of a slot of the arena, and answers what it found in each sample.
"""

import contextlib
import mmap
import queue
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.decoding.decoder import Decoding, Members
from pipelines.decoding.memory import Layout
from pipelines.decoding.messages import receive, send

PROGRAM = (
    f"import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]; "
    "from pipelines.decoding.worker import work; work(*sys.argv[1:])"
)

Message = tuple[Any, memoryview]


def work(descriptor: str, arena: str, rows: str, text: str) -> None:
    """Decode what comes, until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the reader's to handle
    connection, decoding = socket.socket(fileno=int(descriptor)), Decoding.of(text)
    layout = Layout(int(rows), decoding.size, decoding.with_masks)
    slots: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint16]]] = {}
    # The next message is received while one is done: the reader never waits for room in the socket.
    messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, messages), daemon=True).start()
    while (message := messages.get()) is not None:
        (slot, row, step, place, names), content = message
        if slot not in slots:
            slots[slot] = layout.views(mmap.mmap(int(arena), layout.bytes, offset=slot * layout.bytes))
        images, masks = slots[slot]
        found = decoding.fill_rows(_members(names, content), step, place, images[row:], masks[row:])
        with contextlib.suppress(OSError):
            send(connection, found)


def _members(names: list[list[tuple[str, int]] | None], content: memoryview) -> list[Members | None]:
    begin = 0
    samples: list[Members | None] = []
    for sample in names:
        members = {}
        for name, length in sample or ():
            members[name] = bytes(content[begin : begin + length])
            begin += length
        samples.append(None if sample is None else members)
    return samples


def _receive(connection: socket.socket, messages: "queue.SimpleQueue[Message | None]") -> None:
    try:
        while True:
            messages.put(receive(connection))
    except (EOFError, OSError):
        messages.put(None)
