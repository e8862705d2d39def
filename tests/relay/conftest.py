"""Fixtures of the relay's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from relay_helpers import RelayLauncher, RelayProcess


@pytest.fixture
def relay() -> Iterator[RelayProcess]:
    """A relay on this machine."""
    process = RelayProcess()
    yield process
    process.kill()


@pytest.fixture
def launcher(relay: RelayProcess) -> Iterator[Callable[..., RelayLauncher]]:
    """A function that makes launchers whose workers connect to the relay."""
    made: list[RelayLauncher] = []

    def make(address: str = "", **options: Any) -> RelayLauncher:
        made.append(RelayLauncher(address or relay.address, **options))
        return made[-1]

    yield make
    for each in made:
        each.close_workers()
