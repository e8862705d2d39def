"""Workers that lose their client all at once, and come back all at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import cloudexec
from cloudexec._launchers.base import Contact
from cloudexec.testing import SimulatedWorker

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process"),
]

WORKERS = 300
TASKS = 30_000
CLIENT = """
import json, sys
from collections import Counter
from cloudexec import BatchExecutor
from cloudexec.testing import ManualLauncher

workers, tasks = int(sys.argv[1]), int(sys.argv[2])
launcher = ManualLauncher(needs_network=True)
outcomes = Counter()
with BatchExecutor(workers, min_workers=workers, launcher=launcher, output="off") as executor:
    contact = launcher.wait(workers, timeout=30)[0].contact
    words = [contact.target, contact.executor_id, contact.key.hex(), contact.certificate_sha256]
    print(json.dumps(words), flush=True)
    sys.stdin.readline()  # all are connected
    futures = []
    for number in range(tasks):
        future = executor.submit(abs, number)
        future.add_done_callback(lambda _, n=number: outcomes.update((n,)))
        futures.append(future)
        if number == tasks // 2:
            print("half", flush=True)
            sys.stdin.readline()
    wrong = sum(future.result(60) != number for number, future in enumerate(futures))
    stats = executor.stats()
    lost, launched = stats.workers.lost, stats.workers.launched
print(json.dumps([wrong, lost, launched, outcomes == Counter(range(tasks))]), flush=True)
launcher.end_all()
"""


def echo(lease: int, payload: bytes) -> bytes:
    """Answer with the first argument, as ``abs`` would."""
    return pickle.dumps(pickle.loads(payload)[0], 5)


def cut_connections(port: int) -> int:
    """Cut this process's connections to a port below gRPC, which is not asked."""
    count = 0
    for connection in psutil.Process().net_connections("tcp"):
        if connection.raddr and connection.raddr.port == port:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as ours:
                ours.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


async def play(client: subprocess.Popen[str]) -> list[Any]:
    """Connect, cut everything while the client is stopped, and wait until all is done.

    Returns:
        What the client says of its results.
    """
    assert client.stdin is not None
    assert client.stdout is not None
    target, executor_id, key, sha256 = json.loads(await asyncio.to_thread(client.stdout.readline))
    contact = Contact(target, executor_id, bytes.fromhex(key), sha256)
    workers = [SimulatedWorker(contact, str(n + 1), answer=echo) for n in range(WORKERS)]
    room = asyncio.Semaphore(64)

    async def connect(worker: SimulatedWorker) -> None:
        async with room:
            await worker.connect()

    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(connect(worker))
    async with asyncio.TaskGroup() as group:
        serving = [group.create_task(worker.serve()) for worker in workers]
        client.stdin.write("\n")
        client.stdin.flush()
        assert await asyncio.to_thread(client.stdout.readline) == "half\n"
        # What it has sent, and has been sent, is on its way, in part in its own buffers.
        client.send_signal(signal.SIGSTOP)
        try:
            assert cut_connections(int(target.rpartition(":")[2])) >= WORKERS
            # They dial again and again; nobody answers.
            await asyncio.sleep(3.0)
        finally:
            client.send_signal(signal.SIGCONT)
        woken = time.monotonic()
        while any(worker.reconnected == 0 for worker in workers):
            assert time.monotonic() < woken + 30, "they are not all back after 30 s"
            await asyncio.sleep(0.01)
        client.stdin.write("\n")
        client.stdin.flush()
        outcome: list[Any] = json.loads(await asyncio.to_thread(client.stdout.readline))
    assert [task.result() for task in serving] == ["drained"] * WORKERS
    # Each task was answered once: nothing was run again.
    assert sum(worker.answered for worker in workers) == TASKS
    return outcome


@pytest.mark.alone
def test_workers_cut_off_while_the_client_sleeps_are_all_back_with_all_they_had() -> None:
    """300 of them, and 30,000 tasks: none is lost, none doubled, none run again."""
    path = str(Path(cloudexec.__file__).parents[1])
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(WORKERS), str(TASKS)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with client:
        try:
            assert asyncio.run(play(client)) == [0, 0, WORKERS, True]
            assert client.wait(30) == 0
        finally:
            client.kill()
