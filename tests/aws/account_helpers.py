"""Sets an emulated account up and removes that again, for tests of what launchers need there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.doctor import Check, examine
from cloudexec._aws.profile import Profile
from cloudexec._aws.remnants import Remnant
from cloudexec._aws.setup import SetupOptions, up
from cloudexec._aws.steps import Event
from cloudexec._aws.teardown import down

__all__ = ["INTERVAL", "checks", "eventually", "ignore", "remove", "set_up"]

INTERVAL = 0.02


def ignore(event: Event) -> None:
    """Show no steps."""


def set_up(*launchers: str, **options: Any) -> Profile:
    """Do what ``cloudexec up --with`` does."""

    async def run() -> Profile:
        async with AwsClients() as clients:
            wanted = SetupOptions(launchers=launchers or None, **options)
            return await up(clients, wanted, ignore, interval=INTERVAL)

    return asyncio.run(run())


def remove(report: Callable[[Event], None] = ignore) -> tuple[Remnant, ...]:
    """Do what ``cloudexec down`` does; return what is left."""

    async def run() -> tuple[Remnant, ...]:
        async with AwsClients() as clients:
            return await down(clients, "default", report, interval=INTERVAL)

    return asyncio.run(run())


def checks() -> dict[str, Check]:
    """Do what ``cloudexec doctor`` does; return its checks by name."""
    found = asyncio.run(examine("default", lambda check: None))
    return {each.name: each for each in found}


def eventually(condition: Callable[[], Any], timeout: float = 50.0) -> Any:
    """Call ``condition`` until its result is true; return the result."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
    return found
