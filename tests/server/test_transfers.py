"""Large results against the real server: what a worker may name, announce and send."""

from __future__ import annotations

import os
import pickle
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hostile_peers import channel
from test_enrolment import Peer

from cloudexec import (
    BatchExecutor,
    ObjectOptions,
    PayloadError,
    RefLostError,
    WorkerLostError,
    _records,
)
from cloudexec._objects.segments import Segment
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server import keeper
from cloudexec._server.rpc import transfers
from cloudexec._wire.channel import BLOB_KEY, LEASE_KEY, SIZE_KEY, TOKEN_KEY
from cloudexec.testing import ManualLauncher

pytestmark = pytest.mark.timeout(60)
MIB = 1024 * 1024
NOWHERE = 1 << 62
ARRAY = np.arange(50_000)
DATA = ARRAY.tobytes()
PICKLE = pickle.dumps(ARRAY, 5, buffer_callback=lambda buffer: False)
HEAD = (
    _records.record(5, 1)
    + _records.record(0, len(PICKLE))
    + PICKLE
    + _records.END_RECORD  # one buffer, which the result calls 1
)


class Worker(Peer):
    """A worker that has a task, and says what it likes."""

    def __init__(self, executor: BatchExecutor, launcher: ManualLauncher, **submitted: Any) -> None:
        count = len(launcher.launches)
        view = executor.with_options(**submitted) if submitted else executor
        self.future: Any = view.submit(len, "abc")
        launch = launcher.wait(count + 1, timeout=20)[-1]
        contact = launch.contact
        super().__init__(contact.target)
        self.welcome = self.enrol(
            contact.executor_id, launch.launch_id, contact.key, pid=os.getpid()
        ).welcome
        self.send(ready=True)
        self.lease = self.wait_for(lambda message: message.HasField("tasks")).tasks.leases[0]
        self.parts = 1

    def next_task(self, executor: BatchExecutor) -> None:
        """Take another task, when that one is done."""
        self.future = executor.submit(len, "abc")
        self.lease = self.wait_for(lambda message: message.HasField("tasks")).tasks.leases[0]
        self.parts += 100

    def wait_for(self, condition: Callable[[Any], Any]) -> Any:
        for message in self.answers:
            if condition(message):
                return message
        raise AssertionError("the session has ended")

    def own(self, index: int = 0) -> int:
        return int(self.welcome.first_blob) + self.parts + index

    def report(self, *, kept: bool = False, **blob: Any) -> None:
        """Say that the task returned the array, one part of which is so."""
        part = pb.Blob(**{"id": self.own(), "number": 1, "size": len(DATA), **blob})
        results = pb.Results(
            leases=[self.lease],
            payloads=[HEAD],
            seconds=[0.0],
            composed=[0],
            blob_counts=[1],
            blobs=[part],
            kept=[0] if kept else [],
        )
        self.send(results=results)

    def deliver(self, chunks: Sequence[pb.Chunk], **metadata: Any) -> Any:
        """Send a part of a result; return the answer, or the code of the refusal."""
        given = {"blob": self.own(), "size": len(DATA), "lease": self.lease, **metadata}
        keys = {"blob": BLOB_KEY, "size": SIZE_KEY, "lease": LEASE_KEY}
        call = self.channel.stream_unary(
            "/cloudexec.v1.TaskServer/Deliver",
            request_serializer=pb.Chunk.SerializeToString,
            response_deserializer=pb.DeliverReply.FromString,
        )
        token = given.pop("token", self.welcome.session_token)
        sent = [(TOKEN_KEY, token), *((keys[key], str(value)) for key, value in given.items())]
        try:
            return call(iter(chunks), metadata=sent, timeout=20).accepted
        except grpc.RpcError as exc:
            return exc.code()  # type: ignore[attr-defined]

    def fetch(self, number: int, offset: int = 0) -> Any:
        call = self.channel.unary_stream(
            "/cloudexec.v1.TaskServer/Fetch",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=pb.Chunk.FromString,
        )
        request = pb.FetchRequest(blob=number, offset=offset)
        metadata = [(TOKEN_KEY, self.welcome.session_token)]
        try:
            return b"".join(chunk.data for chunk in call(request, metadata=metadata, timeout=20))
        except grpc.RpcError as exc:
            return exc.code()  # type: ignore[attr-defined]

    def ended(self) -> bool:
        """Wait until the server ends the session."""
        try:
            for _ in self.answers:
                pass
        except grpc.RpcError:
            pass
        return True


def chunks(data: bytes = DATA, crc32: int | None = None, size: int = MIB) -> list[pb.Chunk]:
    cut = [pb.Chunk(data=data[at : at + size]) for at in range(0, len(data), size)]
    return [*cut, pb.Chunk(crc32=zlib.crc32(data) if crc32 is None else crc32)]


@pytest.fixture
def launcher() -> ManualLauncher:
    return ManualLauncher(slots_per_worker=1)


@pytest.fixture
def executor(launcher: ManualLauncher) -> Iterator[BatchExecutor]:
    options = ObjectOptions(memory="64MiB", cache=0)
    with BatchExecutor(8, launcher=launcher, objects=options) as executor:
        yield executor
        executor.shutdown(wait=False, cancel_futures=True)
        launcher.end_all()
        executor.kill_workers()


@pytest.fixture
def worker(executor: BatchExecutor, launcher: ManualLauncher) -> Iterator[Worker]:
    worker = Worker(executor, launcher)
    yield worker
    worker.close()


def store_of(executor: BatchExecutor) -> Any:
    assert executor._driver is not None
    store = executor._driver.store
    store.sweep()
    return store


def assert_unharmed(
    executor: BatchExecutor, launcher: ManualLauncher, worker: Worker | None = None
) -> None:
    """The client holds nothing of it and does its work, with another worker if need be."""
    if worker is not None and worker.future is not None and not worker.future.done():
        other = Worker(executor, launcher)
    elif worker is not None:
        other = worker
        other.next_task(executor)
    else:
        other = Worker(executor, launcher)
    assert other.deliver(chunks()) is True
    other.report()
    assert np.array_equal(other.future.result(20), ARRAY)
    other.future = None
    until_empty(executor)
    if other is not worker:
        other.close()


def until_empty(executor: BatchExecutor) -> None:
    pause = threading.Event()
    for _ in range(1000):
        store = store_of(executor)
        if not (store.memory or store.disk):
            return
        pause.wait(0.01)
    raise AssertionError(f"{store.memory} bytes in memory, {store.disk} on disk")


def test_a_result_that_is_delivered_and_reported_arrives(
    executor: BatchExecutor, worker: Worker
) -> None:
    """The honest case, on which the others are built."""
    assert worker.deliver(chunks(size=100_000)) is True
    worker.report()
    assert np.array_equal(worker.future.result(20), ARRAY)


def test_a_small_part_comes_along_with_its_result(executor: BatchExecutor, worker: Worker) -> None:
    worker.report(content=DATA)
    assert np.array_equal(worker.future.result(20), ARRAY)
    until_empty(executor)


def test_a_part_that_is_not_as_long_as_it_says_ends_the_session(
    executor: BatchExecutor, launcher: ManualLauncher, worker: Worker
) -> None:
    worker.report(content=DATA[1:])
    assert worker.ended()
    assert_unharmed(executor, launcher, worker)


@pytest.mark.parametrize(("size", "goes_along"), [(200_000, True), (300_000, False)])
def test_small_arguments_go_along_with_the_first_task_that_takes_them(
    size: int, goes_along: bool
) -> None:
    """So that a worker far away need not ask; larger ones it has to ask for."""
    launcher = ManualLauncher(needs_network=True)
    content = os.urandom(size)
    with BatchExecutor(1, launcher=launcher, listen="127.0.0.1:0") as executor:
        futures = [executor.submit(len, content) for _ in range(2)]
        (launch,) = launcher.wait(1, timeout=20)
        contact = launch.contact
        peer = Peer(contact.target, channel(contact))
        try:
            peer.enrol(contact.executor_id, launch.launch_id, contact.key)
            peer.send(ready=True)
            told = []
            for future in futures:
                message = next(each for each in peer.answers if each.HasField("tasks"))
                told += message.blobs
                (lease,) = message.tasks.leases
                result = pb.Results(leases=[lease], payloads=[pickle.dumps(1)], seconds=[0.0])
                peer.send(results=result)
                assert future.result(20) == 1
            (blob,) = told  # once, not with the second task
            assert (content in blob.content) is goes_along
            assert len(blob.content) == (blob.size if goes_along else 0)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            peer.close()
            launcher.end_all()
            executor.kill_workers()


def test_a_result_in_a_file_of_the_worker_arrives(executor: BatchExecutor, worker: Worker) -> None:
    """On one machine it is opened where it is, and the worker told that it may go."""
    segment = Segment()
    segment.write(DATA)
    worker.report(path=f"/proc/{os.getpid()}/fd/{segment.fd}", mappable=True)
    assert np.array_equal(worker.future.result(20), ARRAY)
    assert list(worker.wait_for(lambda message: message.taken).taken) == [worker.own()]


# What it names.


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(
    "path",
    [
        "/etc/hostname",
        "/proc/1/fd/0",
        "/proc/self/fd/0",
        "/proc/{pid}/fd/../environ",
        "/proc/{pid}/fd/",
        "/proc/{pid}/fd/3/../../environ",
        "../../etc/hostname",
        "{fifo}",
    ],
)
def test_a_worker_cannot_have_the_client_open_what_is_not_its_own(
    executor: BatchExecutor,
    launcher: ManualLauncher,
    path: str,
    kept: bool,
    tmp_path: Path,
) -> None:
    """Its session ends, and its task is run by another."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    worker = Worker(executor, launcher, keep=kept, retries=0)
    worker.report(path=path.format(pid=os.getpid(), fifo=fifo), size=7, mappable=True, kept=kept)
    assert worker.ended()
    launcher.end(launcher.launches[0].launch_id)
    assert isinstance(worker.future.exception(20), WorkerLostError)
    worker.close()
    assert_unharmed(executor, launcher)


def test_a_pipe_in_place_of_a_file_does_not_hold_up_the_client(
    executor: BatchExecutor, launcher: ManualLauncher, worker: Worker
) -> None:
    """To open one waits for a writer; and here is none."""
    reading, writing = os.pipe()
    os.close(writing)
    worker.report(path=f"/proc/{os.getpid()}/fd/{reading}", mappable=True)
    assert isinstance(worker.future.exception(20), PayloadError)
    os.close(reading)
    assert_unharmed(executor, launcher, worker)


@pytest.mark.parametrize("mappable", [False, True])
@pytest.mark.parametrize(("size", "offset"), [(len(DATA) + 1, 0), (10 * 2**40, 0), (1000, 2**40)])
def test_a_file_that_is_shorter_than_announced_fails_the_future(
    executor: BatchExecutor,
    launcher: ManualLauncher,
    worker: Worker,
    mappable: bool,
    size: int,
    offset: int,
) -> None:
    """To map it, and read behind its end, would kill the client."""
    segment = Segment()
    segment.write(DATA)
    path = f"/proc/{os.getpid()}/fd/{segment.fd}"
    worker.report(path=path, size=size, offset=offset, mappable=mappable)
    assert isinstance(worker.future.exception(20), PayloadError)
    assert_unharmed(executor, launcher, worker)


def test_a_worker_can_keep_only_under_numbers_of_its_own(
    executor: BatchExecutor, launcher: ManualLauncher
) -> None:
    """Else it could have other workers forget what the client has."""
    worker = Worker(executor, launcher, keep=True, retries=0)
    worker.report(id=1, kept=True)
    assert worker.ended()
    launcher.end(launcher.launches[0].launch_id)
    assert isinstance(worker.future.exception(20), WorkerLostError)
    worker.close()
    assert_unharmed(executor, launcher)


def test_a_part_that_never_came_fails_the_future(
    executor: BatchExecutor, launcher: ManualLauncher, worker: Worker
) -> None:
    """Reported, and not delivered."""
    worker.report()
    error = worker.future.exception(20)
    assert isinstance(error, PayloadError)
    assert "never arrived" in str(error)
    assert_unharmed(executor, launcher, worker)


# What it announces and sends.


@pytest.mark.parametrize(
    ("metadata", "answer"),
    [
        ({"blob": 5}, grpc.StatusCode.UNAUTHENTICATED),
        ({"blob": NOWHERE}, grpc.StatusCode.UNAUTHENTICATED),
        ({"blob": -1}, grpc.StatusCode.UNAUTHENTICATED),
        ({"blob": "abc"}, grpc.StatusCode.UNAUTHENTICATED),
        ({"size": "abc"}, grpc.StatusCode.UNAUTHENTICATED),
        ({"size": "9" * 4000}, grpc.StatusCode.UNAUTHENTICATED),
        ({"token": b"x" * 16}, grpc.StatusCode.UNAUTHENTICATED),
        ({"lease": NOWHERE}, False),
        ({"lease": "abc"}, False),
        ({"size": 10 * 2**40}, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ({"size": 10**18}, grpc.StatusCode.UNAUTHENTICATED),
    ],
)
def test_what_is_announced_wrongly_is_refused(
    executor: BatchExecutor,
    launcher: ManualLauncher,
    worker: Worker,
    metadata: dict[str, Any],
    answer: Any,
) -> None:
    """Before anything is allocated for it."""
    assert worker.deliver([], **metadata) == answer
    assert store_of(executor).high < 2 * MIB
    assert_unharmed(executor, launcher, worker)
    assert worker.deliver(chunks()) is True
    worker.report()
    assert np.array_equal(worker.future.result(20), ARRAY)


@pytest.mark.parametrize(
    "sent",
    [
        chunks(crc32=zlib.crc32(DATA) ^ 1),
        chunks(DATA[:-1] + b"x", crc32=zlib.crc32(DATA)),
        chunks(DATA + b"x"),
        chunks(DATA * 30),
        chunks(DATA[:-1]),
        chunks()[:-1],
        [],
        [pb.Chunk(data=b"not compressed at all", deflated=True)],
        [pb.Chunk(data=zlib.compress(DATA)[:-100], deflated=True), chunks()[-1]],
    ],
    ids=[
        "another digest",
        "another byte",
        "a byte more",
        "much more",
        "a byte less",
        "no digest",
        "nothing",
        "no compression",
        "cut off",
    ],
)
def test_what_arrives_damaged_is_refused_and_may_be_sent_again(
    executor: BatchExecutor, launcher: ManualLauncher, worker: Worker, sent: list[pb.Chunk]
) -> None:
    """Nothing of it is kept, and the client goes on."""
    assert worker.deliver(sent) is grpc.StatusCode.DATA_LOSS
    until_empty(executor)
    assert not worker.future.done()
    assert worker.deliver(chunks()) is True
    worker.report()
    assert np.array_equal(worker.future.result(20), ARRAY)
    worker.future = None
    assert_unharmed(executor, launcher, worker)


def test_a_chunk_that_is_small_only_because_it_is_compressed_is_refused(
    executor: BatchExecutor, launcher: ManualLauncher, worker: Worker
) -> None:
    bomb = zlib.compress(bytes(200 * MIB), 1)
    test_what_arrives_damaged_is_refused_and_may_be_sent_again(
        executor, launcher, worker, [pb.Chunk(data=bomb, deflated=True)]
    )


def test_parts_of_a_result_that_fails_are_not_kept(
    executor: BatchExecutor, launcher: ManualLauncher, worker: Worker
) -> None:
    """Ninety-nine arrays came and the last one did not: there is room again."""
    for index in range(1, 20):
        assert worker.deliver(chunks(), blob=worker.own(index)) is True
    assert store_of(executor).memory == 19 * len(DATA)
    error = pickle.dumps((pickle.dumps(ValueError("no")), ""))
    failure = pb.Failure(lease=worker.lease, kind=pb.Failure.PICKLE_FAILED, payload=error)
    worker.send(failures=[failure])
    assert isinstance(worker.future.exception(20), ValueError)
    until_empty(executor)


def test_what_a_lost_worker_had_sent_is_not_kept(
    executor: BatchExecutor, launcher: ManualLauncher, worker: Worker
) -> None:
    """Its session ends before it reported the result."""
    assert worker.deliver(chunks()) is True
    worker.close()
    launcher.end(launcher.launches[0].launch_id, killed=True)
    until_empty(executor)


@pytest.mark.parametrize("size", [len(DATA) - 8, len(DATA) + 8, 10 * 2**40])
def test_a_kept_blob_of_another_size_is_not_taken_for_it(
    executor: BatchExecutor, launcher: ManualLauncher, size: int
) -> None:
    """Asked for what it keeps, a worker sends that, or nothing."""
    worker = Worker(executor, launcher, keep=True)
    worker.report(kept=True)
    ref = worker.future.result(20)
    values: list[Any] = []
    thread = threading.Thread(target=lambda: values.append(ref.get(20)))
    thread.start()
    assert list(worker.wait_for(lambda message: message.wanted).wanted) == [worker.own()]
    assert worker.deliver([], size=size, lease=0) is False
    assert worker.deliver(chunks(), lease=0) is True
    thread.join()
    assert np.array_equal(values[0], ARRAY)
    worker.close()


def test_a_kept_blob_that_always_arrives_damaged_is_an_error(
    executor: BatchExecutor, launcher: ManualLauncher
) -> None:
    """Whoever waits for it learns of it."""
    worker = Worker(executor, launcher, keep=True)
    worker.report(kept=True)
    ref = worker.future.result(20)
    errors: list[BaseException] = []

    def get() -> None:
        try:
            ref.get(20)
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=get)
    thread.start()
    worker.wait_for(lambda message: message.wanted)
    for _ in range(3):
        assert (
            worker.deliver(chunks(crc32=zlib.crc32(DATA) ^ 1), lease=0) is grpc.StatusCode.DATA_LOSS
        )
    thread.join()
    (error,) = errors
    assert isinstance(error, PayloadError)
    assert "CRC-32" in str(error)
    worker.close()


def test_a_kept_blob_that_never_comes_is_lost(
    executor: BatchExecutor, launcher: ManualLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker is there, and does not hand it over: nobody waits for that for ever."""
    monkeypatch.setattr(keeper, "_PULL_TIMEOUT", 0.3)
    worker = Worker(executor, launcher, keep=True, on_loss="raise")
    worker.report(kept=True)
    ref = worker.future.result(20)
    with pytest.raises(RefLostError):
        ref.get(20)
    worker.close()


def test_an_upload_that_does_not_go_on_is_ended(
    executor: BatchExecutor, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many bytes it is that come, one by one."""
    monkeypatch.setattr(transfers, "_STALLED", 0.3)
    over = threading.Event()

    def trickle() -> Iterator[pb.Chunk]:
        while not over.wait(0.02):
            yield pb.Chunk(data=b"x")

    assert worker.deliver(trickle()) is grpc.StatusCode.DATA_LOSS  # type: ignore[arg-type]
    over.set()
    until_empty(executor)
    assert worker.deliver(chunks()) is True
    worker.report()
    assert np.array_equal(worker.future.result(20), ARRAY)


# What it asks for.


def test_a_worker_fetches_only_what_it_was_told_of(
    executor: BatchExecutor, launcher: ManualLauncher, worker: Worker
) -> None:
    """Neither what others were told of, nor what is not there."""
    assert worker.fetch(NOWHERE) is grpc.StatusCode.NOT_FOUND
    count = len(launcher.launches)
    future = executor.submit(len, ARRAY)
    launch = launcher.wait(count + 1, timeout=20)[-1]
    contact = launch.contact
    other = Peer(contact.target)
    other.enrol(contact.executor_id, launch.launch_id, contact.key)
    other.send(ready=True)
    for message in other.answers:
        if message.HasField("tasks"):
            break
    (blob,) = message.blobs
    assert worker.fetch(blob.id) is grpc.StatusCode.NOT_FOUND
    other.welcome = worker.welcome  # type: ignore[attr-defined]
    other.close()
    future.cancel()


def test_a_worker_that_asks_past_the_end_gets_nothing(
    executor: BatchExecutor, launcher: ManualLauncher
) -> None:
    """From any offset within a blob on, it gets the rest."""
    count = len(launcher.launches)
    executor.submit(len, ARRAY)
    launch = launcher.wait(count + 1, timeout=20)[-1]
    contact = launch.contact
    worker = Worker.__new__(Worker)
    Peer.__init__(worker, contact.target)
    worker.welcome = worker.enrol(contact.executor_id, launch.launch_id, contact.key).welcome
    worker.send(ready=True)
    (blob,) = worker.wait_for(lambda message: message.HasField("tasks")).blobs
    assert worker.fetch(blob.id) == DATA
    assert worker.fetch(blob.id, 1000) == DATA[1000:]
    assert worker.fetch(blob.id, len(DATA)) == b""
    assert worker.fetch(blob.id, len(DATA) + 1) is grpc.StatusCode.NOT_FOUND
    assert worker.fetch(blob.id, NOWHERE) is grpc.StatusCode.NOT_FOUND
    worker.close()
