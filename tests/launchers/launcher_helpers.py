"""Helpers for several tests of launchers."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cloudexec import Batch
from cloudexec._aws.profile import Profile


def eventually(condition: Callable[[], Any], timeout: float = 50.0) -> Any:
    """Call ``condition`` until its result is true; return the result."""
    deadline = time.monotonic() + timeout
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def unfinished(aws: Any) -> list[Any]:
    """Return the jobs of an emulated account that have not ended."""
    return [job for job in aws.jobs() if job.status not in ("SUCCEEDED", "FAILED")]


def kill_a_client(batch: Batch, path: Path, running: int, **options: object) -> None:
    """Start a client with three workers in a process of its own, and kill it.

    Args:
        batch: Has the queue and the roles.
        path: Where the client's script is written.
        running: How many of its tasks run when it is killed.
        options: Of its executor.
    """
    script = textwrap.dedent(
        f"""
        import time
        from cloudexec import Batch, BatchExecutor
        if __name__ == "__main__":
            batch = Batch(queue={batch.queue!r}, job_role={batch.job_role!r}, image="x",
                          execution_role={batch.execution_role!r}, region={batch.region!r})
            executor = BatchExecutor(3, launcher=batch, min_workers=3, **{options!r})
            futures = [executor.submit(time.sleep, 60) for _ in range(3)]
            while executor.stats().tasks.running < {running}:
                time.sleep(0.05)
            print("running", flush=True)
            time.sleep(60)
        """
    )
    path.write_text(script)
    client = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    try:
        assert client.stdout.readline() == "running\n"
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()
        client.stdout.close()


def kill_when(path: Path, script: str, reached: Callable[[], Any]) -> None:
    """Run a client until something has come about, and kill it.

    Args:
        path: The file for its script.
        script: The script.
        reached: Says whether it has come about.
    """
    path.write_text(script)
    said = path.with_suffix(".stderr")
    with said.open("w") as stderr:
        client = subprocess.Popen([sys.executable, str(path)], stderr=stderr)
    deadline = time.monotonic() + 50.0
    try:
        while not reached():
            assert client.poll() is None, said.read_text()
            assert time.monotonic() < deadline, f"it did not come about: {said.read_text()}"
            time.sleep(0.02)
    finally:
        client.kill()
        client.wait()


def write_profile(aws: Any) -> None:
    """Make what `up --with ec2` makes, as far as instances need it, and write a profile of it."""
    made = aws.set_up("instances")
    import boto3  # some tests that use other helpers run without it

    iam = boto3.client("iam", region_name=aws.region)
    iam.create_instance_profile(InstanceProfileName="instances")
    iam.add_role_to_instance_profile(InstanceProfileName="instances", RoleName="instances-instance")
    profile = iam.get_instance_profile(InstanceProfileName="instances")["InstanceProfile"]
    secret = boto3.client("secretsmanager", region_name=aws.region).create_secret(
        Name="key", SecretString="0f" * 32
    )
    boto3.client("logs", region_name=aws.region).create_log_group(logGroupName="/instances")
    Profile(
        name="instances",
        region=aws.region,
        queues={"fargate": made.queue},
        execution_role=made.execution_role,
        job_role=made.job_role,
        key_secret=secret["ARN"],
        log_group="/instances",
        subnets=made.subnets,
        security_group=made.security_group,
        instance_profile=profile["Arn"],
        instance_role=profile["Roles"][0]["Arn"],
    ).save()
