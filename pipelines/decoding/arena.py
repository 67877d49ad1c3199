"""Memory that a reader shares with its decode workers."""

import mmap
import os
import tempfile
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of an arena: where it begins, and the memory itself."""

    offset: int
    memory: mmap.mmap


class Arena:
    """Blocks of memory in a file that has no name; it grows, and a block never moves."""

    def __init__(self) -> None:
        # Not in /dev/shm, which containers often limit to 64 MB.
        memory = os.memfd_create("decoded") if hasattr(os, "memfd_create") else None
        self._file: IO[bytes] = tempfile.TemporaryFile() if memory is None else os.fdopen(memory, "r+b")  # noqa: SIM115 held
        self._bytes = 0

    @property
    def descriptor(self) -> int:
        """Of the file, to be handed to a worker."""
        return self._file.fileno()

    def block(self, bytes: int) -> Block:
        """A new block of at least so many bytes."""
        size = max(1, -(-bytes // mmap.ALLOCATIONGRANULARITY)) * mmap.ALLOCATIONGRANULARITY
        offset, self._bytes = self._bytes, self._bytes + size
        self._file.truncate(self._bytes)
        return Block(offset, mapped(self.descriptor, offset, size))


def mapped(descriptor: int, offset: int, bytes: int) -> mmap.mmap:
    """A block of the arena with this descriptor, as a worker reaches it."""
    return mmap.mmap(descriptor, bytes, offset=offset)
