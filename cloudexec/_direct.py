"""The direct channel: large payloads go between client and slot on one machine without gRPC.

Workers on the client's own machine reach the client through a Unix socket in a private directory.
The direct channel is a second socket in that directory. A slot (a process of a worker that runs one
task at a time) connects, sends the token of the worker's session, and names a blob (a large part of
a payload) or the lease of a result. Then the bytes flow from the user's object in one process to
the new object in the other. Only the kernel copies them, once in and once out.
"""

from __future__ import annotations

import socket
import struct

from cloudexec._descriptors import too_many_files
from cloudexec._errors import PayloadError

__all__ = ["ACCEPTED", "DELIVER", "FETCH", "REQUEST", "fill_from", "receive_exactly"]

REQUEST = struct.Struct("<16sBQ")
"""Token of the session, kind of the request, and number of the blob, lease or shared file."""
FETCH, DELIVER, FILE = 1, 2, 3
ACCEPTED = b"\x06"
BUFFER_BYTES = 4 * 1024 * 1024


def fill_from(connection: socket.socket, target: memoryview) -> None:
    """Fill a buffer from a socket.

    Raises:
        EOFError: If the peer closed the socket before the buffer was full.
        OSError: If the connection failed.
    """
    at = 0
    size = len(target)
    while at < size:
        n = connection.recv_into(target[at:])
        if not n:
            raise EOFError("the connection ended early")
        at += n


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Read ``size`` bytes; raises the same errors as ``fill_from``."""
    data = bytearray(size)
    fill_from(connection, memoryview(data))
    return bytes(data)


def connect(path: str, token: bytes, wanted: int, number: int) -> socket.socket:
    """Connect to the client's direct channel and send a request.

    Raises:
        OSError: If the client has closed the channel.
        PayloadError: If this process has too many files open.
    """
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as exc:
        why = f"the client could not be reached: {exc.strerror}{too_many_files(exc)}"
        raise PayloadError(why) from exc
    try:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        connection.connect(path)
        connection.sendall(REQUEST.pack(token, wanted, number))
    except OSError:
        connection.close()
        raise
    return connection
