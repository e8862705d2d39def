"""A TCP proxy whose connections fail on request: cut, half-open, silent or slow; for soak.py.

It reads lines of JSON from standard input, and answers each with the number of connections (links)
that it has affected. It ends at the end of its input. The first line has the ports on which to
listen and to which to connect:

    {"listen": 40001, "target": 40002, "seed": 7}
    {"fault": "reset", "share": 0.5, "seconds": 0}
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

_READ = 64 * 1024
_TICK = 0.02
"""Seconds between two checks whether a silent link may continue."""
_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing resets the connection


class Link:
    """One worker's connection through the proxy."""

    def __init__(self, worker: asyncio.StreamWriter, client: asyncio.StreamWriter) -> None:
        self.worker = worker
        self.client = client
        self.silent_until = 0.0
        self.late_until = 0.0
        self.delay = 0.0
        self.rate = 0.0
        self.dead_end = False
        """Whether one side was cut off without telling the other side."""

    def reset(self) -> None:
        for side in (self.worker, self.client):
            _abort(side)

    def close(self) -> None:
        for side in (self.worker, self.client):
            side.close()

    def forget_worker(self) -> None:
        """Cut off the worker; to the client, the connection only becomes silent."""
        self.dead_end = True
        _abort(self.worker)

    def forget_client(self) -> None:
        self.dead_end = True
        _abort(self.client)

    async def carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        """Forward the bytes of one side, as far and as fast as the link's faults allow."""
        try:
            while data := await source.read(_READ):
                await self._until_heard()
                if time.monotonic() < self.late_until:
                    await asyncio.sleep(self.delay + len(data) * self.rate)
                if self.dead_end:
                    continue  # the bytes are dropped
                target.write(data)
                await target.drain()
        except OSError:
            pass

    async def _until_heard(self) -> None:
        # Checked at intervals, as a silent link may be made silent for longer, or be repaired.
        while (silent := self.silent_until - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(min(silent, _TICK))


def _abort(side: asyncio.StreamWriter) -> None:
    sock = side.get_extra_info("socket")
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    except OSError:
        pass
    side.transport.abort()


class Proxy:
    """Forwards connections, and breaks them on request.

    Args:
        target: Port of the client on this machine.
        seed: Seed of the choice of links that a fault affects.
    """

    def __init__(self, target: int, seed: int) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._links: set[Link] = set()
        self._refusing_until = 0.0

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._refusing_until:
            _abort(writer)
            return
        try:
            back, client = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _abort(writer)
            return
        link = Link(writer, client)
        self._links.add(link)
        try:
            ways = [
                asyncio.ensure_future(link.carry(reader, client)),
                asyncio.ensure_future(link.carry(back, writer)),
            ]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if link.dead_end:
                await asyncio.wait(ways)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        finally:
            self._links.discard(link)
            link.close()

    def break_links(self, request: dict[str, Any]) -> int:
        """Carry out a request; return the number of affected links."""
        fault, seconds = request["fault"], request.get("seconds", 0.0)
        now = time.monotonic()
        links = [link for link in self._links if not link.dead_end]
        hit = self._some(links, request.get("share", 1.0))
        if fault == "heal":
            self._refusing_until = 0.0
            for link in self._links:
                link.silent_until = link.late_until = 0.0
            _each([link for link in self._links if link.dead_end], Link.reset)
            return 0
        if fault == "refuse":
            self._refusing_until = now + seconds
            return 1
        if fault == "silent":
            for link in hit:
                link.silent_until = now + seconds
        elif fault == "late":
            for link in hit:
                link.late_until, link.delay, link.rate = now + seconds, 0.15, 0.0
        elif fault == "slow":
            for link in hit:
                link.late_until, link.delay, link.rate = now + seconds, 0.0, 1 / (512 * 1024)
        else:
            _each(hit, _CUTS[fault])
        return len(hit)

    def _some(self, links: list[Link], share: float) -> list[Link]:
        return self._random.sample(links, max(1, round(len(links) * share))) if links else []


_CUTS: dict[str, Callable[[Link], None]] = {
    "reset": Link.reset,
    "close": Link.close,
    "half-open to the client": Link.forget_worker,
    "half-open to the worker": Link.forget_client,
}


def _each(links: Iterable[Link], do: Callable[[Link], None]) -> None:
    for link in links:
        do(link)


async def _sleep_client(seconds: float) -> int:
    """Stop the client's process, as when a laptop's lid is closed, and continue it afterwards."""
    client = os.getppid()
    os.kill(client, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        os.kill(client, signal.SIGCONT)
    return 1


async def main() -> None:
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    first = json.loads(await lines.readline())
    proxy = Proxy(first["target"], first["seed"])
    server = await asyncio.start_server(proxy.take, "127.0.0.1", first["listen"], backlog=4096)
    print(0, flush=True)
    while line := await lines.readline():
        request = json.loads(line)
        if request["fault"] == "asleep":
            hit = await _sleep_client(request["seconds"])
        else:
            hit = proxy.break_links(request)
        print(hit, flush=True)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
