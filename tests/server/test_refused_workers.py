"""Workers that are refused, and do not wait to hear of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hostile_peers import double, end_by_hand, refusals, wait_until

from cloudexec import BatchExecutor, _enrolment
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server.rpc.enrolment import Enrolment
from cloudexec.testing import ManualLauncher

pytestmark = pytest.mark.timeout(60)


class _Call:
    """A call of gRPC's whose peer hangs up while its refusal is written."""

    def __init__(self, contact: Any, identity: str, **changes: Any) -> None:
        nonce = _enrolment.make_nonce()
        self._contact, self._identity, self._nonce = contact, identity, nonce
        self._said = [
            pb.WorkerMessage(
                hello=pb.Hello(
                    wire_version=_enrolment.WIRE_VERSION,
                    executor_id=contact.executor_id,
                    identity=identity,
                    python_version=_enrolment.python_version(),
                    cloudpickle_version="3.0.0",
                    nonce=nonce,
                    **{"slots": 1, **changes},
                )
            )
        ]

    def peer(self) -> str:
        return "ipv4:192.0.2.1:1"

    async def read(self) -> bytes:
        return self._said.pop(0).SerializeToString()

    async def write(self, message: pb.ServerMessage) -> None:
        if message.HasField("refusal"):
            raise asyncio.CancelledError
        nonces = self._nonce, message.challenge.nonce
        contact = self._contact
        mac = _enrolment.proof(contact.key, "worker", contact.executor_id, self._identity, *nonces)
        self._said.append(pb.WorkerMessage(proof=pb.Proof(mac=mac)))


@pytest.mark.parametrize("slots", [0, 1])
def test_what_it_was_refused_for_is_known(slots: int) -> None:
    """A worker that nobody expects is counted; one that does not fit fails its launch."""
    launcher = ManualLauncher(slots_per_worker=1, needs_network=True)
    executor = BatchExecutor(1, launcher=launcher)
    future = executor.submit(double, 1)
    contact = launcher.wait(1, 20)[0].contact
    driver = executor._driver
    assert driver is not None
    call = _Call(contact, "1" if slots == 0 else "77", slots=slots)

    async def enrol() -> None:
        with pytest.raises(asyncio.CancelledError):
            await Enrolment(driver.service).enrol(call)

    driver.portal.run(enrol()).result(20)
    if slots == 0:
        assert "a worker cannot have 0 slots" in str(future.exception(20))
    else:
        wait_until(lambda: refusals(executor) == {"not expected": 1})
    end_by_hand(executor, launcher)
