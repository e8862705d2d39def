"""What users of a process pool take for granted about the processes that run their calls."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from cloudexec import BatchExecutor, InitializerError, RefLostError, WorkerLostError


@pytest.fixture(scope="module")
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(2, retries=0) as executor:
        yield executor


# Lost processes.


def test_a_lost_worker_is_caught_as_a_broken_process_pool(executor: BatchExecutor) -> None:
    """And the executor goes on, which a process pool does not."""
    with pytest.raises(BrokenProcessPool) as caught:
        executor.submit(os._exit, 3).result(30)
    assert isinstance(caught.value, WorkerLostError)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), BrokenProcessPool)
    with pytest.raises(BrokenExecutor):
        list(executor.map(os._exit, [3]))
    assert executor.submit(abs, -1).result(30) == 1


def test_a_broken_executor_is_caught_as_a_broken_process_pool() -> None:
    executor = BatchExecutor(1)
    future = executor.submit(abs, -1)
    executor.kill_workers()
    assert future.exception(30) is None or isinstance(future.exception(), BrokenProcessPool)
    with BatchExecutor(1, initializer=divmod, initargs=(1, 0)) as executor:
        with pytest.raises(BrokenProcessPool) as caught:
            executor.submit(abs, -1).result(30)
    assert isinstance(caught.value, InitializerError)
    assert isinstance(RefLostError("gone"), BrokenProcessPool)


def test_an_error_is_a_broken_process_pool_for_those_who_import_that_later() -> None:
    """Importing cloudexec does not import the process pool, which takes its time."""
    program = """
import sys
from cloudexec import BatchExecutor, WorkerLostError
assert "concurrent.futures.process" not in sys.modules
try:
    raise WorkerLostError("lost", worker_id="worker-1")
except Exception as error:
    from concurrent.futures import BrokenExecutor
    from concurrent.futures.process import BrokenProcessPool
    assert isinstance(error, BrokenProcessPool) and isinstance(error, BrokenExecutor)
    assert error.worker_id == "worker-1" and str(error) == "lost"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)
