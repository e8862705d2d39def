"""What a slot says late, of a task whose result was found before, changes nothing for others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterator, Sequence

from stepping import HandLoop

from cloudexec._objects.options import Limits
from cloudexec._proto import tasks_pb2 as pb
from cloudexec.worker import frames
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.dialing import Address
from cloudexec.worker.frames import CURRENT, HEADER, RESULT, RESULTS_AT, USED, Kind
from cloudexec.worker.reporting import Answers, ResultBlob
from cloudexec.worker.session import Session
from cloudexec.worker.slot_model import SlotState
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
        pass

    def groups_changed(self) -> None:
        pass

    def initializer_failed(self, payload: bytes) -> None:
        raise AssertionError(payload)

    def wake(self) -> None:
        pass


class Stage:
    """A pool with one slot; the test plays the zygote and the slot's process."""

    def __init__(self, answers: Answers) -> None:
        self.loop = HandLoop()
        self.zygote, ours = socket.socketpair()
        self.zygote.setblocking(False)
        asyncio._set_running_loop(self.loop)  # type: ignore[arg-type]
        try:
            self.blobs = BlobCache(_no_blob, Limits(2**30, 0), set, direct=False)
            self.pool = SlotPool(Settings(slots=1), answers, ours, _no_zygote, self.blobs)
        finally:
            asyncio._set_running_loop(None)
        self.pool.add([WorkItem(1, 0, b"", 1, 0.0)])
        data, fds, _, _ = socket.recv_fds(self.zygote, MESSAGE.size, 8)
        assert MESSAGE.unpack(data)[0] == FORK
        self.fds = fds
        self.tell(STARTED)
        os.write(self.results_fd, HEADER.pack(Kind.READY, 0, 0))
        self.run()
        (self.child,) = self.pool._slots.children.values()
        assert self.child.state is SlotState.READY
        self.pool.announced()

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


@contextlib.contextmanager
def staged(answers: Answers) -> Iterator[Stage]:
    stage = Stage(answers)
    try:
        yield stage
    finally:
        stage.close()


def test_a_timeout_holds_though_the_answer_before_it_comes_twice() -> None:
    """The slot was descheduled between the page and the pipe; its next task has a timeout."""
    client = Client()
    with staged(client) as stage:
        frame = stage.finish(1)
        assert stage.pool.hand_back() == []  # this looks at the page
        assert client.results == [1]
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
        assert [(each.lease, each.kind) for each in client.failures] == [(2, TIMED_OUT)]
        assert client.results == [1]


def test_a_result_that_is_found_when_another_client_takes_over_is_handed_to_it() -> None:
    """It was in the page, and not in the pipe, in that moment."""
    session = Session(Address("unix:/nowhere", "x", "1", bytes(32), 1))
    with staged(session.outbox) as stage:
        session.attach(stage.pool, stage.blobs)
        session._inbox.holdings.take(pb.Tasks(leases=[1], tags=[b"the first"]))
        stage.finish(1)
        session._begin_anew()
        message = session.outbox.compose(stage.pool)
        assert message is not None
        assert [*message.holding.leases] == [*message.results.leases] == [1]
        assert [*message.holding.tags] == [b"the first"]
        assert [*message.results.payloads] == [b"N."]


def test_a_worker_that_drains_is_idle_once_its_last_answer_was_found() -> None:
    """By a client that takes it over: the pipe has nothing left then that would wake the worker."""
    client = Client()
    with staged(client) as stage:
        stage.pool.drain()
        assert not stage.pool.idle.is_set()
        os.write(stage.results_fd, stage.finish(1))
        assert stage.pool.hand_back() == []
        assert client.results == [1]
        assert stage.pool.idle.is_set()
