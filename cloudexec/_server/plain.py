"""The server for workers that this process has started on this machine: no gRPC is needed.

It serves the same methods over a Unix socket, with the frames of ``_plain``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

from cloudexec import _plain_json
from cloudexec._plain import (
    CALL,
    DONE,
    MESSAGE,
    METADATA,
    STATUS,
    Frames,
    pack_metadata,
    unpack_metadata,
)
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._rpc import END, CallError
from cloudexec._server.rpc.calls import lenient
from cloudexec._server.rpc.servicer import Servicer
from cloudexec._server.service import Service
from cloudexec._wire.channel import TOKEN_KEY, pack_chunk, unpack_chunk

__all__ = ["start_plain_server"]

_FIRST_WORD = 10.0
"""Seconds within which a connection must name the method that it calls."""


class _Context:
    """One call, as its handler sees it, with the used part of ``grpc.aio.ServicerContext``."""

    is_plain = True

    def __init__(self, frames: Frames, metadata: dict[str, Any], pack: Any, unpack: Any) -> None:
        self.frames = frames
        self._metadata = metadata
        self._pack = pack
        self._unpack = unpack

    def peer(self) -> str:
        return "unix:"

    def invocation_metadata(self) -> list[tuple[str, Any]]:
        return list(self._metadata.items())

    async def send_initial_metadata(self, metadata: Any) -> None:
        await self.frames.send(METADATA, pack_metadata(metadata))

    async def read(self) -> Any:
        kind, data = await self.frames.receive()
        if kind == MESSAGE:
            return data if self._unpack is None else self._unpack(data)
        if kind == DONE:
            return END
        raise ConnectionError("it sent what has no place here")

    async def write(self, message: Any) -> None:
        await self.frames.send(MESSAGE, self._pack(message))

    async def abort(self, status: str, why: str = "") -> None:
        raise CallError(status, why)

    async def messages(self) -> AsyncIterator[Any]:
        """Yield messages until the peer has sent its last one."""
        while (message := await self.read()) is not END:
            yield message


class PlainServer:
    """Accepts connections, each for one call, and serves each in a task of its own."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._servicer = Servicer(service)
        self._server: asyncio.Server | None = None
        self._serving: dict[asyncio.Task[None], Frames] = {}

    async def start(self, path: str) -> None:
        """Start listening on a Unix socket."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: Frames(self._made), path, backlog=4096)
        os.chmod(path, 0o600)

    def _made(self, frames: Frames) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(frames))
        self._serving[task] = frames
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._serving.pop(task).close()
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a call of a worker could not be served", "exception": error}
            )

    async def _serve(self, frames: Frames) -> None:
        with contextlib.suppress(ConnectionError):
            try:
                async with asyncio.timeout(_FIRST_WORD):
                    kind, data = await frames.receive()
                await self._call(frames, kind, data)
                status = "OK"
            except TimeoutError:
                status = "DEADLINE_EXCEEDED no call was made"
            except CallError as exc:
                status = f"{exc.status} {exc.why}"
            await frames.send(STATUS, status.encode())

    async def _call(self, frames: Frames, kind: int, data: bytes) -> None:
        service, servicer = self._service, self._servicer
        try:
            method, told = _plain_json.decode(data) if kind == CALL else ("", b"")
            metadata = unpack_metadata(told)
        except (ValueError, TypeError, RecursionError):
            raise CallError("INVALID_ARGUMENT", "this is no call") from None
        if method.endswith("/Session"):
            pack = pb.ServerMessage.SerializeToString
            await servicer.session(None, _Context(frames, metadata, pack, None))
            return
        token = metadata.get(TOKEN_KEY)
        if not isinstance(token, bytes) or service.session_of(token) is None:
            service.refused("no session", "a process here has no session, or has it no more")
            raise CallError("UNAUTHENTICATED", "unknown session")
        if method.endswith("/Fetch"):
            context = _Context(frames, metadata, pack_chunk, lenient(pb.FetchRequest))
            async for chunk in servicer.transfers.fetch(await context.read(), context):
                await context.write(chunk)
        elif method.endswith("/Deliver"):
            pack = pb.DeliverReply.SerializeToString
            context = _Context(frames, metadata, pack, unpack_chunk)
            await context.write(await servicer.transfers.deliver(context.messages(), context))
        else:
            service.refused("unknown method", "a peer called a method that there is none of")
            raise CallError("UNIMPLEMENTED", "no such method")

    async def stop(self, grace: float | None = None) -> None:
        """Accept no more connections, and close the open ones."""
        if self._server is not None:
            self._server.close()
        serving = dict(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        for frames in serving.values():
            frames.abort()


async def start_plain_server(service: Service, path: str) -> PlainServer:
    """Start a server on a Unix socket.

    Raises:
        LaunchError: If it cannot listen there.
    """
    from cloudexec._errors import LaunchError

    server = PlainServer(service)
    try:
        await server.start(path)
    except OSError as exc:
        raise LaunchError(f"cannot listen on {path}: {exc}") from exc
    return server
