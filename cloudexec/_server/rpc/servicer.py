"""Serves the call ``Session``: enrols a worker, and exchanges messages until either side ends."""

from __future__ import annotations

import asyncio
from typing import Any

from google.protobuf.message import DecodeError

from cloudexec._log import Log
from cloudexec._rpc import is_end
from cloudexec._server.rpc.calls import read
from cloudexec._server.rpc.enrolment import Enrolment
from cloudexec._server.rpc.inspection import parse
from cloudexec._server.rpc.session import WorkerSession
from cloudexec._server.rpc.transfers import Transfers
from cloudexec._server.service import Service

__all__ = ["Servicer"]

_logger = Log()


class Servicer:
    """The methods that workers call: ``session``, and those of ``transfers``.

    Args:
        service: The executor, as its workers' calls see it.
    """

    def __init__(self, service: Service) -> None:
        self.transfers = Transfers(service)
        self._service = service
        self._enrolment = Enrolment(service)

    async def session(self, _: Any, context: Any) -> None:
        """Enrol a worker, then exchange messages with it until either side ends."""
        session = await self._enrolment.enrol(context)
        if session is not None:
            await self._converse(session, context)

    async def _converse(self, session: WorkerSession, context: Any) -> None:
        """Exchange messages with a worker over one connection, until either side ends it."""
        service = self._service
        reading = asyncio.current_task()
        assert reading is not None
        if session.is_closed:
            return
        if session.attach(reading):
            service.workers.reconnected(session)
        if getattr(context, "is_plain", False):
            session.go_straight(context.frames)
        sending = service.portal.loop.create_task(session.send(context))
        deaf: list[ValueError] = []

        def sent(done: asyncio.Task[None]) -> None:
            # If nothing can be sent to the worker any more, do not wait for its messages either.
            if not done.cancelled():
                error = done.exception()
                if isinstance(error, ValueError):
                    deaf.append(error)
                reading.cancel()

        sending.add_done_callback(sent)
        reason, cut = "its connection was cut", True
        # On this machine, what a process has sent is read also if it was killed.
        unheard = not service.direct_path
        try:
            while not is_end(data := await read(context)):
                message = parse(data)
                if not session.is_news(message):
                    continue
                if message.goodbye:
                    reason, cut, unheard = "it has ended", False, False
                if message.HasField("results") and message.results.blobs:
                    await session.results.await_files(message)
                    await session.results.spill(message)
                session.take(message)
        except (asyncio.CancelledError, ConnectionError):
            if deaf:
                reason, cut = f"it did not take what was sent: {deaf[0]}", False
                unheard = True
                service.refused("malformed message", f"{session.worker_id} is cut off: {reason}")
        except (ValueError, IndexError, DecodeError) as exc:
            reason, cut, unheard = f"it sent a malformed message: {exc}", False, True
            service.refused("malformed message", f"{session.worker_id} is cut off: {reason}")
        except Exception as exc:
            reason, cut = f"what it sent could not be taken ({type(exc).__name__}: {exc})", False
            unheard = True
            _logger.exception("internal error with a message from %s", session.worker_id)
        finally:
            sending.cancel()
            if session.is_read_by(reading):  # otherwise a newer connection has taken over
                session.detach()
                service.workers.disconnected(session, reason, cut=cut, unheard=unheard)
