"""The client's end of a relay, a separate process that takes no time from the client.

The client starts it and writes the route, as one line of JSON, to its standard input. When that is
closed, the process ends. It reports the state of its registration as lines of JSON on its standard
output.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
from dataclasses import dataclass
from typing import Any

from cloudexec._relay.handshake import ACCEPT, REGISTER, Line, RelayRefusedError, greet
from cloudexec._relay.joining import join, prepare
from cloudexec._relay.proxies import ProxySettingError, connect, proxy_for

__all__ = ["Registration", "main"]

HEARTBEAT = 10.0
"""Seconds between two heartbeats. The relay answers each."""
SILENCE = 15.0
"""Seconds without an answer after which the connection counts as dead."""
CONNECT_TIMEOUT = 10.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two tries to register."""


@dataclass(frozen=True, slots=True)
class Route:
    """The two ends of a tunnel.

    Attributes:
        host: The relay's host.
        port: The relay's port.
        key: The relay's key, as hexadecimal digits.
        executor_id: The executor's id.
        target_host: The host on which the executor listens.
        target_port: The port on which the executor listens.
    """

    host: str
    port: int
    key: str
    executor_id: str
    target_host: str
    target_port: int

    def __repr__(self) -> str:
        return f"Route({self.host!r}, {self.port!r})"


class Registration:
    """Stays registered with a relay, and opens a connection for each worker that dials.

    Args:
        route: The two ends of the tunnel.
        tell: Called with each new state (``registered``, ``lost`` or ``refused``) and the reason.
    """

    def __init__(self, route: Route, tell: Any) -> None:
        self._route = route
        self._tell = tell
        self._key = bytes.fromhex(route.key)
        self._workers: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Register again and again, until this task is cancelled."""
        pause = _SHORTEST_PAUSE
        try:
            while True:
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT):
                        line = await self._connect(REGISTER)
                except OSError as exc:
                    is_refused = isinstance(exc, (RelayRefusedError, ProxySettingError))
                    self._tell("refused" if is_refused else "lost", _why(exc))
                else:
                    pause = _SHORTEST_PAUSE
                    self._tell("registered", "")
                    try:
                        await self._listen(line)
                    except OSError as exc:
                        self._tell("lost", _why(exc))
                    finally:
                        line.connection.close()
                # A random pause, so that many clients that lose one relay do not return at once.
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            for task in self._workers:
                task.cancel()
            await asyncio.gather(*self._workers, return_exceptions=True)

    async def _connect(self, purpose: str, argument: str = "") -> Line:
        route = self._route
        connection = await connect(route.host, route.port, proxy_for(route.host))
        try:
            prepare(connection)
            line = Line(connection)
            await greet(line, self._key, purpose, route.executor_id, argument)
        except BaseException:
            connection.close()
            raise
        return line

    async def _listen(self, line: Line) -> None:
        """Open a connection for each worker that the relay names."""
        loop = asyncio.get_running_loop()
        beating = loop.create_task(self._beat(line))
        try:
            while True:
                async with asyncio.timeout(SILENCE):
                    said = await line.read()
                what, _, token = said.partition(" ")
                if what == "open":
                    task = loop.create_task(self._take(token))
                    self._workers.add(task)
                    task.add_done_callback(self._workers.discard)
        finally:
            beating.cancel()

    @staticmethod
    async def _beat(line: Line) -> None:
        with contextlib.suppress(OSError):  # the task that reads the connection fails, too
            while True:
                await line.say("alive")
                await asyncio.sleep(HEARTBEAT)

    async def _take(self, token: str) -> None:
        """Join a worker's connection with the executor's server."""
        route = self._route
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                line = await self._connect(ACCEPT, token)
                try:
                    server = await connect(route.target_host, route.target_port)
                except BaseException:
                    line.connection.close()
                    raise
        except OSError:  # the worker will dial again
            return
        prepare(server)
        await join(line.connection, server, to_other=line.rest)


def _why(error: OSError) -> str:
    return str(error) or ("no answer" if isinstance(error, TimeoutError) else repr(error))


def main() -> None:
    """Run the tunnel of the client that has started this process."""
    parent = os.getppid()
    route = Route(**json.loads(sys.stdin.buffer.readline()))
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        asyncio.run(_run(route, parent))


async def _run(route: Route, parent: int) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()

    def on_input() -> None:
        if not os.read(0, 4096):
            over.set()

    def tell(state: str, why: str) -> None:
        print(json.dumps({"state": state, "why": why}), flush=True)

    os.set_blocking(0, False)
    loop.add_reader(0, on_input)
    running = loop.create_task(Registration(route, tell).run())
    running.add_done_callback(lambda _: over.set())
    while not over.is_set() and os.getppid() == parent:
        # Another child of the client may have inherited the pipe and keep it open, so the loop also
        # checks whether the client still exists.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await over.wait()
    if running.done():
        running.result()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


if __name__ == "__main__":
    main()
