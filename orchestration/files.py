"""Files of this machine that are whole or not there."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_bytes(path: Path, *pieces: bytes | memoryview) -> None:
    """Writes a file atomically and durably: readers see the old one or the new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial(path.parent) as unfinished:
        with unfinished.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, json.dumps(content, indent=1).encode())


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


@contextlib.contextmanager
def partial(folder: Path) -> Iterator[Path]:
    """A name for a file that is not whole, removed if it is still there in the end."""
    path = folder / f".{secrets.token_hex(4)}.partial"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
