"""What a reader and its decode workers say to each other: a value in JSON, and bytes that go with it."""

import json
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

_LENGTHS = struct.Struct("<II")  # of the JSON, and of all that follows it


def send(connection: socket.socket, value: Any, payload: Sequence[bytes] = ()) -> None:
    """Send a message whole.

    Raises:
        OSError: the other side is gone, or does not take it in the socket's time.
    """
    text = json.dumps(value, separators=(",", ":")).encode()
    lengths = _LENGTHS.pack(len(text), sum(map(len, payload)))
    parts: deque[bytes | memoryview] = deque((lengths, text, *payload))
    while parts:
        sent = connection.sendmsg(parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.popleft())
        if sent:
            parts[0] = memoryview(parts[0])[sent:]


def receive(connection: socket.socket) -> tuple[Any, memoryview]:
    """The next message: its value and all its bytes, end to end.

    Raises:
        EOFError: the other side has closed the connection.
        OSError: it says nothing in the socket's time.
    """
    length, following = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size))
    return json.loads(_exactly(connection, length)), memoryview(_exactly(connection, following))


def _exactly(connection: socket.socket, count: int) -> bytearray:
    buffer, filled = bytearray(count), 0
    while filled < count:
        got = connection.recv_into(memoryview(buffer)[filled:], count - filled, socket.MSG_WAITALL)
        if not got:
            raise EOFError("the connection was closed")
        filled += got
    return buffer
