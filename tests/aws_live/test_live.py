"""What emulation cannot show: real permissions, placement, networks, reclaims and bills."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from cloudexec import Batch, BatchExecutor
from cloudexec.aws import Monitor

pytestmark = pytest.mark.timeout(1800)


def square(number: int) -> int:
    return number * number


def nothing_left(profile: str) -> bool:
    """Wait until no job of ours is active."""
    deadline = time.monotonic() + 180
    with Monitor(profile) as monitor:
        while monitor.jobs(active=True):
            if time.monotonic() > deadline:
                return False
            time.sleep(5)
    return True


@pytest.mark.costs(0.01)
def test_the_doctor_finds_nothing(profile: str) -> None:
    """Permissions, stack, image, and a probe worker that dials back."""
    done = subprocess.run(
        [sys.executable, "-m", "cloudexec.cli", "doctor", "--profile", profile],
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0


@pytest.mark.costs(0.05)
@pytest.mark.parametrize("spot", [False, True])
def test_a_map_runs_on_four_workers(profile: str, spot: bool) -> None:
    """One array job, every part of its start measured, nothing left."""
    with BatchExecutor(4, launcher=Batch(profile=profile, spot=spot), min_workers=4) as executor:
        assert list(executor.map(square, range(10_000))) == [n * n for n in range(10_000)]
        for launch in executor.stats().launches:
            print(launch)
        assert executor.cost().accrued_usd < 0.05
    assert nothing_left(profile)


@pytest.mark.costs(0.05)
def test_a_relay_that_is_stopped_is_followed_by_another(profile: str) -> None:
    """Its port is open to the internet, and workers find the next one by themselves."""
    with (
        Monitor(profile) as monitor,
        BatchExecutor(1, launcher=Batch(profile=profile, relay=True)) as executor,
    ):
        assert executor.submit(square, 3).result() == 9
        slow = executor.submit(time.sleep, 120)
        relay = next(job for job in monitor.jobs(active=True) if job.queue.endswith("-relay"))
        monitor.stop(job=relay.id)
        slow.result()
        assert executor.submit(square, 4).result() == 16
        assert executor.stats().workers.lost == 0
    assert nothing_left(profile)


@pytest.mark.costs(0.01)
def test_ctrl_c_leaves_nothing(profile: str) -> None:
    """Jobs that have no place yet are gone too."""

    def interrupted() -> None:
        with BatchExecutor(2, launcher=Batch(profile=profile)) as executor:
            executor.submit(time.sleep, 600)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert nothing_left(profile)


@pytest.mark.costs(0.05)
def test_a_task_climbs_the_memory_ladder(profile: str) -> None:
    """The kernel kills the task's process, not the container, and AWS has the next size."""

    def fill(gib: float) -> int:
        return len(bytearray(int(gib * 2**30)))

    launcher = Batch(profile=profile, vcpus=0.25, memory=("512MiB", "2GiB"))
    with BatchExecutor(1, launcher=launcher) as executor:
        assert executor.submit(fill, 1.0).result() == 2**30
        assert executor.stats().lost_attempts == 1
    assert nothing_left(profile)
