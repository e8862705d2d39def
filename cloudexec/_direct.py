"""The direct channel: large payloads between client and slot on one machine, past gRPC.

Workers on the client's own machine reach it through a Unix socket in a private directory. Beside
that one lies a second socket for what is best not left in a file: a slot connects, names the
session's token and a blob, or the lease of a result, and then bytes flow between the user's object
in the one process and the object being made in the other, with the kernel's copy in and out as the
only ones.
"""

from __future__ import annotations

import socket
import struct

from cloudexec._descriptors import too_many_files
from cloudexec._errors import PayloadError

__all__ = ["ACCEPTED", "DELIVER", "FETCH", "REQUEST", "fill_from", "receive_exactly"]

REQUEST = struct.Struct("<16sBQ")
"""Token of the session, what is wanted, and of which blob, lease's result, or shared file."""
FETCH, DELIVER, FILE = 1, 2, 3
ACCEPTED = b"\x06"
BUFFER_BYTES = 4 * 1024 * 1024


def fill_from(connection: socket.socket, target: memoryview) -> None:
    """Fill a buffer from a socket.

    Raises:
        EOFError: If the peer closed it before that.
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
    """Read ``size`` bytes; the errors are those of ``fill_from``."""
    data = bytearray(size)
    fill_from(connection, memoryview(data))
    return bytes(data)


def connect(path: str, token: bytes, wanted: int, number: int) -> socket.socket:
    """Connect to the client's direct channel and say what for.

    Raises:
        OSError: If it is gone.
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
