"""The whole path with real containers: up, image, run, ps, logs, faults, down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from container_tasks import fill, slow

import cloudexec
from cloudexec import Batch, BatchExecutor
from cloudexec._aws.images import Engine
from cloudexec.testing import FakeAWS

BASE = os.environ.get(
    "CLOUDEXEC_TEST_BASE", f"localhost/python-base:{sys.version_info[0]}.{sys.version_info[1]}"
)
WORKERS = int(os.environ.get("CLOUDEXEC_TEST_WORKERS", "4"))
PACKAGE = str(Path(cloudexec.__file__).parents[1])

SWEEP = """
import os, platform, time
from cloudexec import BatchExecutor
from neighbour import root

def simulate(seed):
    time.sleep(0.01)
    return os.environ.get("AWS_BATCH_JOB_ID", "here"), os.getuid(), root(seed)

if __name__ == "__main__":
    with BatchExecutor(max_workers=WORKERS) as executor:
        results = list(executor.map(simulate, range(4_000)))
    print(len(results), sorted({uid for _, uid, _ in results}), sum(r for _, _, r in results))
"""


def eventually(condition: Callable[[], Any], timeout: float = 150.0) -> Any:
    """Wait until something holds; return what it says."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def aws(engine: Engine, open_registry: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An emulated AWS with containers, and a directory of its own for profiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path_factory.mktemp("config")))
        with FakeAWS(
            mode="container", registry=open_registry, grace=5.0, calls_per_second=50
        ) as fake:
            yield fake


def cloudexec(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "cloudexec.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
        env={**os.environ, "PYTHONPATH": PACKAGE},
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done


def workers_of_each_executor() -> list[int]:
    """As ``ps`` shows them; the worker that ``doctor`` asked for may still be ending."""
    return [sum(each["workers"].values()) for each in json.loads(cloudexec("ps", "--json").stdout)]


@pytest.fixture(scope="module")
def ready(aws: Any, wheelhouse: Path) -> Iterator[None]:
    """A set-up with an image, and nothing left of it afterwards."""
    assert "VALID" in cloudexec("up", "--yes").stderr
    push = ("image", "push", "--base", BASE, "--wheelhouse", str(wheelhouse))
    first = cloudexec(*push)
    assert "@sha256:" in first.stdout
    again = cloudexec(*push)
    assert again.stdout == first.stdout
    assert "building" not in again.stderr
    yield
    down = cloudexec("down", "--yes")
    assert "Nothing of cloudexec-default is left" in down.stdout + down.stderr


@pytest.mark.timeout(300)
def test_an_unmodified_script_runs_4000_tasks(aws: Any, ready: None, tmp_path: Path) -> None:
    """In containers, as another user, with its neighbour; seen while it runs, gone afterwards."""
    (tmp_path / "neighbour.py").write_text("def root(n):\n    return round(n ** 0.5)\n")
    script = tmp_path / "sweep.py"
    script.write_text(f"WORKERS = {WORKERS}\n" + textwrap.dedent(SWEEP))
    assert "dialed back" in cloudexec("doctor").stdout
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CLOUDEXEC_PROFILE": "default", "PYTHONPATH": PACKAGE},
    ) as run:
        try:
            eventually(lambda: WORKERS in workers_of_each_executor())
            out, err = run.communicate(timeout=200)
        finally:
            run.kill()
    assert out == f"4000 [10001] {sum(round(n**0.5) for n in range(4_000))}\n", err
    assert "4000 tasks on" in err
    job = max(aws.jobs(), key=lambda job: job.created_at if job.index is None else 0)
    assert "enrolled as worker-1" in cloudexec("logs", f"{job.job_id}:0").stdout
    eventually(lambda: all(j.status in ("SUCCEEDED", "FAILED") for j in aws.jobs()))


@pytest.mark.timeout(200)
def test_a_third_of_the_containers_is_reclaimed(aws: Any, ready: None) -> None:
    """SIGTERM reaches the worker through the container's init, and no task is lost or blamed."""
    batch = Batch(
        spot=True, environment={"CLOUDEXEC_DRAIN_GRACE": "1"}, modules=["container_tasks"]
    )
    with BatchExecutor(6, launcher=batch) as executor:
        futures = [executor.submit(slow, n) for n in range(400)]
        eventually(lambda: executor.stats().workers.slots == 6)
        aws.faults.reclaim_fraction(1 / 3)
        assert [future.result(timeout=100) for future in futures] == list(range(400))
        stats = executor.stats()
    assert stats.lost_attempts == 0
    assert stats.workers.reclaimed == 2


@pytest.mark.timeout(200)
def test_containers_killed_in_mid_run_lose_no_task(aws: Any, ready: None) -> None:
    """SIGKILL to all of a container: what it ran runs again, what waited there runs elsewhere."""
    batch = Batch(modules=["container_tasks"])
    with BatchExecutor(4, launcher=batch, retries=5) as executor:
        futures = [executor.submit(slow, n) for n in range(200)]
        eventually(lambda: executor.stats().workers.slots == 4)
        began = sum(future.done() for future in futures)
        eventually(lambda: sum(future.done() for future in futures) > began + 4)
        killed = [job.job_id for job in aws.jobs() if job.status == "RUNNING"][:2]
        for job_id in killed:
            aws.faults.kill_instance(job_id)
        assert [future.result(timeout=100) for future in futures] == list(range(200))
        stats = executor.stats()
    assert len(killed) == 2
    assert stats.workers.lost == 2
    assert (stats.tasks.succeeded, stats.tasks.failed) == (200, 0)


@pytest.mark.timeout(200)
def test_a_container_without_memory_is_told_from_a_crash(aws: Any, ready: None) -> None:
    """The kernel kills the task's process in its container; the next size is enough."""
    batch = Batch(vcpus=0.25, memory=("512MiB", "1GiB"), modules=["container_tasks"])
    with BatchExecutor(1, launcher=batch) as executor:
        assert executor.submit(fill, 700).result(timeout=100) == 700
        stats = executor.stats()
    assert stats.lost_attempts == 1
    assert stats.workers.launched == 2


@pytest.mark.timeout(200)
def test_containers_end_when_the_client_is_killed(aws: Any, ready: None, tmp_path: Path) -> None:
    """Nobody tells them: their connections end, and the client's machine refuses new ones."""
    script = tmp_path / "client.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from cloudexec import Batch, BatchExecutor
            if __name__ == "__main__":
                executor = BatchExecutor(2, launcher=Batch(), min_workers=2)
                futures = [executor.submit(time.sleep, 100) for _ in range(2)]
                while executor.stats().tasks.running < 2:
                    time.sleep(0.05)
                print("running", flush=True)
                time.sleep(100)
            """
        )
    )
    client = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PACKAGE},
    )
    assert client.stdout is not None
    try:
        assert client.stdout.readline() == "running\n"
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.stdout.close()
    # Not the 120 seconds for which a network that is gone would be waited for, but 10 of refusals.
    # The bridge may drop packets to one container for a moment when another one ends.
    eventually(lambda: all(j.status in ("SUCCEEDED", "FAILED") for j in aws.jobs()), timeout=60.0)
