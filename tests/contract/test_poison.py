"""A task that takes its worker along fails alone; whoever was aboard with it is not blamed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

import psutil
import pytest
from contract_helpers import PATIENCE, Signals
from contract_tasks import append, hold, tell

from cloudexec import BatchExecutor, Local, WorkerLostError

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
    pytest.mark.usefixtures("nothing_left"),
]


def kill_worker() -> None:
    """Kill the process that holds the connection: the parent of the one that slots come from."""
    os.kill(psutil.Process(os.getppid()).ppid(), signal.SIGKILL)
    threading.Event().wait()


def innocent(runs: str, told: str, number: int) -> int:
    """Be aboard when the worker dies, the first time."""
    append(runs, str(number))
    if Counter(Path(runs).read_text().split())[str(number)] == 1:
        tell(told, "aboard")
        threading.Event().wait()
    return number


def guilty(runs: str, told: str, gate: str) -> None:
    append(runs, "guilty")
    if Path(runs).read_text().count("guilty") == 1:
        hold(told, gate, "aboard")
    kill_worker()


def test_of_four_aboard_only_the_one_that_kills_its_worker_fails(
    tmp_path: Path, signals: Signals
) -> None:
    """The suspects run again alone: three succeed, and the fourth has shown that it was the one."""
    runs = str(tmp_path / "runs")
    launcher = Local(slots_per_worker=4)
    with BatchExecutor(4, launcher=launcher, retries=1, output="off") as executor:
        good = [executor.submit(innocent, runs, signals.told, number) for number in range(3)]
        bad = executor.submit(guilty, runs, signals.told, signals.gate)
        assert signals.wait(4) == ["aboard"] * 4
        signals.release()
        assert [future.result(PATIENCE) for future in good] == [0, 1, 2]
        with pytest.raises(WorkerLostError, match="and nothing else, was lost") as lost:
            bad.result(PATIENCE)
        assert lost.value.attempts == 2
        assert "killed by SIGKILL" in str(lost.value)
        assert executor.submit(abs, -1).result(PATIENCE) == 1
    # Aboard together once; then the innocent once more, and the guilty with both its attempts.
    assert Counter(Path(runs).read_text().split()) == {"0": 2, "1": 2, "2": 2, "guilty": 3}
