"""Many simulated workers in one process; started by workers.py.

Reads one line of JSON on standard input: the executor's contact, and the identities to connect
under.
Prints a line once all are connected, and ends when the executor has let all of them go.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from cloudexec._launchers.base import Contact
from cloudexec.testing import SimulatedWorker

_AT_ONCE = 64
"""Workers that dial at the same time: the server turns away more than 256 unproven ones."""


async def main(contact: Contact, identities: list[str]) -> None:
    workers = [SimulatedWorker(contact, identity) for identity in identities]
    room = asyncio.Semaphore(_AT_ONCE)

    async def connect(worker: SimulatedWorker) -> None:
        async with room:
            await worker.connect()

    begin = time.perf_counter()
    serving = []
    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(connect(worker))
    seconds = time.perf_counter() - begin
    async with asyncio.TaskGroup() as group:
        serving = [group.create_task(worker.serve()) for worker in workers]
        print(json.dumps({"seconds": seconds}), flush=True)
    ends = [task.result() for task in serving]
    answered = sum(worker.answered for worker in workers)
    print(json.dumps({"answered": answered, "drained": ends.count("drained")}), flush=True)


if __name__ == "__main__":
    request = json.loads(sys.stdin.readline())
    asyncio.run(
        main(
            Contact(request["target"], request["executor_id"], bytes.fromhex(request["key"])),
            request["identities"],
        )
    )
