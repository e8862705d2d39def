"""The first lines on a connection to a relay, and the proof that the peer belongs to the executor.

The peer's first line names the purpose and the executor, the relay answers with a nonce, and the
proof is an HMAC-SHA256 over all of these under the relay's key. The key itself is never sent, and a
recorded proof cannot be used again, because the nonce is another one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import socket

__all__ = [
    "ACCEPT",
    "LONGEST_LINE",
    "REGISTER",
    "TICKET",
    "Line",
    "RelayRefusedError",
    "greet",
    "make_token",
    "opening",
    "proof",
    "read_opening",
    "relay_key",
]

VERSION = "cloudexec-relay/1"
REGISTER = "register"
"""Purpose: a client registers, to be told of workers that dial; the connection stays open."""
ACCEPT = "accept"
"""Purpose: a client opens the connection that is joined with one worker's."""
TICKET = "ticket"
"""Purpose: a worker asks for a ticket, with which it can dial once."""
LONGEST_LINE = 1024
"""Bytes that a peer may send in one line."""
_OPENING = re.compile(rf"{VERSION} ({REGISTER}|{ACCEPT}|{TICKET}) ([\w-]{{1,64}}) ?([\w-]{{0,64}})")


class RelayRefusedError(OSError):
    """The relay refused the connection; the message says why."""


def relay_key(key: bytes) -> bytes:
    """Derive the relay's key from the key that client and workers share.

    With it, the relay can check who belongs to the executor, but cannot pose as a worker or client.
    """
    return hmac.digest(key, b"cloudexec relay\0", "sha256")


def make_token() -> str:
    """Return a random word that cannot be guessed."""
    return secrets.token_urlsafe(24)


def proof(key: bytes, purpose: str, executor_id: str, argument: str, nonce: str) -> str:
    """Compute the proof that a peer knows the relay's key."""
    said = "\0".join([purpose, executor_id, argument, nonce]).encode()
    return hmac.new(key, said, hashlib.sha256).hexdigest()


def opening(purpose: str, executor_id: str, argument: str = "") -> str:
    """Return the first line that a peer sends to the relay."""
    return f"{VERSION} {purpose} {executor_id} {argument}".rstrip()


def read_opening(line: str) -> tuple[str, str, str] | None:
    """Return the purpose, executor and argument of a first line; ``None`` if it is malformed."""
    found = _OPENING.fullmatch(line)
    return None if found is None else (found[1], found[2], found[3])


class Line:
    """A connection on which lines of text are exchanged.

    Args:
        connection: A connected socket that does not block. Its owner closes it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rest = b""
        """Bytes that were received behind the last line."""
        self._loop = asyncio.get_running_loop()

    async def say(self, text: str) -> None:
        """Send a line."""
        await self._loop.sock_sendall(self.connection, f"{text}\n".encode())

    async def read(self, end: bytes = b"\n") -> str:
        """Return the text up to the next ``end``, without it.

        Raises:
            RelayRefusedError: If it is longer than any line of the relay.
            ConnectionResetError: If the other side has closed the connection.
        """
        while end not in self.rest:
            if len(self.rest) > LONGEST_LINE:
                raise RelayRefusedError("it is no relay of cloudexec")
            data = await self._loop.sock_recv(self.connection, LONGEST_LINE)
            if not data:
                raise ConnectionResetError("the other side has closed the connection")
            self.rest += data
        line, _, self.rest = self.rest.partition(end)
        return line.decode("ascii", "replace").rstrip("\r")


async def greet(line: Line, key: bytes, purpose: str, executor_id: str, argument: str = "") -> str:
    """Name the purpose of a new connection to the relay, and prove that we belong to the executor.

    Args:
        line: The connection.
        key: The relay's key.
        purpose: The purpose of the connection.
        executor_id: The executor's id.
        argument: For ``ACCEPT``, the token of the worker's connection; otherwise empty.

    Returns:
        The relay's answer: a ticket for ``TICKET``, otherwise empty.

    Raises:
        RelayRefusedError: If the relay refuses the connection.
        OSError: If the connection fails.
    """
    await line.say(opening(purpose, executor_id, argument))
    nonce = await line.read()
    if nonce.startswith("no "):
        raise RelayRefusedError(nonce.removeprefix("no ")[:200])
    if not nonce.startswith("nonce "):
        raise RelayRefusedError("it is no relay of cloudexec")
    await line.say(proof(key, purpose, executor_id, argument, nonce.removeprefix("nonce ")))
    answer, _, given = (await line.read()).partition(" ")
    if answer != "ok":
        raise RelayRefusedError(given[:200] or "it is no relay of cloudexec")
    return given
