"""Runs one worker from its first connection to its end, and decides why and how it ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import traceback
from typing import Any

from cloudexec import _enrolment, _plain_json
from cloudexec._errors import LaunchError
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._rpc import call_errors
from cloudexec.worker.blobs import BlobCache, room
from cloudexec.worker.dialing import Address, ClientGoneError, dial
from cloudexec.worker.inbox import introduce
from cloudexec.worker.session import Session
from cloudexec.worker.slots import Settings
from cloudexec.worker.supervisor import SlotPool

__all__ = ["run_worker"]

_WHY = {
    "drain": "the client told it to, when it is done",
    "terminate": "the client told it to, at once",
    "sigterm": "its platform told it to (SIGTERM); what does not finish in time is handed back",
    "closed": "the client closed the connection",
    "disconnected": "the connection to the client was lost",
    "orphaned": "the client is gone",
    "gone": "the client has given it up",
    "zygote": "the process that forks its slots was killed",
    "bug": "an internal error",
}
_HAND_OVER = 30.0
"""Seconds that a worker without tasks waits for the client to take the results that it keeps."""
_COME_BACK = 5.0
"""Seconds that a worker which its platform ends waits for a client that is not connected."""
_ENROLS = 1.0
"""Seconds in which the answer to a worker that asks to be let in may come when its platform ends
it: the client may have let it in already."""


async def run_worker(address: Address, zygote: socket.socket) -> bool:
    """Connect and serve until the worker is told to stop, or the client is gone.

    Returns:
        Whether the platform, not the client, told the worker to stop (SIGTERM).

    Raises:
        ClientGoneError: If the client cannot be reached.
        LaunchError: If this worker cannot go on for another reason.
        ProtocolError: If either side refuses the other.
    """
    loop = asyncio.get_running_loop()
    if address.log:
        from importlib.metadata import version

        address.say(
            f"cloudexec {version('cloudexec')}, Python {_enrolment.python_version()}, "
            f"{address.slots} slot{'s' * (address.slots != 1)}; dialing {address.shown}"
        )
    session = Session(address)
    ends: asyncio.Queue[str] = asyncio.Queue()
    told = asyncio.Event()

    def on_sigterm() -> None:
        ends.put_nowait("sigterm")
        told.set()

    # From here on, as the client may give this worker tasks before this process knows that it is
    # enrolled. They are handed back then.
    loop.add_signal_handler(signal.SIGTERM, on_sigterm)
    if not await _enrolled(address, session, told):
        return True
    address.say(f"enrolled as {session.welcome.worker_id}")
    modules = ""
    if session.welcome.modules:
        try:
            modules = await session.fetch_modules()
        except call_errors(asyncio.InvalidStateError) as exc:
            await session.close()
            raise LaunchError(f"the client's modules could not be fetched: {exc}") from exc
    welcome = session.welcome
    blobs = BlobCache(
        session.load_blob,
        room(address.memory_mib, welcome.blob_memory),
        lambda: pool.blobs_in_use(),
        direct=bool(welcome.direct_path),
    )
    pool = SlotPool(
        _settings(welcome, address, modules),
        session.outbox,
        zygote,
        lambda: ends.put_nowait("zygote"),
        blobs,
    )
    session.attach(pool, blobs)
    pool.add_functions(welcome.functions)
    introduce(blobs, welcome.initializer_blobs)
    introduce(blobs, welcome.function_blobs)

    async def reclaim() -> None:
        await told.wait()
        if address.drain_grace is not None:
            loop.call_later(address.drain_grace, pool.reclaim, address.session)

    def on_bug(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # A callback has failed, so this process is in an unknown state. It ends, and the client
        # runs its tasks on other workers.
        loop.default_exception_handler(context)
        ends.put_nowait("bug")

    loop.set_exception_handler(on_bug)

    async def watch_client() -> None:
        while address.client is not None:
            await asyncio.sleep(1.0)
            if address.client.is_gone():
                ends.put_nowait("orphaned")

    async def converse() -> None:
        why = "bug"
        try:
            why = await session.converse(ends)
        except Exception:
            traceback.print_exc()
        finally:
            ends.put_nowait(why)  # also after an exception, as nothing else ends this process

    background = [
        loop.create_task(converse()),
        loop.create_task(session.beat()),
        loop.create_task(watch_client()),
        loop.create_task(reclaim()),
    ]
    asked = reclaimed = False
    lost = ""
    try:
        why = await ends.get()
        address.say(f"ends: {_WHY.get(why, why)}")
        asked = why in ("drain", "sigterm", "terminate")
        reclaimed = why == "sigterm"
        if why in ("drain", "sigterm"):
            session.outbox.start_draining()
            pool.drain()
            why = await _first(pool.idle, ends)
        if why == "idle":
            # The client first takes the results that are kept here.
            is_alone = reclaimed and not session.is_connected
            most = _COME_BACK if is_alone else address.drain_grace or _HAND_OVER
            why = await _first(blobs.all_claimed, ends, most)
        if why == "idle":
            pool.stop(kill=False)
            why = await _first(pool.stopped, ends)
        if why == "idle":
            background.append(loop.create_task(session.flush()))
            why = await _last_words(session, ends, presses=reclaimed)
        if why != "idle":
            pool.stop(kill=True)
            if why == "bug" or (why in ("disconnected", "orphaned", "gone") and not asked):
                lost = why
            if why == "zygote":
                pool.kill_groups()
                raise LaunchError("the process that forks the slots was killed")
            async with asyncio.timeout(5.0):
                await pool.stopped.wait()
    except call_errors(TimeoutError, asyncio.InvalidStateError):
        pass  # the client is gone, so nobody needs these messages
    finally:
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        pool.close()
        blobs.close()
        await session.close()
        if modules:
            shutil.rmtree(modules, ignore_errors=True)
        scheme, _, path = address.target.partition(":")
        if scheme in ("unix", "plain") and address.client is not None and not asked:
            # A client that was killed cannot remove its socket's directory, so this does. Its
            # connections end an instant before the process does, so wait for that.
            for _ in range(20):
                if address.client.is_gone():
                    shutil.rmtree(os.path.dirname(path), ignore_errors=True)
                    break
                await asyncio.sleep(0.05)
    if lost == "bug":
        raise LaunchError("it ends after an internal error")
    if lost:
        kind = LaunchError if lost == "gone" else ClientGoneError
        raise kind("the connection to the client was lost")
    return reclaimed


async def _enrolled(address: Address, session: Session, told: asyncio.Event) -> bool:
    """Dial until this worker is enrolled; return false if its platform ends it before that.

    Raises:
        Exception: As ``dial``.
    """
    asks = False

    async def enrol(channel: Any) -> None:
        nonlocal asks
        asks = True
        try:
            await session.enrol(channel)
        finally:
            asks = False

    dialing = asyncio.ensure_future(dial(address, enrol, address.patience))
    telling = asyncio.ensure_future(told.wait())
    both: set[asyncio.Future[Any]] = {dialing, telling}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not dialing.done() and asks:
            await asyncio.wait({dialing}, timeout=_ENROLS)
        if dialing.done():
            dialing.result()
        return dialing.done()
    finally:
        telling.cancel()
        dialing.cancel()
        await asyncio.gather(telling, dialing, return_exceptions=True)


async def _last_words(session: Session, ends: asyncio.Queue[str], *, presses: bool) -> str:
    """Wait until the client has received all messages.

    Args:
        session: The session with the client.
        ends: Reasons to end at once.
        presses: Whether the platform will kill this process soon, so that it does not wait for a
            client that is gone.
    """
    while True:
        why = await _first(session.flushed, ends, _COME_BACK if presses else None)
        if why != "idle" or session.flushed.is_set() or not session.is_connected:
            return why


async def _first(event: asyncio.Event, ends: asyncio.Queue[str], most: float | None = None) -> str:
    """Wait for an event, at most for a time, or for a reason to end at once.

    Returns:
        The reason; ``"idle"`` after the event or the time.
    """
    waiting = asyncio.ensure_future(event.wait())
    ending = asyncio.ensure_future(ends.get())
    loop = asyncio.get_running_loop()
    timer = None if most is None else loop.call_later(most, waiting.cancel)
    try:
        while True:
            await asyncio.wait({waiting, ending}, return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                why = ending.result()
                if why not in ("drain", "sigterm"):
                    return why
                ending = asyncio.ensure_future(ends.get())
            if waiting.done():
                return "idle"
    finally:
        if timer is not None:
            timer.cancel()
        waiting.cancel()
        ending.cancel()


def _settings(welcome: pb.Welcome, address: Address, modules: str) -> Settings:
    return Settings(
        slots=address.slots,
        cwd=welcome.cwd,
        sys_path=tuple(welcome.sys_path),
        argv=tuple(welcome.argv),
        settings=welcome.settings,
        initializer=welcome.initializer,
        initializer_blobs=tuple(blob.id for blob in welcome.initializer_blobs),
        initializer_needs=welcome.initializer_needs,
        main=dict(welcome.main),
        max_tasks_per_child=welcome.max_tasks_per_child,
        min_slots=welcome.min_slots,
        idle_timeout=welcome.idle_timeout,
        direct_path=welcome.direct_path,
        token=welcome.session_token,
        authkey=welcome.authkey,
        depth=welcome.depth,
        memory_mib=address.memory_mib,
        modules=modules,
        number=int(address.identity) if address.identity.isdigit() else 1,
        client_pid=0 if address.client is None else address.client.pid,
        inheritance=_plain_json.decode(welcome.inheritance or b"{}"),
    )
