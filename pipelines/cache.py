"""Shards kept on this node's disk, shared by its processes: each is downloaded once, checked, and evicted when old.

    <key>.shard      a whole shard that matched its checksum; its time of modification is that of its last use
    <key>.part       a download in progress: whoever writes it holds its lock

The key is a digest of the full address and the checksum, so equal names from different places never meet. A part takes
its shard's name in one step, after its checksum was found right. All locks are `flock`s: a process that dies lets go of
them, and what it left behind is a part that nobody holds, which the next download removes.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedRandom, BufferedReader
from pathlib import Path

from pipelines.errors import ContentError, TransientError
from pipelines.sources import shown

__all__ = ["Cache", "NoRoomError"]

logger = logging.getLogger(__name__)

File = BufferedReader | BufferedRandom
Download = Callable[[BufferedRandom], None]

_POLL = 0.02


class NoRoomError(Exception):
    """The shard does not fit beside those that are in use: read it without the cache."""


class Cache:
    """A folder of shards with a limit.

    Args:
        folder: on a local disk; made if it is not there. Any number of processes and runs may share it.
        limit: bytes that it may hold.
        patience: seconds without progress after which a download by another process is given up as stuck.

    Raises:
        ValueError: the limit is not positive.
    """

    def __init__(self, folder: Path | str, limit: int, patience: float = 600.0) -> None:
        if limit < 1:
            raise ValueError(f"limit: {limit} bytes hold nothing; leave the cache out, or give it room")
        self.folder = Path(folder)
        self.limit = limit
        self._patience = patience
        self._checked: set[str] = set()  # found whole by this process

    @contextmanager
    def shard(self, url: str, sha256: str, size: int, download: Download) -> Iterator[File]:
        """A shard, open to be read; it is not evicted before the block ends.

        Args:
            url: full address.
            sha256, size: what the content must be.
            download: writes the content into an open file of that size, or raises.

        Raises:
            ContentError: the content does not match the checksum, twice.
            NoRoomError: it does not fit.
            TransientError: another process has been downloading it without progress.
        """
        key = hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()[:40]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._held(key, url, sha256, size) or self._downloaded(key, url, size, sha256, download) as file:
            yield file

    # --- inside --------------------------------------------------------------------------------------------------

    def _held(self, key: str, url: str, sha256: str, size: int) -> File | None:
        """The shard if the cache has it, locked against eviction."""
        path = self.folder / f"{key}.shard"
        while True:
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)  # an evictor holds it for a moment only
            if _is(file, path):
                break
            file.close()
        if key not in self._checked:  # it may be older than a crash of this machine
            if os.fstat(file.fileno()).st_size != size or hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                logger.warning("%s: damaged in the cache, it is downloaded again", shown(url))
                path.unlink(missing_ok=True)
                file.close()
                return None
            file.seek(0)
            self._checked.add(key)
        with contextlib.suppress(OSError):  # evicted meanwhile, or another user's: it can be read all the same
            os.utime(path)
        return file

    def _downloaded(self, key: str, url: str, size: int, sha256: str, download: Download) -> File:
        part, path = self.folder / f"{key}.part", self.folder / f"{key}.shard"
        while True:
            file = self._locked_part(part, url)
            # Whoever held the part before may have finished it.
            if (done := self._held(key, url, sha256, size)) is not None:
                part.unlink(missing_ok=True)
                file.close()
                return done
            try:
                self._make_room(file, key, size)
                self._fill(file, url, sha256, size, download)
                self._checked.add(key)
                with self._room():  # who counts the folder's bytes must not miss it between two names
                    os.replace(part, path)
                fcntl.flock(file, fcntl.LOCK_SH)  # from writing to reading
                file.seek(0)
                if _is(file, path):
                    return file
                file.close()  # evicted between two locks
            except BaseException:
                part.unlink(missing_ok=True)
                file.close()
                raise

    def _fill(self, file: BufferedRandom, url: str, sha256: str, size: int, download: Download) -> None:
        for last in (False, True):  # once more: the way here may be at fault
            download(file)
            file.flush()
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                os.fsync(file.fileno())
                return
            if last:
                raise ContentError("the shard's checksum is not the one in its index")
            logger.warning("%s: its checksum is not the one in its index; it is downloaded once more", shown(url))

    def _locked_part(self, part: Path, url: str) -> BufferedRandom:
        """The part, open and locked by us; waits while another process makes progress with it."""
        seen, since = -1, time.monotonic()
        while True:
            file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
            if _locked(file):
                if _is(file, part):
                    return file
                file.close()
                continue
            changed = os.fstat(file.fileno()).st_mtime_ns
            file.close()
            if changed != seen:
                seen, since = changed, time.monotonic()
            elif time.monotonic() - since > self._patience:
                raise TransientError(
                    f"{shown(url)}: another process has held its download in the cache {self.folder} without progress "
                    f"for {self._patience:g} s; end that process and start again from the last checkpoint"
                )
            time.sleep(_POLL)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Nobody else takes room or renames meanwhile; held for a scan of the folder at most."""
        with (self.folder / "room.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, part: BufferedRandom, key: str, size: int) -> None:
        """Evict what was used longest ago until `size` bytes fit, and take them."""
        if size > self.limit:
            raise NoRoomError(f"{size} bytes do not fit into a cache of {self.limit}")
        with self._room():
            entries = []
            for entry in self.folder.iterdir():
                if entry.name == f"{key}.part" or entry.suffix not in (".part", ".shard"):
                    continue
                if entry.suffix == ".part" and _removed(entry):
                    logger.info("%s: left by a process that died, removed", entry)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    entries.append((status.st_mtime_ns, status.st_size, entry))
            used = sum(bytes for _, bytes, _ in entries)
            for _, bytes, entry in sorted(entries):
                if used + size <= self.limit:
                    break
                if entry.suffix == ".shard" and _removed(entry):
                    used -= bytes
            if used + size > self.limit:
                raise NoRoomError(f"{size} bytes do not fit: {used} of {self.limit} are in use")
            part.truncate(0)
            part.truncate(size)  # counts from now on


def _locked(file: File) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(file: File, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _removed(path: Path) -> bool:
    """Remove a file that nobody holds."""
    try:
        with path.open("r+b") as file:
            if not _locked(file) or not _is(file, path):
                return False
            path.unlink()
    except FileNotFoundError:
        return True
    return True
