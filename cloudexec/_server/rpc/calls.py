"""Functions that all methods use: to find the session, to read a message, to end a failed call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from cloudexec._server.service import Service
from cloudexec._wire.channel import TOKEN_KEY

__all__ = ["LARGEST_BLOB", "LONGEST", "abort", "lenient", "read", "session_of"]

LARGEST_BLOB = 1 << 48
LONGEST = 1e9
"""Seconds that the tasks of one message may have run together; more is malformed."""


async def read(context: Any) -> Any:
    """Read a message, or the mark that the peer sends no more.

    Raises:
        ConnectionError: If the connection failed.
    """
    try:
        return await context.read()
    except Exception as exc:
        raise ConnectionError(str(exc)) from exc


async def abort(context: Any, status: str, why: str) -> None:
    """End a call with an error.

    Args:
        context: The call.
        status: The name of a gRPC status code.
        why: The message for the peer.
    """
    if not getattr(context, "is_plain", False):
        import grpc

        await context.abort(grpc.StatusCode[status], why)
    await context.abort(status, why)


def lenient(kind: type[Message]) -> Callable[[bytes], Message | None]:
    """Return a function that parses a request, and returns ``None`` for bytes that are none."""

    def parse(data: bytes) -> Message | None:
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return parse


def session_of(service: Service, context: Any) -> Any:
    """Return the session that a call belongs to, by its token, or ``None``."""
    metadata = dict(context.invocation_metadata() or ())
    token = metadata.get(TOKEN_KEY, b"")
    return service.session_of(token) if isinstance(token, bytes) else None
