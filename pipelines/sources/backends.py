"""Where files lie: on this machine, in an object store, behind a command. HTTP and Google have files of their own."""

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from pipelines.errors import DataError
from pipelines.object_stores import object_store
from pipelines.sources.addresses import local_path, shown, without_secrets

CHUNK = 2**18


class AbsentError(Exception):
    """The storage says that there is no such file."""


class ChangedError(Exception):
    """The file is not the one of the read before."""


@dataclass(frozen=True, slots=True)
class Version:
    """What the storage tells about a file: its size where it is known, a tag that changes with its content, and
    whether a part of it can be read alone."""

    size: int | None
    tag: str = ""
    ranges: bool = True


class Backend(Protocol):
    def open(self, url: str, first: int, last: int | None, known: Version | None) -> tuple[Version, Iterator[bytes]]:
        """Bytes [first, last) of a file (`last` None: to its end), in pieces, and its version."""


class Local:
    """Files of this machine."""

    def open(self, url: str, first: int, last: int | None, known: Version | None) -> tuple[Version, Iterator[bytes]]:
        path = local_path(url)
        assert path is not None
        file = path.open("rb")
        status = os.fstat(file.fileno())
        file.seek(first)
        return Version(status.st_size, str(status.st_mtime_ns)), _pieces(file.read, last and last - first, file.close)


class S3:
    """S3, by pyarrow's client; its own retries are off."""

    def __init__(self, timeout: float) -> None:
        self._made = lru_cache(maxsize=16)(lambda bucket: object_store("s3", bucket, timeout=timeout))

    def open(self, url: str, first: int, last: int | None, known: Version | None) -> tuple[Version, Iterator[bytes]]:
        bucket, _, key = url.partition("://")[2].partition("/")
        path = f"{bucket}/{key}"
        try:
            system = self._made(bucket)
            info = system.get_file_info(path)
            if not info.is_file:
                raise AbsentError(f"{shown(url)}: not there")
            end = info.size if last is None else min(last, info.size)
            with system.open_input_file(path) as file:
                data = file.read_at(end - first, first) if first < end else b""
        except OSError as error:
            if re.search(
                r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|NO_SUCH_BUCKET|\b40[13]\b", str(error)
            ):
                raise DataError(
                    f"{shown(url)}: refused ({without_secrets(str(error))}); check the address and the credentials"
                ) from error
            raise
        return Version(info.size, str(info.mtime_ns or "")), iter([data])


class Pipe:
    """The output of a command: read whole, since it has no ranges."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout

    def open(self, url: str, first: int, last: int | None, known: Version | None) -> tuple[Version, Iterator[bytes]]:
        process = subprocess.Popen(  # noqa: S602 the recipe allows it
            url.partition(":")[2], shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
        )
        assert process.stdout is not None
        watch = threading.Timer(self._timeout, _end, [process])
        watch.start()
        try:
            content = process.stdout.read()
            code = process.wait()
        finally:
            watch.cancel()
            _end(process)
            process.stdout.close()
        if code:
            raise OSError(f"the command ended with {code}" + (f" (limit {self._timeout:g} s)" if code < 0 else ""))
        return Version(len(content), ranges=False), iter([content[first:last]])


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _pieces(read: Callable[[int], bytes], wanted: int | None, close: Callable[[], None]) -> Iterator[bytes]:
    try:
        while wanted is None or wanted > 0:
            data = read(CHUNK if wanted is None else min(CHUNK, wanted))
            if not data:
                return
            wanted = None if wanted is None else wanted - len(data)
            yield data
    finally:
        close()
