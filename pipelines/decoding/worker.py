"""A decode worker: what `Processes` starts. It imports no torch and not the caller's main module.

    python -c PROGRAM socket arena rows decoding

It takes messages [pixels, encoded, bytes, row, step, place, [[[name, begin, end], ...] or null, ...]]: a block of the
arena for pixels and one of so many bytes that holds the samples' members. It writes pixels into rows of the one, from
`row` on, and answers what it found in each sample.
"""

import contextlib
import mmap
import signal
import socket
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.decoding.arena import mapped
from pipelines.decoding.decoder import Decoding, Members
from pipelines.decoding.memory import Layout
from pipelines.decoding.messages import receive, send

PROGRAM = (
    f"import sys; sys.path[:0] = [{str(Path(__file__).parents[2])!r}]; "
    "from pipelines.decoding.worker import work; work(*sys.argv[1:])"
)


def work(descriptor: str, arena: str, rows: str, text: str) -> None:
    """Decode what comes, until the socket is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the reader's to handle
    decoding = Decoding.of(text)
    layout = Layout(int(rows), decoding.size, decoding.with_masks)
    pixels: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint16]]] = {}  # by where their block begins
    contents: dict[int, mmap.mmap] = {}
    with socket.socket(fileno=int(descriptor)) as connection, contextlib.suppress(EOFError, OSError):
        while True:
            block, encoded, size, row, step, place, samples = receive(connection)
            if block not in pixels:
                pixels[block] = layout.views(mapped(int(arena), block, layout.bytes))
            if encoded not in contents:
                contents[encoded] = mapped(int(arena), encoded, size)
            images, masks = pixels[block]
            members = _members(samples, contents[encoded])
            send(connection, decoding.fill_rows(members, step, place, images[row:], masks[row:]))


def _members(samples: list[list[tuple[str, int, int]] | None], content: mmap.mmap) -> list[Members | None]:
    return [None if sample is None else {name: content[begin:end] for name, begin, end in sample} for sample in samples]
