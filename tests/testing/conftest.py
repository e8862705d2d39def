"""Accounts of the fake AWS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("moto")

from fake_helpers import Account

from cloudexec.testing import FakeAWS

if TYPE_CHECKING:
    from _pytest.config import Config


def pytest_configure(config: Config) -> None:
    """Load the fixture ``fake_aws`` where the package is not installed with its entry points."""
    from cloudexec.testing import pytest_plugin

    if not config.pluginmanager.is_registered(pytest_plugin):
        config.pluginmanager.register(pytest_plugin)


@pytest.fixture
def aws() -> Iterator[FakeAWS]:
    with FakeAWS(grace=1.0, step=0.005, calls_per_second=1000.0) as aws:
        yield aws


@pytest.fixture
def account(aws: FakeAWS) -> Iterator[Account]:
    account = Account(aws)
    yield account
    account.close()


@pytest.fixture
def spot_account(aws: FakeAWS) -> Iterator[Account]:
    account = Account(aws, spot=True)
    yield account
    account.close()
