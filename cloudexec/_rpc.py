"""How remote calls end, whatever carries them: gRPC, or a plain socket between two processes here.

gRPC is never imported for this: where nothing has come over it, nothing can have failed there.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["END", "CallError", "call_errors", "is_end", "status_of"]

END = object()
"""What is read when the other side has said all that it had to say."""


class CallError(Exception):
    """A call over a plain socket failed.

    Args:
        status: The name of a gRPC status code.
        why: For people.
    """

    def __init__(self, status: str, why: str = "") -> None:
        super().__init__(why)
        self.status = status
        self.why = why

    def code(self) -> str:
        """Return the name of the status."""
        return self.status

    def details(self) -> str:
        """Say why."""
        return self.why


def call_errors(*others: type[BaseException]) -> tuple[type[BaseException], ...]:
    """Return what calls raise that fail, and others."""
    grpc = sys.modules.get("grpc.aio")
    return (CallError, *others) if grpc is None else (CallError, grpc.AioRpcError, *others)


def status_of(error: BaseException) -> str:
    """Return the name of the status of a call that raised one of ``call_errors()``."""
    code: Any = error.code()  # type: ignore[attr-defined]
    return code if isinstance(code, str) else str(code.name)


def is_end(message: object) -> bool:
    """Whether what was read says that nothing more comes."""
    if message is END:
        return True
    grpc = sys.modules.get("grpc.aio")
    return grpc is not None and message is grpc.EOF
