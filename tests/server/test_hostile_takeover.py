"""Workers that outlived their client, and tell the next one of more than they hold."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from hostile_peers import (
    Trap,
    channel,
    double,
    end_by_hand,
    refusals,
    result_of,
    wait_until,
)
from test_enrolment import Peer

from cloudexec import BatchExecutor, _enrolment
from cloudexec._launchers.base import LaunchEnd, Survivor
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server import takeover
from cloudexec.testing import ManualLauncher

pytestmark = pytest.mark.timeout(60)


class _Scene:
    """An executor whose client was killed, as far as its workers and its journal can tell.

    Attributes:
        tags: Of the tasks that the workers 1 and 2 had, with their leases.
    """

    def __init__(
        self,
        directory: Path,
        successor: type[ManualLauncher] = ManualLauncher,
        calls: Sequence[int] = (1, 2),
    ) -> None:
        journal, copy = directory / "journal", directory / "copy"
        launcher = ManualLauncher(needs_network=True)
        executor = BatchExecutor(2, launcher=launcher, journal=journal, min_workers=2)
        futures = [executor.submit(double, x) for x in (1, 2)]
        self.contact = launcher.wait(2, 20)[0].contact
        self.peers: list[Peer] = []
        self.token = b""
        self.tags: dict[str, tuple[int, bytes]] = {}
        for identity in ("1", "2"):
            answer = self.dial().enrol(self.contact.executor_id, identity, self.contact.key)
            self.token = answer.welcome.session_token
            for message in self.peers[-1].answers:
                if message.tasks.leases:
                    self.tags[identity] = message.tasks.leases[0], message.tasks.tags[0]
                    break
        wait_until(lambda: _left_in(journal, copy) == {"1", "2"})
        for future in futures:
            future.cancel(running=True)
        end_by_hand(executor, launcher, *self.peers)
        self.peers.clear()
        self.launcher = successor(needs_network=True)
        self._journal = copy
        if calls:
            self.start(calls)

    def start(self, calls: Sequence[int]) -> None:
        """Start the executor that comes after the killed client, and submit calls."""
        self.executor = BatchExecutor(2, launcher=self.launcher, journal=self._journal)
        self.futures: list[Future[int]] = [self.executor.submit(double, x) for x in calls]

    def dial(self) -> Peer:
        peer = Peer(self.contact.target, channel(self.contact))
        self.peers.append(peer)
        return peer

    def come_back(self, identity: str) -> Peer:
        """Enrol as a worker that had a session with the client before."""
        peer, contact = self.dial(), self.contact
        resume = _enrolment.session_name(self.token)
        nonces = peer.hello(contact.executor_id, identity, resume=resume)
        mac = _enrolment.proof(contact.key, "worker", contact.executor_id, identity, *nonces)
        peer.send(proof=pb.Proof(mac=mac))
        answer = next(peer.answers)
        assert answer.HasField("welcome")
        self.token = answer.welcome.session_token
        return peer

    def hold(self, identity: str, *held: tuple[int, bytes]) -> Peer:
        """Come back, and say what one holds."""
        peer = self.come_back(identity)
        holding = pb.Holding(leases=[each[0] for each in held], tags=[each[1] for each in held])
        peer.send(number=1, holding=holding)
        return peer


def _left_in(journal: Path, copy: Path) -> set[str]:
    """Copy a journal that is in use; say which launches its client would leave."""
    for suffix in ("", "-wal"):
        shutil.copy(f"{journal}{suffix}", f"{copy}{suffix}")
    with contextlib.closing(sqlite3.connect(copy)) as opened:
        row = opened.execute("SELECT value FROM state WHERE name = 'takeover'").fetchone()
    return set() if row is None else {launch for launch, _ in json.loads(row[0][16:])["launches"]}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[_Scene]:
    scene = _Scene(tmp_path)
    yield scene
    end_by_hand(scene.executor, scene.launcher, *scene.peers)


def test_workers_hand_over_what_they_held(scene: _Scene) -> None:
    """As the ones do that mean well: what follows differs from this in one thing each."""
    for identity in ("1", "2"):
        peer = scene.hold(identity, scene.tags[identity])
        peer.send(number=2, results=result_of(scene.tags[identity][0], value=int(identity) * 10))
    assert [future.result(20) for future in scene.futures] == [10, 20]
    stats = scene.executor.stats()
    assert (stats.workers.taken_over, stats.tasks.taken_over) == (2, 2)
    story = str(scene.executor.explain(scene.futures[0]))
    assert "sent to worker-1: by an earlier process, which was killed" in story


def test_who_is_cut_off_before_it_could_say_what_it_holds(scene: _Scene) -> None:
    """It gets nothing before it has said so over the next connection."""
    peer = scene.come_back("1")
    wait_until(lambda: scene.executor.stats().workers.slots)  # its welcome was sent before that
    peer.close()
    token, contact = scene.token, scene.contact
    wait_until(lambda: scene.executor.stats().workers.cut == 1)
    peer = scene.dial()
    nonces = peer.hello(contact.executor_id, "1", resume=_enrolment.session_name(token))
    key = _enrolment.session_key(contact.key, token)
    mac = _enrolment.proof(key, "worker", contact.executor_id, "1", *nonces)
    peer.send(proof=pb.Proof(mac=mac))
    assert next(peer.answers).resumed
    wait_until(lambda: scene.executor.stats().workers.reconnected == 1)
    assert scene.executor.stats().workers.cut == 1
    lease, tag = scene.tags["1"]
    peer.send(number=1, holding=pb.Holding(leases=[lease], tags=[tag]))
    wait_until(lambda: scene.executor.stats().workers.cut == 0)
    peer.send(number=2, results=result_of(lease, value=10))
    assert scene.futures[0].result(20) == 10


@pytest.mark.parametrize(
    "lie", ["another's", "another lease", "altered", "garbage", "short", "twice"]
)
def test_nobody_gets_what_it_was_not_given(scene: _Scene, lie: str, tmp_path: Path) -> None:
    """Whoever says that it holds it is cut off, and what it says came of it is not looked at."""
    trap = Trap(tmp_path / "sprung")
    lease, tag = scene.tags["1"]
    other_lease, other_tag = scene.tags["2"]
    held: dict[str, list[tuple[int, bytes]]] = {
        "another's": [(other_lease, other_tag)],
        "another lease": [(lease + 1, tag)],
        "altered": [(lease, tag[:-1] + bytes((tag[-1] ^ 1,)))],
        "garbage": [(lease, b"\xff" * 100)],
        "short": [(lease, tag[:16])],
        "twice": [(lease, tag)],
    }
    liar = scene.hold("1", *held[lie])
    if lie == "twice":
        liar.send(number=2, holding=pb.Holding(leases=[lease], tags=[tag]))
    liar.send(number=3 if lie == "twice" else 2, results=result_of(lease, other_lease, value=trap))
    wait_until(lambda: refusals(scene.executor).get("malformed message") == 1)
    honest = scene.hold("2", (other_lease, other_tag))
    honest.send(number=2, results=result_of(other_lease, value=20))
    assert scene.futures[1].result(20) == 20
    assert not scene.futures[0].done()
    assert not trap.path.exists()


def test_who_was_not_taken_over_holds_nothing(scene: _Scene) -> None:
    """A new worker of the same executor says so with a tag that is right."""
    lease, tag = scene.tags["1"]
    for identity in ("1", "2"):
        peer = scene.dial()
        answer = peer.enrol(scene.contact.executor_id, identity, scene.contact.key)
        assert answer.HasField("welcome")
        peer.send(number=1, holding=pb.Holding(leases=[lease], tags=[tag]))
    wait_until(lambda: refusals(scene.executor).get("malformed message") == 2)
    assert scene.executor.stats().tasks.taken_over == 0


def test_a_key_that_was_recorded_is_not_enough(scene: _Scene) -> None:
    """Nor is the name of a session that there was: the proof is over what is said now."""
    peer = scene.dial()
    resume = _enrolment.session_name(scene.token)
    peer.hello(scene.contact.executor_id, "1", resume=resume)
    peer.send(proof=pb.Proof(mac=bytes(32)))
    with pytest.raises(grpc.RpcError):
        next(peer.answers)
    assert refusals(scene.executor) == {"no proof": 1}


class _Prompt(ManualLauncher):
    """Says that a worker has ended before ``terminate()`` returns, as that of AWS Batch does."""

    def terminate(self, launch_ids: Sequence[str]) -> None:
        for launch_id in launch_ids:
            self.terminated.append(launch_id)
            on_end = self._on_end.get(launch_id)
            self._on_end[launch_id] = None
            if on_end is not None:
                on_end(launch_id, LaunchEnd("it was terminated", killed=True))


def test_a_result_that_comes_before_its_call_is_that_of_a_worker_taken_over(
    tmp_path: Path,
) -> None:
    scene = _Scene(tmp_path, calls=(1,))
    try:
        for identity in ("1", "2"):
            peer = scene.hold(identity, scene.tags[identity])
            peer.send(number=2, results=result_of(scene.tags[identity][0], value=int(identity)))
        assert scene.futures[0].result(20) == 1
        driver: Any = scene.executor._driver
        wait_until(lambda: any(claim.outcome for claim in driver.takeover._claims.values()))
        assert scene.executor.submit(double, 2).result(20) == 2
        assert scene.executor.stats().tasks.taken_over == 2
    finally:
        end_by_hand(scene.executor, scene.launcher, *scene.peers)


class _Asking(ManualLauncher):
    """Knows after a while which workers there are, as a platform's API may be slow."""

    asked = threading.Event()
    known = threading.Event()

    async def take_over(self, left: Any, on_end: Any) -> Mapping[str, Survivor]:
        self.asked.set()
        await asyncio.to_thread(self.known.wait, 30)
        return await super().take_over(left, on_end)


def test_who_comes_before_it_is_known_who_is_there_comes_again(tmp_path: Path) -> None:
    """And is no stranger, however long that takes."""
    scene = _Scene(tmp_path, _Asking, calls=())
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(scene.start, (1, 2))
        try:
            assert _Asking.asked.wait(20)
            with pytest.raises(grpc.RpcError) as told:
                scene.dial().hello(scene.contact.executor_id, "1")
            error: Any = told.value
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            _Asking.known.set()
            starting.result(20)
            for identity in ("1", "2"):
                peer = scene.hold(identity, scene.tags[identity])
                peer.send(number=2, results=result_of(scene.tags[identity][0], value=7))
            assert [future.result(20) for future in scene.futures] == [7, 7]
            assert scene.executor.stats().tasks.taken_over == 2
            assert scene.executor.stats().refused == 0
        finally:
            _Asking.known.set()
            starting.result(20)
            end_by_hand(scene.executor, scene.launcher, *scene.peers)


class _Behind(ManualLauncher):
    """Takes the second worker for one that has not started yet, as a platform's word may be old."""

    async def take_over(self, left: Any, on_end: Any) -> Mapping[str, Survivor]:
        found = await super().take_over(left, on_end)
        return {launch: Survivor(0, running=launch == "1") for launch in found}


@pytest.fixture
def behind(tmp_path: Path) -> Iterator[_Scene]:
    scene = _Scene(tmp_path, _Behind)
    yield scene
    end_by_hand(scene.executor, scene.launcher, *scene.peers)


def test_who_comes_late_keeps_what_nobody_was_sent(behind: _Scene) -> None:
    """Calls wait no longer for workers, and the one that it has is in a queue."""
    first = behind.hold("1", behind.tags["1"])
    wait_until(lambda: behind.executor.stats().tasks.waiting == 1)
    second = behind.hold("2", behind.tags["2"])
    wait_until(lambda: behind.executor.stats().tasks.taken_over == 2)
    first.send(number=2, results=result_of(behind.tags["1"][0], value=10))
    assert behind.futures[0].result(20) == 10
    second.send(number=2, results=result_of(behind.tags["2"][0], value=20))
    assert behind.futures[1].result(20) == 20
    assert behind.executor.stats().tasks.waiting == 0


def test_who_comes_too_late_lets_go_of_what_another_one_has(behind: _Scene) -> None:
    """The call was sent to the first worker meanwhile, and must not run twice."""
    first = behind.hold("1", behind.tags["1"])
    first.send(number=2, results=result_of(behind.tags["1"][0], value=10))
    (lease,) = next(message for message in first.answers if message.tasks.leases).tasks.leases
    second = behind.hold("2", behind.tags["2"])
    killed = next(message for message in second.answers if message.kill)
    assert list(killed.kill) == [behind.tags["2"][0]]
    first.send(number=3, results=result_of(lease, value=21))
    assert behind.futures[1].result(20) == 21


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """The journal of a client that was killed with 25 workers."""
    journal, copy = tmp_path / "journal", tmp_path / "copy"
    launcher = ManualLauncher(needs_network=True)
    executor = BatchExecutor(25, launcher=launcher, journal=journal, min_workers=25)
    wait_until(lambda: len(_left_in(journal, copy)) == 25)
    end_by_hand(executor, launcher)
    return copy


def test_workers_that_do_not_come_back_are_replaced(
    left: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are waited for, then ended; that is no failure of the launches that follow."""
    monkeypatch.setattr(takeover, "_SLACK", -5.0)
    launcher = _Prompt(needs_network=True)
    executor = BatchExecutor(25, launcher=launcher, journal=left)
    future = executor.submit(double, 4)
    assert not launcher.launches
    (launch,) = launcher.wait(1, 20)
    assert int(launch.launch_id) > 25
    assert sorted(map(int, launcher.terminated)) == list(range(1, 26))
    assert executor.stats().launch_failures == 0
    worker = Peer(launch.contact.target, channel(launch.contact))
    worker.enrol(launch.contact.executor_id, launch.launch_id, launch.contact.key)
    (lease,) = next(m for m in worker.answers if m.tasks.leases).tasks.leases
    worker.send(number=1, results=result_of(lease, value=8))
    assert future.result(20) == 8
    end_by_hand(executor, launcher, worker)


@pytest.mark.parametrize("damage", ["a byte", "half of it", "nothing left", "garbage", "huge"])
def test_what_was_left_is_damaged(
    left: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and the program goes on with workers of its own."""
    with contextlib.closing(sqlite3.connect(left, isolation_level=None)) as journal:
        (state,) = journal.execute("SELECT value FROM state").fetchone()
        spoilt: dict[str, bytes] = {
            "a byte": state[:100] + bytes((state[100] ^ 1,)) + state[101:],
            "half of it": state[: len(state) // 2],
            "nothing left": b"",
            "garbage": b"\xff" * 100,
            "huge": b"[" * 10_000_000,
        }
        journal.execute("UPDATE state SET value = ?", (spoilt[damage],))
    launcher = ManualLauncher(needs_network=True)
    executor = BatchExecutor(1, launcher=launcher, journal=left)
    assert "are not taken over: what it left is damaged" in caplog.text
    executor.submit(double, 4)
    (launch,) = launcher.wait(1, 20)
    assert launch.launch_id == "1"
    end_by_hand(executor, launcher)
