"""Workers that find no client: how they end, what they cost, and who says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher_helpers import eventually, kill_a_client, unfinished

from cloudexec import Batch
from cloudexec.aws import Monitor

Make = Callable[..., Batch]


def test_workers_that_are_still_queued_end_soon_and_name_the_remedy(
    aws: Any, launcher: Make, tmp_path: Path
) -> None:
    """Each starts after the other, finds nobody, is not started again, and is not paid for long."""
    batch = launcher(max_vcpus=1)
    # By the time the first worker gives its client up, nobody has to wait for the others any more.
    kill_a_client(batch, tmp_path / "client.py", 1, launch_timeout=10.0, orphan_timeout=16.0)
    workers = [job for job in aws.jobs() if not job.size]
    assert sorted(job.status for job in workers) == ["RUNNABLE", "RUNNABLE", "RUNNING"]
    (executor,) = {job.tags["cloudexec:executor"] for job in workers}
    hint = f"if that program has ended, `cloudexec stop --executor {executor}` ends those"
    eventually(lambda: not unfinished(aws), timeout=100.0)
    workers = [job for job in aws.jobs() if not job.size]
    assert [(job.exit_code, len(job.attempts)) for job in workers] == [(4, 1)] * 3
    for job in workers:
        assert [line for line in aws.logs(job.job_id) if hint in line], aws.logs(job.job_id)
    for job in workers[1:]:
        (attempt,) = job.attempts
        assert attempt.started_at is not None
        assert attempt.stopped_at is not None
        assert attempt.stopped_at - attempt.started_at < 20.0, "a first dial takes 30 s otherwise"
    with Monitor(region=aws.region) as monitor:
        (found,) = monitor.executors(active=None)
        (array,) = monitor.jobs()
    assert found.without_client == array.without_client == 3
    assert array.reason == "3 failed: it could not reach the program (exit code 4)"


def start_worker(until: int, attempt: str, **more: str) -> subprocess.Popen[str]:
    """Start a worker in AWS Batch whose client is gone."""
    environ = {
        "CLOUDEXEC_TARGET": "127.0.0.1:1",
        "CLOUDEXEC_EXECUTOR_ID": "0123456789abcdef",
        "CLOUDEXEC_LAUNCH": "1",
        "CLOUDEXEC_KEY": "00" * 32,
        "CLOUDEXEC_SLOTS": "1",
        "CLOUDEXEC_CERTIFICATE_SHA256": "00" * 32,
        "CLOUDEXEC_AWAITED_UNTIL": str(until),
        "AWS_BATCH_JOB_ID": "job",
        "AWS_BATCH_JOB_ATTEMPT": attempt,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "cloudexec.worker"],
        env={**os.environ, **environ, **more},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_relay_that_may_come_back_elsewhere_is_waited_for_longer() -> None:
    """A worker may start while the client starts another relay, which takes about a minute."""
    relays = {"127.0.0.1:1": "30", "127.0.0.1:1 http://127.0.0.1:1/relay": "120"}
    for relay, seconds in relays.items():
        worker = start_worker(2**33, "1", CLOUDEXEC_RELAY=relay)
        try:
            assert worker.stderr is not None
            said = next(line for line in worker.stderr if "no connection to" in line)
            assert "no connection to the relay 127.0.0.1:1 yet: it was refused" in said
            assert said.endswith(f"dialing again, for {seconds} s at most\n")
        finally:
            worker.kill()
            worker.communicate()


def test_only_a_worker_that_nobody_waits_for_gives_up_soon() -> None:
    """One that AWS starts again after a reclaim is expected whenever it comes."""
    expected = [start_worker(2**33, "1"), start_worker(1, "2")]
    late = start_worker(1, "1")
    try:
        _, said = late.communicate(timeout=25.0)
        assert late.returncode == 4
        assert "cloudexec stop --executor 0123456789abcdef" in said
        assert [worker.poll() for worker in expected] == [None, None]
    finally:
        for worker in (*expected, late):
            worker.kill()
            worker.communicate()
