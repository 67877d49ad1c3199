"""Files behind HTTP, by ranges, whatever the server makes of them."""

import netrc
import os
import re
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import urllib3

from pipelines.errors import DataError
from pipelines.sources.addresses import shown
from pipelines.sources.backends import CHUNK, AbsentError, Version

_BUSY = {408, 425, 429}  # with every 5xx: try again


class Http:
    """http:// and https://, with proxies and ~/.netrc."""

    def __init__(self, timeout: float, connections: int) -> None:
        self._options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=timeout, read=timeout),
            "maxsize": connections,
            "retries": urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
        }

    def open(
        self,
        url: str,
        first: int,
        last: int | None,
        known: Version | None,
        signed: Mapping[str, str] | None = None,
    ) -> tuple[Version, Iterator[bytes]]:
        """As of a `Backend`; `signed` are headers in place of what the address and ~/.netrc know."""
        headers = {"Accept-Encoding": "identity", **(_credentials(url) if signed is None else signed)}
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
                    if not (data := response.read1(CHUNK)):
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


def _credentials(url: str) -> dict[str, str]:
    user = urlsplit(url).netloc.rpartition("@")[0]
    return urllib3.make_headers(basic_auth=unquote(user)) if user else _of_netrc(urlsplit(url).hostname or "")


@lru_cache(maxsize=64)
def _of_netrc(host: str) -> dict[str, str]:
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
