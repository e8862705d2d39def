"""A helper for several tests of launchers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def eventually(condition: Callable[[], Any], timeout: float = 50.0) -> Any:
    """Call ``condition`` until its result is true; return the result."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)
