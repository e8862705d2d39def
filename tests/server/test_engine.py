"""What the client's side does when its own core fails."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from cloudexec import BatchExecutor, BrokenBatchExecutor


def test_after_an_internal_error_every_future_ends_and_nothing_is_left_running(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever waits is told: what runs, what waits for a slot, and what waits for another."""
    executor = BatchExecutor(1)
    running = executor.submit(time.sleep, 600)
    while not running.running():
        assert not running.done()
        threading.Event().wait(0.01)
    waiting = executor.submit(abs, -1)
    dependent = executor.submit(abs, waiting)
    driver: Any = executor._driver
    driver.post(object())  # no event that the core knows
    for future in (running, waiting, dependent):
        error = future.exception(30)
        assert isinstance(error, BrokenBatchExecutor)
        assert "internal error (KeyError" in str(error)
    assert "internal error while handling object" in caplog.text
    with pytest.raises(BrokenBatchExecutor, match="internal error"):
        executor.submit(abs, -1)
    executor.shutdown()
    assert driver.finished.is_set()
    assert not driver.launches.running
    assert driver.broken is not None
