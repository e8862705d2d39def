"""How remote calls end, both over gRPC and over a Unix socket between two processes of one machine.

This module never imports gRPC. As long as gRPC is not imported, no call over it can have failed.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["END", "CallError", "call_errors", "is_end", "status_of"]

END = object()
"""What reading returns when the other side sends no more messages."""


class CallError(Exception):
    """A call over a Unix socket failed.

    Args:
        status: The name of a gRPC status code.
        why: The reason as text.
    """

    def __init__(self, status: str, why: str = "") -> None:
        super().__init__(why)
        self.status = status
        self.why = why

    def code(self) -> str:
        """Return the name of the status."""
        return self.status

    def details(self) -> str:
        """Return the reason as text."""
        return self.why


def call_errors(*others: type[BaseException]) -> tuple[type[BaseException], ...]:
    """Return the exceptions that failed calls raise, together with ``others``."""
    grpc = sys.modules.get("grpc.aio")
    return (CallError, *others) if grpc is None else (CallError, grpc.AioRpcError, *others)


def status_of(error: BaseException) -> str:
    """Return the name of the status of a call that raised one of ``call_errors()``."""
    code: Any = error.code()  # type: ignore[attr-defined]
    return code if isinstance(code, str) else str(code.name)


def is_end(message: object) -> bool:
    """Return whether a read has returned the end of the messages."""
    if message is END:
        return True
    grpc = sys.modules.get("grpc.aio")
    return grpc is not None and message is grpc.EOF
