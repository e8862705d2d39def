"""A server of sessions that is written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

__all__ = ["serve_sessions"]


def serve_sessions(
    path: Path | str, session: Callable[[Iterator[bytes], Any], Iterator[bytes]]
) -> grpc.Server:
    """Serve sessions on a Unix socket: what each side says is bytes."""
    handler = grpc.method_handlers_generic_handler(
        "cloudexec.v1.TaskServer", {"Session": grpc.stream_stream_rpc_method_handler(session)}
    )
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    return server
