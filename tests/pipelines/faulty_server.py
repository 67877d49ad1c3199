"""An HTTP server with ranges, tags and, where a test asks for them, faults."""

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

Fault = Callable[[str, int], str]
"""From (file name, how often it was asked for before) to the fault of this answer, or an empty string."""


class FaultyServer:
    """Serves `files` by name.

    Faults: 4xx and 5xx codes, hang, reset, drop, drip, whole, wrong-range, lie (wrong bytes), flip (one byte),
    untagged.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.fault: Fault = lambda name, number: ""
        self.requests: list[tuple[str, str, int]] = []  # (name, Range header, status)
        self.headers: list[dict[str, str]] = []
        self.asked: Counter[str] = Counter()
        self.retagged = False  # the same files under other tags
        self.ended = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16  # head and body in one packet

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, address: object) -> None:
                pass  # a reader that hangs up

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._lock = threading.Lock()

    @classmethod
    def of(cls, folder: Path) -> Self:
        return cls({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/set"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.partition("?")[0].rpartition("/")[2]
        with self._lock:
            fault = self.fault(name, self.asked[name])
            self.asked[name] += 1
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        content = self.files.get(name)
        status, body = 200, content or b""
        tag = f'"{hashlib.md5(body).hexdigest()}{"-again" * self.retagged}"'
        headers = {} if fault == "untagged" else {"ETag": tag}
        asked = handler.headers.get("Range", "")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
        same = handler.headers.get("If-Range") in (None, tag)
        if fault.isdecimal():
            status, body = int(fault), b"no"
        elif content is None:
            status, body = 404, b""
        elif match and same and fault != "whole":
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            if first >= len(content):
                status, body, headers["Content-Range"] = 416, b"", f"bytes */{len(content)}"
            else:
                told = first + (-1 if first else 1) * (fault == "wrong-range")  # other bytes than were asked for
                status, body = 206, content[told : told + last + 1 - first]
                headers["Content-Range"] = f"bytes {told}-{told + len(body) - 1}/{len(content)}"
        if fault == "lie":
            body = bytes(byte ^ 1 for byte in body)
        if fault == "flip" and body:  # one byte in the middle: of a picture, mostly
            body = body[: (middle := len(body) // 2)] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        with self._lock:
            self.requests.append((name, asked, status))
        handler.close_connection = fault in ("hang", "reset", "drop", "drip")
        if fault == "hang":
            self.ended.wait(20)
            return
        if fault == "reset":
            return
        handler.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(key, value)
        handler.end_headers()
        if fault == "drip":  # a byte now and then: no socket time-out ever fires
            for byte in body:
                try:
                    handler.wfile.write(bytes([byte]))
                    handler.wfile.flush()
                except OSError:
                    return
                if self.ended.wait(0.02):
                    return
            return
        handler.wfile.write(body[: len(body) // 2] if fault == "drop" else body)
