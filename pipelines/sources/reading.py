"""Reads with time-outs, retries and an end, wherever a file lies.

A read is cut into parts of bounded size, several at a time. A part that stalls, drops or is refused for now is resumed
where it broke off, after a delay that doubles; after a fixed number of tries the read ends in `TransientError`. What a
server says about the object itself (not there, of another size, changed meanwhile) is told apart from that, since only
it may change what a batch holds.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import urllib3

from pipelines.errors import DataError, TransientError
from pipelines.sources.addresses import scheme_of, shown, without_secrets
from pipelines.sources.backends import S3, AbsentError, Backend, ChangedError, Local, Pipe, Version
from pipelines.sources.google import Google
from pipelines.sources.http import Http

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SLOWEST = 2**15  # bytes a second: a part that comes slower than this has stalled


class Sources:
    """Reads files, with time-outs, retries and an end.

    Args:
        tries: how often a part is asked for before the read ends in an error.
        timeout: seconds without an answer or without a byte after which a try is given up.
        first_delay, longest_delay: seconds between tries; the delay doubles from the one to the other.
        part: bytes that are asked for at a time.
        connections: parts that are read at the same time.
        allow_pipe: run the commands of `pipe:` addresses.
        sleep: waits between tries; returns True when the reading is to end at once.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        *,
        tries: int = 8,
        timeout: float = 30.0,
        first_delay: float = 0.5,
        longest_delay: float = 30.0,
        part: int = 8 * 2**20,
        connections: int = 4,
        allow_pipe: bool = False,
        sleep: Callable[[float], bool | None] | None = None,
    ) -> None:
        for name, value in (("tries", tries), ("part", part), ("connections", connections)):
            if value < 1:
                raise ValueError(f"{name}: {value} is less than 1; use a positive number")
        if timeout <= 0 or first_delay < 0 or longest_delay < 0:
            raise ValueError(f"timeout: {timeout} s and delays: {first_delay} s, {longest_delay} s; use positive ones")
        self._tries, self._timeout, self._part, self._connections = tries, timeout, part, connections
        self._first_delay, self._longest_delay = first_delay, longest_delay
        self._allow_pipe = allow_pipe
        self._ended = threading.Event()
        self._sleep = sleep or self._ended.wait
        self._backends: dict[str, Backend] = {}
        self._lock = threading.Lock()

    def read(self, url: str) -> bytes:
        """A whole file of unknown size.

        Raises:
            AbsentError: it is not there.
            TransientError: the storage did not answer in time.
            DataError: access is refused.
        """
        return self._steady(url, lambda: self._part_of(url, 0, None, None)[1])

    def read_range(self, url: str, first: int, last: int, known: Version) -> bytes:
        """Bytes [first, last) of a file whose version is known; parts are read side by side. Raises as `read`, and:

        Raises:
            ChangedError: the file is not `known` any more.
        """
        content = bytearray(last - first)

        def write(position: int, data: bytes) -> None:
            content[position - first : position - first + len(data)] = data

        self._parallel(url, first, last, write, known)
        return bytes(content)

    def fetch(self, url: str, size: int, write: Callable[[int, bytes], None]) -> Version:
        """A whole file of known size into `write(position, data)`, parts side by side, in any order.

        A file of another size is not read: look at the size of the version that is returned. Raises as `read`.
        """
        return self._steady(url, lambda: self._parallel(url, 0, size, write, None))

    def retried(self, url: str, attempt: Callable[[], T]) -> T:
        """The result of the first try that does not fail for the storage's fault. Raises as `read`."""
        start = time.monotonic()
        for number in range(1, self._tries + 1):
            try:
                return attempt()
            except (OSError, urllib3.exceptions.HTTPError) as error:
                problem = without_secrets(str(error) or type(error).__name__)
            if number < self._tries:
                delay = min(self._first_delay * 2 ** (number - 1), self._longest_delay)
                logger.warning("%s: %s; try %d of %d in %g s", shown(url), problem, number + 1, self._tries, delay)
                if self._sleep(delay):
                    raise DataError(f"{shown(url)}: the reading was ended between two tries")
        raise TransientError(
            f"{shown(url)}: could not be read in {self._tries} tries over {time.monotonic() - start:.0f} s "
            f"(last: {problem}); repair the storage and start again from the last checkpoint"
        )

    def end(self) -> None:
        """Ends the waiting between tries, at once and for good; `begin` allows it again."""
        self._ended.set()

    def begin(self) -> None:
        self._ended.clear()

    # --- inside ------------------------------------------------------------------------------------------------

    def _steady(self, url: str, whole: Callable[[], T]) -> T:
        """A read during which the file does not change; one that keeps changing is as good as unreadable."""
        for _ in range(self._tries):
            with contextlib.suppress(ChangedError):
                return whole()
            logger.warning("%s: changed while it was read; reading it anew", shown(url))
        raise TransientError(
            f"{shown(url)}: changed in each of {self._tries} reads; wait until it is written and start again"
        )

    def _parallel(
        self,
        url: str,
        first: int,
        last: int,
        write: Callable[[int, bytes], None],
        known: Version | None,
    ) -> Version:
        # The first part alone: it tells version and size, and whether the others are worth asking for.
        end = min(first + self._part, last)
        version, data = self._part_of(url, first, end, known)
        if known is None and version.size is not None and version.size != last:
            return version
        write(first, data)
        part = self._part if version.ranges else max(1, last - end)
        starts = range(end, last, part)
        if starts:
            with ThreadPoolExecutor(self._connections, thread_name_prefix="read") as pool:
                parts = [
                    pool.submit(lambda a: write(a, self._part_of(url, a, min(a + part, last), version)[1]), start)
                    for start in starts
                ]
                failed = next(
                    (part for part in wait(parts, return_when=FIRST_EXCEPTION).done if part.exception()), None
                )
                if failed is not None:
                    pool.shutdown(cancel_futures=True)
                    failed.result()
        return version

    def _part_of(self, url: str, first: int, last: int | None, known: Version | None) -> tuple[Version, bytes]:
        """Bytes [first, last), or less where the file ends before; what has come is kept over a retry."""
        backend = self._backend(url)
        content = bytearray()
        version = known

        def attempt() -> None:
            nonlocal version
            if last is not None and first + len(content) >= last:
                return
            begin = time.monotonic()
            try:
                seen, pieces = backend.open(url, first + len(content), last, version)
            except FileNotFoundError:
                raise AbsentError(f"{shown(url)}: not there") from None
            if version is not None and not _agree(seen, version):
                content.clear()
                raise ChangedError(shown(url))
            version = version or seen
            end = version.size if last is None else last if version.size is None else min(last, version.size)
            for piece in pieces:
                content.extend(piece)
                late = time.monotonic() - begin > self._timeout + len(content) / _SLOWEST
                if late and first + len(content) != end:  # what is whole is not late
                    raise TimeoutError(f"stalled after {len(content)} bytes")
            if end is not None and first + len(content) < end:
                raise ConnectionError(f"broke off after {len(content)} of {end - first} bytes")

        self.retried(url, attempt)
        assert version is not None
        return version, bytes(content)

    def _backend(self, url: str) -> Backend:
        scheme = scheme_of(url)
        with self._lock:
            if scheme not in self._backends:
                self._backends[scheme] = self._made(scheme, url)
            return self._backends[scheme]

    def _made(self, scheme: str, url: str) -> Backend:
        match scheme:
            case "file":
                return Local()
            case "http" | "https":
                return Http(self._timeout, self._connections)
            case "s3":
                return S3(self._timeout)
            case "gs":
                return Google(Http(self._timeout, self._connections))
            case "pipe" if self._allow_pipe:
                return Pipe(self._timeout)
            case "pipe":
                raise DataError(
                    f"{shown(url)}: it runs a command in a shell; set data.allow_pipe: true if you trust the recipe"
                )
        raise DataError(f"{shown(url)}: {scheme}:// cannot be read; use a path, https://, s3:// or gs://")


def _agree(a: Version, b: Version) -> bool:
    return (a.size is None or b.size is None or a.size == b.size) and (not a.tag or not b.tag or a.tag == b.tag)
