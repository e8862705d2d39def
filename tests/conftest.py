"""What holds for every test."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

import pytest

pytest_plugins = ["suite_plugin", "load_plugin"]

# A shell that starts the run in the background has SIGINT ignored, and children inherit that:
# those that are to be interrupted would not notice.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And one that outlives its terminal, SIGHUP.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def restless() -> Iterator[Callable[[float], None]]:
    """Say after how many seconds this test's threads take turns."""
    before = sys.getswitchinterval()
    yield sys.setswitchinterval
    sys.setswitchinterval(before)
