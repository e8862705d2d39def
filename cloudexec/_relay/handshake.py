"""What the ends of a relay say to it first, and how they prove that they belong to the executor.

One line names the purpose and the executor, the relay answers with a nonce, and the proof is an
HMAC-SHA256 over both under the relay's key. No key travels, and a proof that somebody has recorded
is worth nothing under another nonce.
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
"""A client wants to be told of the workers that dial; the connection stays."""
ACCEPT = "accept"
"""A client takes the connection of one worker."""
TICKET = "ticket"
"""A worker wants to dial."""
LONGEST_LINE = 1024
"""Bytes that the relay reads of a stranger."""
_OPENING = re.compile(rf"{VERSION} ({REGISTER}|{ACCEPT}|{TICKET}) ([\w-]{{1,64}}) ?([\w-]{{0,64}})")


class RelayRefusedError(OSError):
    """The relay does not want us; the message says why."""


def relay_key(key: bytes) -> bytes:
    """Derive the relay's key from the one that client and workers share.

    The relay can check who belongs to the executor, and cannot pose as a worker or as the client.
    """
    return hmac.digest(key, b"cloudexec relay\0", "sha256")


def make_token() -> str:
    """Return a random word that cannot be guessed."""
    return secrets.token_urlsafe(24)


def proof(key: bytes, purpose: str, executor_id: str, argument: str, nonce: str) -> str:
    """Compute what shows that one knows the relay's key."""
    said = "\0".join([purpose, executor_id, argument, nonce]).encode()
    return hmac.new(key, said, hashlib.sha256).hexdigest()


def opening(purpose: str, executor_id: str, argument: str = "") -> str:
    """Return the first line that is said to the relay."""
    return f"{VERSION} {purpose} {executor_id} {argument}".rstrip()


def read_opening(line: str) -> tuple[str, str, str] | None:
    """Return purpose, executor and argument of a first line; ``None``: it is none."""
    found = _OPENING.fullmatch(line)
    return None if found is None else (found[1], found[2], found[3])


class Line:
    """A connection on which lines are said.

    Args:
        connection: A connected socket that does not block. Its owner closes it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rest = b""
        """What has come behind the last line that was read."""
        self._loop = asyncio.get_running_loop()

    async def say(self, text: str) -> None:
        """Send a line."""
        await self._loop.sock_sendall(self.connection, f"{text}\n".encode())

    async def read(self, end: bytes = b"\n") -> str:
        """Return what comes next, up to an end that is taken off.

        Raises:
            RelayRefusedError: If it is longer than any line of ours.
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
    """Say who we are, over a new connection to the relay.

    Args:
        line: The connection.
        key: The relay's.
        purpose: What the connection is for.
        executor_id: Which executor.
        argument: What belongs to the purpose: the worker whose connection is taken.

    Returns:
        What the relay gives: a ticket, or nothing.

    Raises:
        RelayRefusedError: If it refuses us.
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
