"""Many simulated workers in one process; started by ``_crowd.py``.

It reads lines of JSON from standard input, and answers each with a line of JSON. The first line has
the server's address and the workers' identities, and is answered when all workers are connected:

    {"target": "unix:/tmp/s", "executor_id": "...", "key": "...", "sha256": "", "identities": [...]}
    {"do": "stop the client", "seconds": 60}
    {"do": "cut", "after": 1}                       answered when all are connected again
    {"do": "end"}                                   answered when the executor has let them all go
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import sys
import time
from typing import Any

import psutil

from cloudexec._launchers.base import Contact
from cloudexec.testing import SimulatedWorker

_AT_ONCE = 64
"""Workers that connect at the same time; the server refuses more than 256 unproven ones."""
_PATIENCE = 600.0


def echo(lease: int, payload: bytes) -> bytes:
    """Answer a task with its first argument."""
    args = pickle.loads(payload)
    return pickle.dumps(args[0], 5)


class Simulator:
    """The workers of this process."""

    def __init__(self, request: dict[str, Any]) -> None:
        contact = Contact(
            request["target"],
            request["executor_id"],
            bytes.fromhex(request["key"]),
            request["sha256"],
        )
        identities = request["identities"]
        self.workers = [SimulatedWorker(contact, each, answer=echo) for each in identities]
        self._port = int(request["target"].rpartition(":")[2]) if request["sha256"] else 0
        self._serving: list[asyncio.Task[str]] = []

    async def connect(self) -> dict[str, Any]:
        room = asyncio.Semaphore(_AT_ONCE)

        async def connect(worker: SimulatedWorker) -> None:
            async with room:
                await worker.connect(_PATIENCE)

        begin, cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for worker in self.workers:
                group.create_task(connect(worker))
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        self._serving = [asyncio.create_task(worker.serve()) for worker in self.workers]
        return {"seconds": seconds, "cpu": cpu}

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "stop the client":
            return await self.stop_client(request["seconds"])
        if request["do"] == "cut":
            return await self.cut(request["after"])
        ends = await asyncio.gather(*self._serving)  # an error of a worker ends this process
        answered = sum(worker.answered for worker in self.workers)
        return {"answered": answered, "drained": ends.count("drained"), "of": len(ends)}

    async def stop_client(self, seconds: float) -> dict[str, Any]:
        os.kill(os.getppid(), signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            os.kill(os.getppid(), signal.SIGCONT)
        return {"woken_at": time.monotonic()}

    async def cut(self, after: float) -> dict[str, Any]:
        """Cut all connections below gRPC, and wait until the workers have connected again."""
        await asyncio.sleep(after)
        before = [worker.reconnected for worker in self.workers]
        cut = 0
        for connection in psutil.Process().net_connections("tcp"):
            if connection.raddr and connection.raddr.port == self._port:
                with contextlib.suppress(OSError):
                    ours = socket.socket(fileno=os.dup(connection.fd))
                    ours.shutdown(socket.SHUT_RDWR)
                    ours.close()
                    cut += 1
        times = []
        missing = set(range(len(self.workers)))
        deadline = time.monotonic() + _PATIENCE
        while missing and time.monotonic() < deadline:
            back = {n for n in missing if self.workers[n].reconnected > before[n]}
            times += [time.monotonic()] * len(back)
            missing -= back
            if any(task.done() for task in self._serving):
                break
            await asyncio.sleep(0.05)
        return {"cut": cut, "missing": len(missing), "back_at": times}


async def main() -> None:
    # Real workers run on other machines, so here they must not take CPU time from the client.
    os.nice(10)
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader(limit=16 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    simulator = Simulator(json.loads(await lines.readline()))
    print(json.dumps(await simulator.connect()), flush=True)

    async def answer(request: dict[str, Any]) -> None:
        print(json.dumps(await simulator.answer(request)), flush=True)

    # The requests run at the same time, as a stop of the client and a cut belong together.
    async with asyncio.TaskGroup() as group:
        while line := await lines.readline():
            group.create_task(answer(json.loads(line)))


if __name__ == "__main__":
    asyncio.run(main())
