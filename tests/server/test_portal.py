"""The event loop that all executors of a process share, and its end."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError

import pytest

from cloudexec._server.portal import Portal

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize("rounds", range(6))
def test_who_waits_for_the_loop_when_it_ends_is_told(rounds: int) -> None:
    """Whether the work is done just before the end, or has to be given up; nobody waits on."""

    async def work() -> int:
        for _ in range(rounds):
            await asyncio.sleep(0)
        return rounds

    portal = Portal()
    portal._users = 1
    gate = threading.Event()
    portal.post(gate.wait)
    portal.release()
    waiting = portal.run(work())
    gate.set()
    try:
        assert waiting.result(10) == rounds
    except CancelledError:
        pass
    portal.thread.join(10)
    assert not portal.thread.is_alive()
    with pytest.raises(RuntimeError, match="has ended"):
        portal.run(work())
