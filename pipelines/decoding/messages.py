"""What a reader and its decode workers say to each other: JSON. What they talk about lies in shared memory."""

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<I")


def send(connection: socket.socket, value: Any) -> None:
    """Send a message whole.

    Raises:
        OSError: the other side is gone, or does not take it in the socket's time.
    """
    text = json.dumps(value, separators=(",", ":")).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def receive(connection: socket.socket) -> Any:
    """The value of the next message.

    Raises:
        EOFError: the other side has closed the connection.
        OSError: it says nothing in the socket's time.
    """
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return json.loads(_exactly(connection, length))


def _exactly(connection: socket.socket, count: int) -> bytearray:
    buffer, filled = bytearray(count), 0
    while filled < count:
        got = connection.recv_into(memoryview(buffer)[filled:], count - filled, socket.MSG_WAITALL)
        if not got:
            raise EOFError("the connection was closed")
        filled += got
    return buffer
