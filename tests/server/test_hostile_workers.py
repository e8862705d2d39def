"""Workers that were let in and mean no good: what they break is their own."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import grpc
import pytest
from hostile_peers import (
    MIB,
    Inside,
    Trap,
    double,
    end_by_hand,
    executor_at,
    memory_in_use,
    peer,
    refusals,
    result_of,
    start_worker,
    unharmed,
    wait_until,
)

from cloudexec import BatchExecutor, InitializerError, ObjectOptions, PayloadError
from cloudexec._objects.places import is_descendant
from cloudexec._proto import tasks_pb2 as pb
from cloudexec.testing import FakeAWS, ManualLauncher

pytestmark = pytest.mark.timeout(90)


@pytest.mark.parametrize("place", ["tls", "unix"])
def test_a_worker_answers_for_its_own_tasks_alone(place: str, tmp_path: Path) -> None:
    """Results for leases that it never had, for those of others, or twice, are dropped; parts of
    results and blobs that are not its own are not to be had; and others work on."""
    trap = Trap(tmp_path / "sprung")
    launcher = ManualLauncher(slots_per_worker=1, needs_network=place == "tls")
    executor = BatchExecutor(2, launcher=launcher)
    held = executor.submit(double, 4)
    liar = Inside(launcher, 1)
    lease = liar.take()
    liar.send(draining=True)  # it is given nothing more
    secret = executor.submit(len, bytes(300_000))
    honest = start_worker(launcher.wait(2, 20)[-1].contact, launcher.launches[-1].launch_id)
    try:
        assert secret.result(30) == 300_000
        before = executor.stats().duplicates
        wrong = [n for n in (*range(200), 2**63, 2**64 - 1) if n != lease]
        own = liar.welcome.first_blob + 1
        with unharmed(executor):
            for _ in range(20):
                liar.send(
                    results=result_of(*wrong, value=trap),
                    failures=[
                        pb.Failure(lease=n, kind=pb.Failure.RAISED, payload=trap.pickled())
                        for n in wrong
                    ],
                    started=wrong,
                    returned=wrong,
                    output=[pb.Output(lease=n, number=n, data=b"") for n in wrong],
                )
            for blob in (*range(8), own, 2**64 - 1):
                assert liar.fetch(blob) is grpc.StatusCode.NOT_FOUND
            chunk = pb.Chunk(data=b"abc").SerializeToString()
            wrong_end = pb.Chunk(crc32=1).SerializeToString()
            garbage = b"\xff\xff\xff"
            deflated = pb.Chunk(data=b"not zlib", deflated=True).SerializeToString()
            unauthenticated = grpc.StatusCode.UNAUTHENTICATED
            for blob, size, of, chunks, code in (
                (own, 3, lease, (chunk, wrong_end), grpc.StatusCode.DATA_LOSS),
                (own, 3, lease, (chunk,), grpc.StatusCode.DATA_LOSS),
                (own, 3, lease, (chunk, chunk), grpc.StatusCode.DATA_LOSS),
                (own, 3, lease, (garbage,), grpc.StatusCode.DATA_LOSS),
                (own, 3, lease, (deflated,), grpc.StatusCode.DATA_LOSS),
                (own, 2**62, lease, (chunk,), unauthenticated),
                (own, -3, lease, (chunk,), unauthenticated),
                (own, "9" * 19, lease, (chunk,), unauthenticated),
                (own, "three", lease, (chunk,), unauthenticated),
                (1, 3, lease, (chunk,), unauthenticated),
                (own + 2**40, 3, lease, (chunk,), unauthenticated),
                (own, 3, lease + 10**6, (chunk,), False),
                (own, 3, 0, (chunk,), False),
            ):
                assert liar.deliver(*chunks, blob=blob, size=size, lease=of) == code
            assert not held.done()
            for value in ("mine", "again", "once more"):
                liar.send(results=result_of(lease, value=value))
            assert held.result(20) == "mine"
        assert executor.stats().duplicates - before >= 20 * len(wrong)
        assert refusals(executor)["foreign part"] >= 6
        assert not trap.path.exists()
        assert not executor._driver.sessions[liar.welcome.worker_id].printed  # type: ignore[union-attr]
        liar.close()
        assert executor.submit(double, 8).result(30) == 16
    finally:
        executor.kill_workers()
        honest.kill()
        honest.communicate()


def test_a_thief_does_not_take_the_place_of_a_live_worker() -> None:
    """The right key and the right name, while the worker that has it lives."""
    launcher = ManualLauncher(slots_per_worker=1)
    executor = BatchExecutor(1, launcher=launcher)
    held = executor.submit(double, 4)
    owner = Inside(launcher, 1)
    lease = owner.take()
    contact = launcher.launches[0].contact
    for _ in range(5):
        thief = peer(contact)
        answer = thief.enrol(contact.executor_id, owner.launch_id, contact.key)
        assert "connected already" in answer.refusal.reason
        thief.close()
    owner.send(results=result_of(lease, value=8))
    assert held.result(20) == 8
    wait_until(lambda: refusals(executor) == {"not expected": 5})
    end_by_hand(executor, launcher, owner)


def test_what_was_on_its_way_to_a_worker_that_took_its_leave_had_not_begun() -> None:
    """It runs elsewhere, also if it is to run at most once, and no attempt is lost."""
    launcher = ManualLauncher(slots_per_worker=1)
    executor = BatchExecutor(1, launcher=launcher, retries=0)
    future = executor.submit(double, 4)
    worker = Inside(launcher, 1)
    worker.send(ready=True)
    worker.take()
    worker.send(draining=True)
    worker.send(goodbye=True)
    worker.finish()
    assert not [said for said in worker.answers if said.tasks.leases]
    launcher.end(worker.launch_id)
    other = Inside(launcher, 2)
    other.send(number=1, results=result_of(other.take(), value=8))
    assert future.result(20) == 8
    assert executor.stats().lost_attempts == 0
    end_by_hand(executor, launcher, worker, other)


@pytest.mark.parametrize("slots", [0, 2**32 - 1])
def test_a_worker_without_a_sensible_number_of_slots_is_refused(slots: int) -> None:
    """Tasks are not sent where there is no room, nor without bounds."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    future = executor.submit(double, 1)
    launch = launcher.wait(1, 20)[0]
    worker = peer(launch.contact)
    answer = worker.enrol(launch.contact.executor_id, "1", launch.contact.key, slots=slots)
    assert "slots" in answer.refusal.reason
    assert "slots" in str(future.exception(20))
    end_by_hand(executor, launcher, worker)


_NAN, _INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "said",
    [
        {"results": pb.Results(leases=[1, 2], payloads=[b""], seconds=[0.0])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[_NAN])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[_INF])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[-1.0])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[0.0], direct=[7])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[0.0], composed=[0])},
        {
            "results": pb.Results(
                leases=[1],
                payloads=[b"N."],
                seconds=[0.0],
                composed=[0],
                blob_counts=[1],
                kept=[0],
                blobs=[pb.Blob(id=1, size=3)],
            )
        },
        {
            "results": pb.Results(
                leases=[1],
                payloads=[b"N."],
                seconds=[0.0],
                direct=[0],
                composed=[0],
                blob_counts=[0],
            )
        },
        {"output": [pb.Output(data=b"\n" + bytes(4 * MIB), stream=2)], "times": 20},
        {"started": [1] * 1_100_000},
        {"slot_groups": [77] * 1_100_000},
        # As objects these would take up half a gigabyte, and the loop's time for ten seconds.
        {"raw": b"\x22\x00" * 4_000_000},
        {"raw": b"\x3a\x00" * 4_000_000},
    ],
    ids=[
        "columns",
        "nan",
        "inf",
        "negative",
        "index",
        "counts",
        "foreign blob",
        "twice",
        "output",
        "many leases",
        "many groups",
        "many failures",
        "many pieces of output",
    ],
)
def test_a_malformed_message_ends_its_session(
    said: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing else: its task runs elsewhere, as if the worker had died."""
    times, raw = said.get("times", 1), said.get("raw", b"")
    parts = {name: part for name, part in said.items() if name not in ("times", "raw")}
    before = memory_in_use()
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher, output="logging", retries=3)
    # What is printed is not shown until the end.
    shown, logger = threading.Event(), logging.getLogger("cloudexec.output")
    logger.addFilter(stopped := lambda record: shown.wait() and False)
    future = executor.submit(double, 1)
    vandal = Inside(launcher, 1)
    vandal.take()
    vandal.send(ready=True)
    for _ in range(times):
        vandal.send_raw(raw) if raw else vandal.send(**parts)
    with contextlib.suppress(grpc.RpcError):
        list(vandal.answers)  # until it ends
    vandal.close()
    shown.set()
    logger.removeFilter(stopped)
    launcher.end(vandal.launch_id)
    assert refusals(executor) == {"malformed message": 1}
    if not times > 1:  # what is printed may wait to be shown, up to a limit
        assert memory_in_use() - before < 120 * MIB
    other = Inside(launcher, 2)
    other.send(results=result_of(other.take(), value=2))
    assert future.result(20) == 2
    end_by_hand(executor, launcher, other)
    assert "internal error" not in caplog.text


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "the process that ran"),
        (b"garbage", "cannot be unpickled"),
        (pickle.dumps(5), "cannot be unpickled"),
        (pickle.dumps((pickle.dumps(5), "text")), "int is no exception"),
        (pickle.dumps((b"garbage", 7)), "cannot be unpickled"),
        (b"\x80\x05" + b"(" * 100_000 + b".", "cannot be unpickled"),
        # A string of 2**62 bytes, it says.
        (b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b"x.", "cannot be unpickled"),
    ],
    ids=["nothing", "garbage", "number", "no exception", "text", "marks", "huge"],
)
@pytest.mark.parametrize("kind", [pb.Failure.RAISED, pb.Failure.OUTGREW, 99])
def test_a_failure_that_is_none_fails_one_task(payload: bytes, words: str, kind: int) -> None:
    """An exception that cannot be unpickled, or says nothing, is that task's alone."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher, retries=0)
    future = executor.submit(double, 1)
    worker = Inside(launcher, 1)
    failure = pb.Failure(
        lease=worker.take(), payload=payload, message="much", seconds=_NAN, exit_code=-77
    )
    failure.kind = kind  # type: ignore[assignment]
    worker.send(failures=[failure])
    error = str(future.exception(20))
    if payload or kind != pb.Failure.OUTGREW:
        assert words in error
    executor._driver.machine.validate()  # type: ignore[union-attr]
    following = executor.submit(double, 2)
    worker.send(results=result_of(worker.take(), value=4))
    assert following.result(20) == 4
    end_by_hand(executor, launcher, worker)


def test_a_result_that_is_a_bomb_fails_in_the_thread_that_asks() -> None:
    """What does not unpickle is that future's error, and the loop goes on meanwhile."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    # Pickles that are none, that nest, and that raise.
    raising = pickle.dumps(Trap(Path("/")))
    bombs = (b"", b"garbage", b"\x80\x05" + b"]" * 10 + b"(" * 10**6, raising)
    tasks = [executor.submit(double, 1) for _ in bombs]
    worker = Inside(launcher, 1)
    for bomb in bombs:
        lease = worker.take()
        worker.send(results=pb.Results(leases=[lease], payloads=[bomb], seconds=[0.0]))
    errors = [task.exception(20) for task in tasks]
    assert all(isinstance(error, PayloadError) for error in errors)
    assert executor._driver.broken is None  # type: ignore[union-attr]
    end_by_hand(executor, launcher, worker)


def test_an_initializer_that_failed_with_garbage_breaks_the_executor_with_a_message() -> None:
    """As any failed initializer does: the worker may say so, whatever it was."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    future = executor.submit(double, 1)
    worker = Inside(launcher, 1)
    worker.take()
    worker.send(initializer_failed=b"garbage")
    assert isinstance(future.exception(20), InitializerError)
    end_by_hand(executor, launcher, worker)


def test_no_group_but_its_own_is_killed_for_a_worker() -> None:
    """0 would be the client's own group, and 1 everything that it may kill."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    executor.submit(double, 1)
    worker = Inside(launcher, 1)
    worker.take()
    worker.send(slot_groups=[0, 1, 12345, 2**31, 2**32 - 1])
    session = executor._driver.sessions[worker.welcome.worker_id]  # type: ignore[union-attr]
    wait_until(lambda: session.slot_groups)
    assert session.slot_groups == [12345]
    end_by_hand(executor, launcher, worker)


def test_a_worker_gives_what_it_holds_open_no_more_memory_than_it_may() -> None:
    """Hundreds of requests for the same large argument, of which it takes nothing: a few are
    begun. The others are, when those are through."""
    launcher = ManualLauncher(needs_network=True)
    executor = BatchExecutor(1, launcher=launcher, objects=ObjectOptions(bucket=False))
    executor.submit(len, random.Random(1).randbytes(32 * MIB))
    greedy = Inside(launcher, 1)
    blob = greedy.take_message().blobs[0].id
    memory = memory_in_use()
    fetch = greedy.channel.unary_stream("/cloudexec.v1.TaskServer/Fetch")
    request = pb.FetchRequest(blob=blob).SerializeToString()
    calls = [fetch(request, metadata=greedy.token, timeout=60) for _ in range(300)]
    begun = [call for call in calls if _has_begun(call)]
    driver: Any = executor._driver
    session = driver.sessions[greedy.welcome.worker_id]
    wait_until(session.outgoing.locked)
    assert (memory_in_use() - memory) / MIB < 150
    for call in calls[:-1]:
        call.cancel()
    assert begun
    assert sum(len(chunk) for chunk in calls[-1]) > 32 * MIB
    end_by_hand(executor, launcher, greedy)


def _has_begun(call: Any) -> bool:
    return bool(call.initial_metadata) and not call.done()


def test_a_worker_begins_so_many_uploads_and_no_more() -> None:
    """Parts of an upload that is not completed cost money: for results that nobody waits for none
    is begun, for others a few hundred, and what a worker says of itself is one line."""
    with FakeAWS(calls_per_second=10_000) as aws:
        boto3.client("s3").create_bucket(Bucket="some-bucket")
        launcher = ManualLauncher(needs_network=True)
        executor = BatchExecutor(2, launcher=launcher, objects=ObjectOptions(bucket="some-bucket"))
        executor.submit(double, 1)
        waster = Inside(launcher, 1)
        lease = waster.take()
        store = waster.channel.unary_unary("/cloudexec.v1.TaskServer/Store")

        def ask(number: int, **facts: Any) -> Any:
            request = pb.StoreRequest(blob=waster.welcome.first_blob + number, **facts)
            answer = store(request.SerializeToString(), metadata=waster.token, timeout=20)
            return pb.StoreReply.FromString(answer)

        size, digests = 20 * MIB, [bytes(32)] * 3
        aws.clear_requests()
        unwanted = ask(1, size=size, sha256=bytes(32), part_sha256=digests, lease=lease + 5)
        assert not unwanted.accepted
        with pytest.raises(grpc.RpcError) as caught:
            ask(2, size=2**63, kept=True)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not [each for each in aws.requests if each.service == "s3"]
        small = {"size": 9 * MIB, "sha256": bytes(32), "kept": True}
        accepted = [ask(10 + number, **small).accepted for number in range(300)]
        assert 200 < sum(accepted) < 300
        assert not accepted[-1]
        end_by_hand(executor, launcher, waster)


def test_what_a_worker_says_of_itself_is_one_short_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However many lines it says, and however much."""
    with FakeAWS(calls_per_second=10_000):
        launcher = ManualLauncher(needs_network=True)
        executor = BatchExecutor(2, launcher=launcher, objects=ObjectOptions(bucket="there"))
        executor.submit(double, 1)
        liar = Inside(launcher, 1)
        liar.take()
        locate = liar.channel.unary_unary("/cloudexec.v1.TaskServer/Locate")
        forged = "x\nERROR cloudexec: all is lost\x1b[2J" + "y" * MIB
        request = pb.LocateRequest(failed=forged).SerializeToString()
        locate(request, metadata=liar.token, timeout=20)
        said = [each.getMessage() for each in caplog.records if "all is lost" in each.getMessage()]
        assert len(said) == 1
        assert said[0].isprintable()
        assert len(said[0]) < 800
        end_by_hand(executor, launcher, liar)


class _Started(ManualLauncher):
    """Knows the process of a worker, as the local launcher does."""

    pid = 0

    def pid_of(self, executor_id: str, launch_id: str) -> int:
        return self.pid


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[str]]:
    """A process of this user that has a file open, and has nothing to do with us."""
    script = (
        "import os; f = os.memfd_create('x'); os.write(f, b's' * 100_000); print(f, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script + "; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no files by descriptor here")
@pytest.mark.parametrize("claimed", ["its own", "another's"])
def test_a_worker_names_files_of_its_own_process_alone(
    stranger: subprocess.Popen[str], claimed: str
) -> None:
    """It may say what it likes of which process it is: where that was started here, it is known."""
    assert stranger.stdout is not None
    number = stranger.stdout.readline().strip()
    launcher = _Started()
    launcher.pid = stranger.pid if claimed == "its own" else os.getpid()
    assert is_descendant(stranger.pid, os.getpid())
    if claimed == "another's":  # a sibling: not this process, nor one that it started
        sibling = subprocess.Popen(["sleep", "60"])
        launcher.pid = sibling.pid
    executor = BatchExecutor(1, launcher=launcher, retries=3)
    future = executor.submit(double, 1)
    worker = Inside(launcher, 1, pid=stranger.pid)
    own = worker.welcome.first_blob + 1
    path = f"/proc/{stranger.pid}/fd/{number}"
    head = struct.pack("<BQBQ", 4, 1, 3, 0)
    worker.send(
        ready=True,
        results=pb.Results(
            leases=[worker.take()],
            payloads=[head],
            seconds=[0.0],
            composed=[0],
            blob_counts=[1],
            blobs=[pb.Blob(id=own, number=1, size=100_000, path=path)],
        ),
    )
    if claimed == "its own":
        assert isinstance(future.exception(20), PayloadError)  # it is no pickle, but it was read
        assert not refusals(executor)
    else:
        with contextlib.suppress(grpc.RpcError):
            list(worker.answers)
        assert refusals(executor) == {"malformed message": 1}
        assert not future.done()
        sibling.kill()
        sibling.wait()
    end_by_hand(executor, launcher, worker)


def test_the_direct_socket_is_not_held_up_by_those_who_say_nothing() -> None:
    """A few hundred silent, trickling and lying connections beside a large payload."""
    with executor_at("unix") as executor:
        executor.submit(double, 1).result(30)
        driver: Any = executor._driver
        connections = []
        for number in range(200):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(driver.service.direct_path)
            with contextlib.suppress(OSError):
                connection.sendall(random.Random(number).randbytes(number % 30))
            connections.append(connection)
        data = os.urandom(3_000_000)
        assert executor.submit(bytes, data).result(30) == data
        for connection in connections:
            connection.close()
        assert executor.submit(bytes, data).result(30) == data
