"""A prefix of a bucket in S3 or Google Cloud Storage, or of a server that speaks S3."""

import contextlib
import errno
import os
import secrets
import shutil
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, cast

from orchestration.runs.storage import File
from pipelines.object_stores import object_store

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

SECONDS, ATTEMPTS = 60.0, 5  # for an answer, and how often it is asked for
PIECE = 64 * 2**20  # bytes that are uploaded at a time: 10,000 of them at most make an object
AHEAD = 16 * 2**20  # bytes that one request reads; without a buffer it would be the reader's few
COPIED_AT_ONCE = 5 * 10**9  # bytes; S3 copies no larger object by itself


class ObjectStorage:
    """A prefix as a folder; an object appears when all of it is uploaded, and listings know of it at once.

    Args:
        url: s3://bucket/prefix or gs://bucket/prefix; a folder's name where a file system is given.
        system: to use instead of the address's own.
    """

    def __init__(self, url: str, system: "FileSystem | None" = None) -> None:
        self._url = url.rstrip("/")
        self._scheme, _, self._root = self._url.rpartition("://")
        self._given = system

    @property
    def url(self) -> str:
        return self._url

    @property
    def _system(self) -> "FileSystem":
        return self._given or _system(self._scheme, self._root.partition("/")[0])

    def __truediv__(self, name: str) -> "ObjectStorage":
        return ObjectStorage(f"{self._url}/{name}", self._given)

    def __repr__(self) -> str:
        return f"ObjectStorage({self._url!r})"

    def files(self) -> list[File]:
        return [
            File(info.path.removeprefix(f"{self._root}/"), (info.mtime_ns or 0) / 1e9)
            for info in self._below(self._root)
        ]

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._system.open_input_stream(self._path(name), compression=None, buffer_size=AHEAD))

    def read(self, name: str) -> bytes:
        """Arrow asks for the size first and then for so many bytes; in between the object may be another, or gone."""
        for _ in range(ATTEMPTS):
            try:
                with self.open(name) as file:
                    content = file.read()
            except OSError:
                if self._system.get_file_info(self._path(name)).is_file:
                    raise
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self._url}/{name}") from None
            if self._system.get_file_info(self._path(name)).size == len(content):
                return content
        raise OSError(f"{self._url}/{name}: changed in each of {ATTEMPTS} reads")

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        with self._system.open_output_stream(self._path(name), compression=None) as stream:
            for piece in pieces:
                for start in range(0, len(piece), PIECE):
                    stream.write(memoryview(piece)[start : start + PIECE])

    def claim(self, name: str, content: bytes) -> str | None:
        """Of several who want a name each writes an object of its own and then lists them; who sees no other has won.

        Two can never win: both of their objects were written before the later writer listed, a winner's object stays,
        and listings are consistent, so the later writer has seen the other's. Who sees another's withdraws its own, so
        that perhaps nobody wins, and somebody has to try again.
        """
        path = PurePosixPath(name)
        mine = str(path.with_name(f"{path.stem}-{secrets.token_hex(8)}{path.suffix}"))
        self.write(mine, content)
        rivals = [file.name for file in self.files() if file.name.startswith(f"{path.with_suffix('')}-")]
        if rivals == [mine]:
            return mine
        self.delete(mine)
        return None

    def touch(self, name: str, content: bytes) -> None:
        self.write(name, content)

    def move(self, name: str, new: str) -> None:
        old = self._system.get_file_info(self._path(name))
        for info in [old] if old.is_file else self._below(old.path):
            self._copy(info.path, self._path(new) + info.path.removeprefix(old.path), info.size or 0)
        self.delete(name)

    def delete(self, name: str) -> None:
        info = self._system.get_file_info(self._path(name))
        with contextlib.suppress(FileNotFoundError):  # gone since it was looked for
            if info.is_file:
                self._system.delete_file(info.path)
            elif self._below(info.path):
                self._system.delete_dir(info.path)

    def now(self) -> float:
        probe = f".{secrets.token_hex(8)}"
        self.write(probe, b"now")
        try:
            return float(self._system.get_file_info(self._path(probe)).mtime_ns or 0) / 1e9
        finally:
            self.delete(probe)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _below(self, path: str) -> "list[FileInfo]":
        from pyarrow.fs import FileSelector

        infos = self._system.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
        return [info for info in infos if info.is_file]

    def _copy(self, old: str, new: str, size: int) -> None:
        if size <= COPIED_AT_ONCE:
            self._system.copy_file(old, new)
            return
        with (
            self._system.open_input_stream(old, compression=None, buffer_size=AHEAD) as source,
            self._system.open_output_stream(new, compression=None) as target,
        ):
            shutil.copyfileobj(source, target, PIECE)


@lru_cache(maxsize=16)
def _system(scheme: str, bucket: str) -> "FileSystem":
    return object_store(scheme, bucket, timeout=SECONDS, attempts=ATTEMPTS)
