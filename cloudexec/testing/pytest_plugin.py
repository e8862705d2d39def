"""The pytest fixture ``fake_aws``; pytest loads it through the entry point ``pytest11``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cloudexec.testing._aws.fake import FakeAWS

__all__ = ["fake_aws"]


@pytest.fixture
def fake_aws() -> Iterator[FakeAWS]:
    """A ``cloudexec.testing.FakeAWS`` in process mode, entered for one test.

    SIGKILL follows SIGTERM after 2 seconds instead of AWS's 30, and a thousand calls per second are
    taken instead of 50.
    """
    from cloudexec.testing import FakeAWS

    with FakeAWS(grace=2.0, calls_per_second=1000.0) as aws:
        yield aws
