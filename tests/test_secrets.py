"""Keys, tokens and certificates' keys are shown nowhere: what users, others and logs get to see."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

from cloudexec import Batch, BatchExecutor, Fargate, Local
from cloudexec._aws.monitor import Monitor
from cloudexec._aws.profile import Profile
from cloudexec.testing import FakeAWS, ManualLauncher

pytestmark = pytest.mark.timeout(90)


def _environment(_: int) -> tuple[dict[str, str], list[bytes]]:
    """What a task finds out of itself, its slot and the processes above it, at no effort."""
    seen = []
    pid = os.getpid()
    while pid > 1:
        for name in ("environ", "cmdline", "comm"):
            with contextlib.suppress(OSError):
                seen.append(Path(f"/proc/{pid}/{name}").read_bytes())
        pid = psutil.Process(pid).ppid()
    return dict(os.environ), seen


def _forms(secret: bytes) -> list[str]:
    return [
        secret.hex(),
        secret.hex().upper(),
        repr(secret)[2:-1],
        secret.decode("latin-1"),
        base64.b64encode(secret).decode(),
        base64.urlsafe_b64encode(secret).decode().rstrip("="),
        str(list(secret))[1:-1],
    ]


class _Inspection:
    """Gathers all that can be seen of executors, and what is not to be found in it."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self.shown: list[str] = []
        self.secrets: set[bytes] = set()

    def look_at(self, executor: BatchExecutor) -> None:
        """Use an executor, and take down what it shows."""
        environ, seen = executor.submit(_environment, 1).result(60)
        self.shown += [json.dumps(environ), *(each.decode("latin-1") for each in seen)]
        failing = executor.submit(divmod, 1, 0)
        self.shown.append(repr(failing.exception(30)))
        driver: Any = executor._driver
        self.secrets.add(driver.engine.key)
        sessions = list(driver.sessions.values())
        assert sessions
        for session in sessions:
            self.secrets.add(session.token)
            self.secrets.add(driver.workers.key_of(session.identity))
        contact = driver.launches.contact
        for each in (executor, driver, contact, driver.setup, driver.machine, failing,
                     driver._launcher, executor.stats(), *sessions, driver.portal):  # fmt: skip
            self.shown += [repr(each), str(each)]

    def look_at_processes(self) -> None:
        """Take down the process list, and the names that core files would have."""
        looked_at = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            for name in ("cmdline", "environ", "comm"):
                with contextlib.suppress(OSError):
                    path = Path(f"/proc/{process.pid}/{name}")
                    self.shown.append(path.read_bytes().decode("latin-1"))
                    looked_at += 1
        assert looked_at >= 6
        with contextlib.suppress(OSError):
            self.shown.append(Path("/proc/sys/kernel/core_pattern").read_text())

    def check(self) -> None:
        """Find nothing."""
        for record in self._caplog.records:
            self.shown.append(f"{record.getMessage()} {record.exc_text} {record.args!r}")
        everything = "\n".join(self.shown)
        assert len(everything) > 1000
        for secret in self.secrets:
            for form in _forms(secret):
                assert form not in everything
        assert "PRIVATE KEY" not in everything


@pytest.fixture
def inspection(caplog: pytest.LogCaptureFixture) -> _Inspection:
    """With everything logged that anything logs."""
    caplog.set_level(logging.DEBUG)
    return _Inspection(caplog)


def test_nothing_shows_the_key_of_local_workers(inspection: _Inspection) -> None:
    """Logs, errors, representations, command lines, environments, names of processes: of workers
    on a Unix socket, over TLS, and of one with the key in its environment, as a container has."""
    launcher = ManualLauncher(needs_network=True)
    with (
        BatchExecutor(1, launcher=Local()) as near,
        BatchExecutor(1, launcher=Local(), listen="127.0.0.1:0") as local,
    ):
        by_hand = BatchExecutor(1, launcher=launcher)
        by_hand.submit(len, b"")
        launch = launcher.wait(1, 20)[0]
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "CLOUDEXEC_TARGET": launch.contact.target,
            "CLOUDEXEC_EXECUTOR_ID": launch.contact.executor_id,
            "CLOUDEXEC_IDENTITY": launch.launch_id,
            "CLOUDEXEC_KEY": launch.contact.key.hex(),
            "CLOUDEXEC_SLOTS": "1",
            "CLOUDEXEC_CERTIFICATE_SHA256": launch.contact.certificate_sha256,
        }
        worker = subprocess.Popen(
            [sys.executable, "-m", "cloudexec.worker"],
            env={
                **os.environ,
                **environment,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for executor in (near, local, by_hand):
            inspection.look_at(executor)
        inspection.shown += [repr(launch), repr(launcher)]
        inspection.look_at_processes()
        by_hand.kill_workers()
        inspection.shown.append(worker.communicate(timeout=30)[1])
    inspection.check()


@pytest.fixture
def aws() -> Iterator[FakeAWS]:
    with FakeAWS(grace=2.0, calls_per_second=1000) as fake:
        yield fake


def _requests(aws: FakeAWS) -> list[str]:
    return [json.dumps([each.operation, each.parameters], default=str) for each in aws.requests]


def test_nothing_shows_the_stacks_key(
    inspection: _Inspection, aws: FakeAWS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read from the secret, and no log, also of the SDK, no request, no job description and
    no line of the workers has it."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("CLOUDEXEC_PROFILE", "default")
    key = os.urandom(32)
    made = aws.set_up("queue", max_vcpus=4)
    secrets = boto3.client("secretsmanager")
    secret = secrets.create_secret(Name="key", SecretString=key.hex())["ARN"]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    Profile(
        name="default",
        region=aws.region,
        queues={"fargate": made.queue},
        job_role=made.job_role,
        execution_role=made.execution_role,
        key_secret=secret,
    ).with_image(version, "linux/amd64", "example.com/worker:1").save()
    inspection._caplog.clear()
    aws.clear_requests()
    with BatchExecutor(1) as executor:
        inspection.look_at(executor)
        inspection.look_at_processes()
    assert key in inspection.secrets
    batch = boto3.client("batch")
    described = batch.describe_jobs(jobs=[each.job_id for each in aws.jobs()])["jobs"]
    definitions = batch.describe_job_definitions()["jobDefinitions"]
    assert described
    assert definitions
    inspection.shown += [json.dumps([described, definitions], default=str), *_requests(aws)]
    inspection.shown += [line for job in aws.jobs() for line in aws.logs(job.job_id)]
    assert any("botocore" in each.name for each in inspection._caplog.records)
    inspection.check()


def test_no_log_shows_the_key_of_a_launch(inspection: _Inspection, aws: FakeAWS) -> None:
    """Without a stack it is in the job's environment, for those who may read jobs; and nowhere
    else, not in the log of the SDK that sends it there either."""
    made = aws.set_up("queue", max_vcpus=4)
    launcher = Batch(
        queue=made.queue,
        job_role=made.job_role,
        execution_role=made.execution_role,
        region=aws.region,
        image="example.com/worker:1",
    )
    inspection._caplog.clear()
    with BatchExecutor(1, launcher=launcher) as executor:
        inspection.look_at(executor)
        inspection.look_at_processes()
        (request,) = [each for each in aws.requests if each.operation == "SubmitJob"]
        sent = {each["name"]: each["value"] for each in
                request.parameters["containerOverrides"]["environment"]}  # fmt: skip
        assert bytes.fromhex(sent["CLOUDEXEC_KEY"]) in inspection.secrets
    inspection.shown += [line for job in aws.jobs() for line in aws.logs(job.job_id)]
    inspection.check()


def test_no_log_shows_the_key_of_a_launch_on_fargate(inspection: _Inspection, aws: FakeAWS) -> None:
    """Nor does the answer to StopTask, which has the task with all its variables."""
    made = aws.set_up("cluster")
    launcher = Fargate(
        cluster=made.cluster,
        subnets=made.subnets,
        security_groups=[made.security_group],
        execution_role=made.execution_role,
        region=aws.region,
        image="example.com/worker:1",
    )
    inspection._caplog.clear()
    with BatchExecutor(1, launcher=launcher) as executor:
        inspection.look_at(executor)
        (request,) = [each for each in aws.requests if each.operation == "RunTask"]
        (container,) = request.parameters["overrides"]["containerOverrides"]
        sent = {each["name"]: each["value"] for each in container["environment"]}
        assert bytes.fromhex(sent["CLOUDEXEC_KEY"]) in inspection.secrets
        with Monitor(region=aws.region) as monitor:
            (running,) = monitor.executors()
            assert monitor.stop(executor=running.id)
    assert "StopTask" in {each.operation for each in aws.requests}
    inspection.check()


def test_sockets_and_their_directory_are_private() -> None:
    """Others on the machine cannot even look."""
    with BatchExecutor(1, launcher=Local()) as executor:
        executor.submit(len, b"").result(30)
        driver: Any = executor._driver
        socket_path = Path(driver.launches.contact.target.removeprefix("plain:"))
        assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700
        assert {each.name for each in socket_path.parent.iterdir()} == {"s", "d"}
        for each in socket_path.parent.iterdir():
            assert stat.S_IMODE(each.stat().st_mode) == 0o600
            assert each.stat().st_uid == os.getuid()
