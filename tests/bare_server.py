"""A gRPC server for workers' sessions whose messages are plain bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

__all__ = ["serve_sessions"]


def serve_sessions(
    path: Path | str,
    session: Callable[[Iterator[bytes], Any], Iterator[bytes]],
    fetch: Callable[[bytes, Any], Iterator[bytes]] | None = None,
) -> grpc.Server:
    """Serve sessions, and fetches of blobs, on a Unix socket; all messages are plain bytes."""
    methods = {"Session": grpc.stream_stream_rpc_method_handler(session)}
    if fetch is not None:
        methods["Fetch"] = grpc.unary_stream_rpc_method_handler(fetch)
    handler = grpc.method_handlers_generic_handler("cloudexec.v1.TaskServer", methods)
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    return server
