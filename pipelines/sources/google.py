"""Google Cloud Storage, read by plain HTTP with the credentials of google-auth.

Not by Arrow's client: its files begin to download the whole object before each read of a part, and hold Python's lock
until the server answers.
"""

import os
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any
from urllib.parse import quote

import urllib3

from pipelines.errors import DataError
from pipelines.sources.addresses import shown
from pipelines.sources.backends import Version
from pipelines.sources.http import Http

_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"


class Google:
    """gs:// with application default credentials, or without any, for public buckets and emulators."""

    def __init__(self, http: Http) -> None:
        self._http = http
        self._lock = threading.Lock()

    def open(self, url: str, first: int, last: int | None, known: Version | None) -> tuple[Version, Iterator[bytes]]:
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        host = f"{'' if '://' in emulator else 'http://'}{emulator}" if emulator else "https://storage.googleapis.com"
        address = f"{host.rstrip('/')}/{quote(url.partition('://')[2])}"
        return self._http.open(address, first, last, known, {} if emulator else self._signed(url, address))

    def _signed(self, url: str, address: str) -> dict[str, str]:
        from google.auth import exceptions
        from google.auth.transport.urllib3 import Request

        headers: dict[str, str] = {}
        try:
            with self._lock:  # which refreshes them, once for all threads
                if self._credentials is not None:
                    asking = Request(urllib3.PoolManager())  # type: ignore[no-untyped-call]
                    self._credentials.before_request(asking, "GET", address, headers)
        except exceptions.TransportError as error:
            raise ConnectionError(f"no credentials from Google ({error})") from error
        except exceptions.GoogleAuthError as error:
            raise DataError(f"{shown(url)}: no credentials from Google ({error}); sign in, or name a key") from error
        return headers

    @cached_property
    def _credentials(self) -> Any:
        import google.auth

        try:
            return google.auth.default(scopes=[_SCOPE])[0]
        except google.auth.exceptions.DefaultCredentialsError:  # a public bucket needs none
            return None
