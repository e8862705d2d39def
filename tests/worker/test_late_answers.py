"""What a slot says late, of a task whose result was found before, changes nothing for others."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator, Sequence

import pytest
from stepping import HandLoop

from cloudexec._objects.options import Limits
from cloudexec.worker import frames
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.frames import CURRENT, HEADER, RESULT, RESULTS_AT, USED, Kind
from cloudexec.worker.reporting import ResultBlob
from cloudexec.worker.slots import Settings
from cloudexec.worker.supervisor import SlotPool
from cloudexec.worker.tasks import TIMED_OUT, Failure, WorkItem
from cloudexec.worker.zygote import EXITED, FORK, KILL, MESSAGE, STARTED


class Client:
    """Takes down what the pool answers."""

    def __init__(self) -> None:
        self.results: list[int] = []
        self.failures: list[Failure] = []
        self.handed_back: list[int] = []
        self.is_ready = False

    def result(self, lease: int, payload: bytes, seconds: float) -> None:
        self.results.append(lease)

    def delivered(self, lease: int, seconds: float) -> None:
        raise AssertionError(lease)

    def composed(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob], *, keep: bool
    ) -> None:
        raise AssertionError(lease)

    def failure(self, failure: Failure) -> None:
        self.failures.append(failure)

    def returned(self, lease: int) -> None:
        self.handed_back.append(lease)

    def output(self, lease: int, number: int, stream: int, data: bytes) -> bool:
        raise AssertionError(data)

    def ready(self) -> None:
        self.is_ready = True

    def groups_changed(self) -> None:
        pass

    def initializer_failed(self, payload: bytes) -> None:
        raise AssertionError(payload)

    def wake(self) -> None:
        pass


class Stage:
    """A pool with one slot; the test plays the zygote and the slot's process."""

    def __init__(self) -> None:
        self.loop = HandLoop()
        self.client = Client()
        self.zygote, ours = socket.socketpair()
        self.zygote.setblocking(False)
        asyncio._set_running_loop(self.loop)  # type: ignore[arg-type]
        try:
            blobs = BlobCache(_no_blob, Limits(2**30, 0), set, direct=False)
            self.pool = SlotPool(Settings(slots=1), self.client, ours, _no_zygote, blobs)
        finally:
            asyncio._set_running_loop(None)
        self.pool.add([WorkItem(1, 0, b"", 1, 0.0)])
        data, fds, _, _ = socket.recv_fds(self.zygote, MESSAGE.size, 8)
        assert MESSAGE.unpack(data)[0] == FORK
        self.fds = fds
        self.tell(STARTED)
        os.write(self.results_fd, HEADER.pack(Kind.READY, 0, 0))
        self.run()
        assert self.client.is_ready
        self.pool.announced()
        (self.child,) = self.pool._slots.children.values()

    @property
    def results_fd(self) -> int:
        return self.fds[1]

    def tell(self, kind: int, status: int = 0) -> None:
        self.zygote.send(MESSAGE.pack(kind, 2**22 + 1, status, 0, 1))

    def told(self) -> int:
        """Return what the zygote is told next; 0: nothing."""
        try:
            return int(MESSAGE.unpack(self.zygote.recv(MESSAGE.size))[0])
        except BlockingIOError:
            return 0

    def run(self) -> None:
        while self.loop.run_ready():
            pass

    def finish(self, delivery: int) -> bytes:
        """The slot has a result in the page; return the frame that it is about to write."""
        result = RESULT.pack(delivery, 0.0, frames.OK, 2) + b"N."
        self.child.page[RESULTS_AT : RESULTS_AT + len(result)] = result
        self.child.cells[CURRENT] = delivery
        self.child.cells[USED] = len(result)
        return HEADER.pack(Kind.RESULTS, len(result), 0) + result

    def close(self) -> None:
        self.pool.close()
        for child in self.pool._slots.children.values():
            child.close()
        for fd in self.fds:
            os.close(fd)
        self.zygote.close()


async def _no_blob(*args: object) -> None:
    raise AssertionError("no task here takes a blob")


def _no_zygote() -> None:
    raise AssertionError("the zygote is there")


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


def test_a_timeout_holds_though_the_answer_before_it_comes_twice(stage: Stage) -> None:
    """The slot was descheduled between the page and the pipe; its next task has a timeout."""
    frame = stage.finish(1)
    assert stage.pool.hand_back() == []  # this looks at the page
    assert stage.client.results == [1]
    stage.pool.add([WorkItem(2, 0, b"", 2, 0.0, timeout=5.0)])
    os.write(stage.results_fd, frame)
    stage.child.cells[USED] = 0
    stage.child.cells[CURRENT] = 2
    stage.run()
    end = stage.loop.now + 6.0
    while (told := stage.told()) != KILL and stage.loop.now < end and stage.loop.run_timer():
        stage.run()
    assert told == KILL
    stage.tell(EXITED, status=9)
    stage.run()
    assert [(each.lease, each.kind) for each in stage.client.failures] == [(2, TIMED_OUT)]
    assert stage.client.results == [1]
