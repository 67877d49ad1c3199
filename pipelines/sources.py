"""Files by address: local paths, http(s)://, s3://, gs:// and, where allowed, the output of a command.

A read is cut into parts of bounded size, several at a time. A part that stalls, drops or is refused for now is resumed
where it broke off, after a delay that doubles; after a fixed number of tries the read ends in `TransientError`. What a
server says about the object itself (not there, of another size, changed meanwhile) is told apart from that, since only
it may change what a batch holds.

    data/train                              a folder
    https://host/data/train                 read by ranges; credentials come from ~/.netrc
    s3://bucket/data/train                  by Arrow; AWS_* variables, AWS_ENDPOINT_URL for other servers
    gs://bucket/data/train                  by Arrow; application default credentials
    pipe:ssh host cat /data/train/{name}    a shell command, {name} becomes a file's name
"""

import contextlib
import logging
import netrc
import os
import re
import shlex
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import urllib3

from pipelines.errors import DataError, TransientError
from pipelines.object_stores import object_store

__all__ = ["AbsentError", "ChangedError", "Sources", "Version", "join", "local_path", "shown"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK = 2**18
_SLOWEST = 2**15  # bytes a second: a part that comes slower than this has stalled
_BUSY = {408, 425, 429}  # with every 5xx: try again


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


class _Backend(Protocol):
    def open(self, url: str, first: int, last: int | None, known: Version | None) -> tuple[Version, Iterator[bytes]]:
        """Bytes [first, last) of a file (`last` None: to its end), in pieces, and its version."""


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
        self._backends: dict[str, _Backend] = {}
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
                problem = _without_secrets(str(error) or type(error).__name__)
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
            for piece in pieces:
                content.extend(piece)
                if time.monotonic() - begin > self._timeout + len(content) / _SLOWEST:
                    raise TimeoutError(f"stalled after {len(content)} bytes")
            end = version.size if last is None else last if version.size is None else min(last, version.size)
            if end is not None and first + len(content) < end:
                raise ConnectionError(f"broke off after {len(content)} of {end - first} bytes")

        self.retried(url, attempt)
        assert version is not None
        return version, bytes(content)

    def _backend(self, url: str) -> _Backend:
        scheme = _scheme(url)
        with self._lock:
            if scheme not in self._backends:
                self._backends[scheme] = self._made(scheme, url)
            return self._backends[scheme]

    def _made(self, scheme: str, url: str) -> _Backend:
        match scheme:
            case "file":
                return _Local()
            case "http" | "https":
                return _Http(self._timeout, self._connections)
            case "s3" | "gs":
                return _Arrow(scheme, self._timeout)
            case "pipe" if self._allow_pipe:
                return _Pipe(self._timeout)
            case "pipe":
                raise DataError(
                    f"{shown(url)}: it runs a command in a shell; set data.allow_pipe: true if you trust the recipe"
                )
        raise DataError(f"{shown(url)}: {scheme}:// cannot be read; use a path, https://, s3:// or gs://")


# --- addresses -----------------------------------------------------------------------------------------------------


def join(folder: str, name: str) -> str:
    """The address of a file in a folder."""
    scheme = _scheme(folder)
    if scheme == "pipe":
        return folder.replace("{name}", shlex.quote(name))
    if scheme in ("http", "https"):
        parts = urlsplit(folder)  # what signs the folder (a query) signs its files
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    return f"{folder.rstrip('/')}/{name}"


def local_path(url: str) -> Path | None:
    """Where a file of this machine lies; None for the address of something else."""
    if _scheme(url) != "file":
        return None
    return Path(unquote(urlsplit(url).path) if url.startswith("file:") else url)


def shown(url: str) -> str:
    """An address as it may stand in messages: without user, password, query and arguments."""
    if _scheme(url) == "pipe":
        return f"{url.split()[0]} ..."
    if _scheme(url) == "file":
        return url
    parts = urlsplit(url)
    query = "..." if parts.query else ""
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


def _scheme(url: str) -> str:
    scheme, colon, _ = url.partition(":")
    if scheme == "pipe" and colon:
        return scheme
    return scheme.lower() if "://" in url else "file"


def _without_secrets(text: str) -> str:
    """Libraries put whole addresses into their messages."""
    return re.sub(r"(?<=//)[^/\s@]+@", "", re.sub(r"\?[^\s'\")]+", "?...", text))


def _agree(a: Version, b: Version) -> bool:
    return (a.size is None or b.size is None or a.size == b.size) and (not a.tag or not b.tag or a.tag == b.tag)


# --- where files lie -----------------------------------------------------------------------------------------------


class _Local:
    def open(self, url: str, first: int, last: int | None, known: Version | None) -> tuple[Version, Iterator[bytes]]:
        path = local_path(url)
        assert path is not None
        file = path.open("rb")
        status = os.fstat(file.fileno())
        file.seek(first)
        return Version(status.st_size, str(status.st_mtime_ns)), _pieces(file.read, last and last - first, file.close)


class _Http:
    def __init__(self, timeout: float, connections: int) -> None:
        self._options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=timeout, read=timeout),
            "maxsize": connections,
            "retries": urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
        }

    def open(self, url: str, first: int, last: int | None, known: Version | None) -> tuple[Version, Iterator[bytes]]:
        user = urlsplit(url).netloc.rpartition("@")[0]
        headers = {"Accept-Encoding": "identity"}
        headers |= (
            urllib3.make_headers(basic_auth=unquote(user)) if user else _credentials(urlsplit(url).hostname or "")
        )
        if ranged := first > 0 or last is not None:
            headers["Range"] = f"bytes={first}-{'' if last is None else last - 1}"
            # A changed file then comes whole and with its new tag, which the caller compares.
            if known is not None and known.tag.startswith('"'):
                headers["If-Range"] = known.tag
        address = urlunsplit(urlsplit(url)._replace(netloc=urlsplit(url).netloc.rpartition("@")[2]))
        response = self._pool(address).request("GET", address, headers=headers, preload_content=False)
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        if response.status == 416:  # the file ends before `first`
            response.close()
            return Version(_total(response), tag), iter(())
        try:
            skip = self._checked(response, url, first, last, ranged)
        except BaseException:
            response.close()
            raise

        def pieces() -> Iterator[bytes]:
            wanted = None if last is None else last - first
            left = skip
            whole = False
            try:
                while wanted is None or wanted > 0:
                    if not (data := response.read1(_CHUNK)):
                        whole = True
                        break
                    drop = min(left, len(data))
                    left -= drop
                    # A server without ranges sends what is not wanted too; an empty piece lets the caller see the time.
                    data = data[drop:] if wanted is None else data[drop : drop + wanted]
                    wanted = None if wanted is None else wanted - len(data)
                    yield data
            finally:
                if whole or (wanted == 0 and response.status == 206):
                    response.release_conn()
                else:
                    response.close()

        return Version(_total(response), tag, response.status == 206 or not ranged), pieces()

    def _checked(self, response: Any, url: str, first: int, last: int | None, ranged: bool) -> int:
        """How many bytes of the answer come before `first`."""
        status = response.status
        if status in (404, 410):
            raise AbsentError(f"{shown(url)}: not there (HTTP {status})")
        if status in _BUSY or status >= 500:
            raise ConnectionError(f"HTTP {status}")
        if status == 200:
            return first
        if status == 206 and ranged:
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            if not match or int(match[1]) != first or (last is not None and int(match[2]) >= last):
                raise ConnectionError(f"asked for bytes from {first}, got {response.headers.get('Content-Range')!r}")
            return 0
        raise DataError(f"{shown(url)}: HTTP {status}; check the address and the right to read it")

    def _pool(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and not urllib.request.proxy_bypass(parts.netloc):
            return self._proxied(proxy)
        return self._direct

    @cached_property
    def _direct(self) -> urllib3.PoolManager:
        return urllib3.PoolManager(**self._options)

    @cached_property
    def _proxied(self) -> Callable[[str], urllib3.PoolManager]:
        return lru_cache(maxsize=4)(lambda proxy: urllib3.ProxyManager(proxy, **self._options))


class _Arrow:
    """S3 and Google Cloud Storage, by pyarrow's clients; their own retries are off where they can be."""

    def __init__(self, scheme: str, timeout: float) -> None:
        self._made = lru_cache(maxsize=16)(lambda bucket: object_store(scheme, bucket, timeout=timeout))

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
                    f"{shown(url)}: refused ({_without_secrets(str(error))}); check the address and the credentials"
                ) from error
            raise
        return Version(info.size, str(info.mtime_ns or "")), iter([data])


class _Pipe:
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
            data = read(_CHUNK if wanted is None else min(_CHUNK, wanted))
            if not data:
                return
            wanted = None if wanted is None else wanted - len(data)
            yield data
    finally:
        close()


@lru_cache(maxsize=64)
def _credentials(host: str) -> dict[str, str]:
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return {}
    return urllib3.make_headers(basic_auth=f"{found[0]}:{found[2]}") if found else {}


def _total(response: Any) -> int | None:
    """The size of the file that an answer is about."""
    if response.status in (206, 416):
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        total = response.headers.get("Content-Length", "")
    return int(total) if total.isdecimal() else None
