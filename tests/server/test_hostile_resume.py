"""Those who come back as somebody else: what it takes to go on with a session."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from hostile_peers import (
    Inside,
    channel,
    double,
    end_by_hand,
    refusals,
    result_of,
    wait_until,
)
from test_enrolment import Peer

from cloudexec import BatchExecutor, _enrolment
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._wire import stream
from cloudexec._wire.channel import TOKEN_KEY
from cloudexec.testing import ManualLauncher

pytestmark = pytest.mark.timeout(60)


class _Scene:
    """An executor over TLS, and a worker that holds its one task."""

    def __init__(self) -> None:
        self.launcher = ManualLauncher(needs_network=True)
        self.executor = BatchExecutor(1, launcher=self.launcher, retries=3)
        self.future = self.executor.submit(double, 4)
        self.owner = Inside(self.launcher, 1)
        self.lease = self.owner.take()
        self.contact = self.owner.contact
        self.token = self.owner.welcome.session_token
        self.key = _enrolment.session_key(self.contact.key, self.token)
        self.peers: list[Peer] = [self.owner]

    def dial(self, *, name: bytes | None = None, identity: str = "1") -> tuple[Peer, Any]:
        """Say that one has a session; return who said so, and the nonces."""
        stranger = Peer(self.contact.target, channel(self.contact))
        self.peers.append(stranger)
        resume = _enrolment.session_name(self.token) if name is None else name
        return stranger, stranger.hello(self.contact.executor_id, identity, resume=resume)

    def proof(self, key: bytes, nonces: Any, identity: str = "1", role: str = "worker") -> bytes:
        return _enrolment.proof(key, role, self.contact.executor_id, identity, *nonces)

    def assert_owner_goes_on(self) -> None:
        """The worker that has the session does as if nobody had been there."""
        self.owner.send(number=1, results=result_of(self.lease, value=8))
        assert self.future.result(20) == 8
        assert self.executor.stats().workers.lost == 0


@pytest.fixture
def scene() -> Iterator[_Scene]:
    scene = _Scene()
    yield scene
    end_by_hand(scene.executor, scene.launcher, *scene.peers)


def _refused(stranger: Peer, mac: bytes, **more: Any) -> grpc.StatusCode:
    stranger.send(proof=pb.Proof(mac=mac, **more))
    with pytest.raises(grpc.RpcError) as caught:
        next(stranger.answers)
    return caught.value.code()  # type: ignore[no-any-return, attr-defined]


@pytest.mark.parametrize("is_noticed", [True, False])
def test_a_worker_whose_welcome_was_lost_is_welcomed_again(is_noticed: bool) -> None:
    """It has no token to resume with. Another process with its identity is still refused."""
    launcher = ManualLauncher(needs_network=True)
    executor = BatchExecutor(1, launcher=launcher, retries=0)
    future = executor.submit(double, 4)
    contact = launcher.wait(1)[0].contact
    peers: list[Peer] = []

    def enrol(process: bytes) -> Any:
        peers.append(Peer(contact.target, channel(contact)))
        return peers[-1].enrol(contact.executor_id, "1", contact.key, process=process)

    def assert_refused(process: bytes) -> None:
        assert "connected already" in enrol(process).refusal.reason

    welcome = enrol(b"one").welcome
    (lease,) = next(peers[0].answers).tasks.leases
    if is_noticed:
        peers[0].close()
        wait_until(lambda: executor.stats().workers.cut)
    assert_refused(b"another")
    assert_refused(b"")
    assert enrol(b"one").welcome == welcome
    again = peers[-1]
    assert list(next(again.answers).tasks.leases) == [lease]
    assert_refused(b"another")
    again.send(number=1, results=result_of(lease, value=8))
    assert future.result(20) == 8
    assert_refused(b"one")  # it has the token, as it could not have sent a result without it
    stats = executor.stats()
    assert (stats.lost_attempts, stats.workers.lost) == (0, 0)
    end_by_hand(executor, launcher, *peers)


@pytest.mark.parametrize("known", ["key", "token", "neither", "server's proof", "another proof"])
def test_neither_key_nor_token_alone_goes_on_with_a_session(scene: _Scene, known: str) -> None:
    """Nor a proof that the server gave, nor one that was recorded."""
    stranger, nonces = scene.dial()
    others = (bytes(32), nonces[1])
    mac = {
        "key": scene.proof(scene.contact.key, nonces),
        "token": scene.proof(_enrolment.session_key(bytes(32), scene.token), nonces),
        "neither": bytes(32),
        "server's proof": scene.proof(scene.key, nonces, role="server"),
        "another proof": scene.proof(scene.key, others),
    }[known]
    assert _refused(stranger, mac) is grpc.StatusCode.UNAUTHENTICATED
    assert refusals(scene.executor) == {"no proof": 1}
    scene.assert_owner_goes_on()


def test_a_session_that_there_is_not_is_not_gone_on_with(scene: _Scene) -> None:
    """Who knows the key, but names another session, or somebody else's, is told that it is gone;
    tasks and blobs it gets none."""
    for name, identity in (
        (bytes(32), "1"),
        (b"x", "1"),
        (_enrolment.session_name(scene.token), "2"),
        (_enrolment.session_name(scene.token), ""),
    ):
        stranger, nonces = scene.dial(name=name, identity=identity)
        mac = scene.proof(scene.contact.key, nonces, identity)
        stranger.send(proof=pb.Proof(mac=mac))
        assert next(stranger.answers).HasField("refusal")
        # And whoever could read the session's own proof out of that has another identity's.
        stranger, nonces = scene.dial(name=name, identity=identity)
        mac = scene.proof(scene.key, nonces, identity)
        assert _refused(stranger, mac) is grpc.StatusCode.UNAUTHENTICATED
    scene.assert_owner_goes_on()


@pytest.mark.parametrize("received", [7, 2**31, 2**64 - 1])
def test_nobody_has_messages_that_were_not_sent(scene: _Scene, received: int) -> None:
    """Who has proved all and says so is refused, and the session is as it was."""
    stranger, nonces = scene.dial()
    code = _refused(stranger, scene.proof(scene.key, nonces), received=received)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusals(scene.executor) == {"malformed hello": 1}
    scene.assert_owner_goes_on()


def test_who_comes_back_takes_over_and_a_proof_is_good_once(scene: _Scene) -> None:
    """The connection before ends, what was sent there twice counts once, what was not acknowledged
    is sent again, and the same proof is not taken a second time."""
    back, nonces = scene.dial()
    mac = scene.proof(scene.key, nonces)
    back.send(proof=pb.Proof(mac=mac, received=0))
    assert next(back.answers).resumed
    assert list(next(back.answers).tasks.leases) == [scene.lease]
    with contextlib.suppress(grpc.RpcError):
        assert not [said for said in scene.owner.answers if said.tasks.leases]
    thief, _ = scene.dial()
    assert _refused(thief, mac) is grpc.StatusCode.UNAUTHENTICATED
    before = scene.executor.stats().duplicates
    for _ in range(3):
        back.send(number=1, results=result_of(scene.lease, value=8))
    assert scene.future.result(20) == 8
    assert scene.executor.stats().duplicates == before
    assert scene.executor.stats().workers.lost == 0


@pytest.mark.parametrize(
    "numbers",
    [{"number": 2}, {"number": 2**64 - 1}, {"number": 1, "received": 9}, {"received": 2**64 - 1}],
    ids=["gap", "last", "unsent", "all"],
)
def test_numbers_that_cannot_be_end_the_session(scene: _Scene, numbers: dict[str, int]) -> None:
    """Its task is run elsewhere; nothing of the message counts."""
    scene.owner.send(results=result_of(scene.lease, value="false"), **numbers)
    with contextlib.suppress(grpc.RpcError):
        list(scene.owner.answers)
    assert refusals(scene.executor) == {"malformed message": 1}
    scene.launcher.end("1")
    other = Inside(scene.launcher, 2)
    other.send(number=1, results=result_of(other.take(), value=8))
    assert scene.future.result(20) == 8
    scene.peers.append(other)


def test_a_worker_that_acknowledges_nothing_is_cut_off(
    scene: _Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it may still have to be sent again is kept, and is not to grow for ever."""
    monkeypatch.setattr(stream, "_MOST_KEPT_BYTES", 1024 * 1024)
    tasks = [scene.executor.submit(len, bytes(50_000)) for _ in range(60)]
    owner, sent = scene.owner, 0
    leases = [scene.lease]
    with contextlib.suppress(grpc.RpcError, StopIteration):  # until it is cut off
        while True:
            for lease in leases:
                sent += 1
                payload = pickle.dumps(8)
                results = pb.Results(leases=[lease], payloads=[payload], seconds=[1.0])
                owner.send(number=sent, results=results)
            leases = list(next(owner.answers).tasks.leases)
    assert refusals(scene.executor) == {"malformed message": 1}
    assert 10 < sum(task.done() for task in tasks) < 60


def test_a_token_is_worth_nothing_after_its_session(scene: _Scene) -> None:
    """It fetches nothing, and no session goes on under it."""
    scene.owner.send(number=5)
    wait_until(lambda: refusals(scene.executor))
    scene.launcher.end("1")
    wait_until(lambda: scene.executor.stats().workers.lost == 1)
    call = scene.owner.channel.unary_unary("/cloudexec.v1.TaskServer/Fetch")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", metadata=((TOKEN_KEY, scene.token),), timeout=20)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    stranger, nonces = scene.dial()
    assert _refused(stranger, scene.proof(scene.key, nonces)) is grpc.StatusCode.UNAUTHENTICATED
