"""Why nothing runs: each cause that AWS has, produced, and what the user reads."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from typing import Any

import boto3
import pytest
from launcher_helpers import eventually

from cloudexec import Batch, BatchExecutor, BudgetExceededError, ConfigError, LaunchError
from cloudexec._launchers import watching
from cloudexec._launchers.batch.platform import BatchPlatform
from cloudexec.testing import FakeAWS

Make = Callable[..., Batch]


@pytest.fixture
def curious(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS is asked for causes soon, and often."""
    monkeypatch.setattr(watching, "_DIAGNOSE_AFTER", 0.2)
    monkeypatch.setattr(watching, "_DIAGNOSE_EVERY", 0.5)


def no_route(aws: Any) -> None:
    aws.faults.no_route()


def missing_role(aws: Any) -> None:
    aws.faults.missing_execution_role()


def refused(aws: Any) -> None:
    aws.faults.deny("SubmitJob", 100)


def quota(aws: Any) -> None:
    aws.faults.vcpu_quota(0)


def disabled(aws: Any) -> None:
    boto3.client("batch", region_name=aws.region).update_job_queue(
        jobQueue="queue", state="DISABLED"
    )


@pytest.mark.parametrize(
    ("fault", "settings", "words"),
    [
        (no_route, {}, r"cannot reach AWS's own services.*NAT gateway"),
        (missing_role, {}, r"role.*cloudexec up"),
        (refused, {}, r"AccessDenied.*cloudexec policy"),
        (quota, {}, r"quota.*Service Quotas"),
        (disabled, {}, r"is DISABLED.*enable it .`cloudexec up` does"),
        (lambda aws: None, {"vcpus": 4, "max_vcpus": 2}, r"smaller size|asks for 4 vCPUs"),
    ],
    ids=["no route", "missing role", "not allowed", "quota", "disabled", "size too large"],
)
def test_a_cause_is_named_with_its_remedy(
    aws: Any,
    launcher: Make,
    curious: None,
    fault: Callable[[Any], None],
    settings: dict[str, Any],
    words: str,
) -> None:
    """Within a bounded time the futures fail with AWS's reason and what to do about it."""
    batch = launcher(**settings)
    fault(aws)
    with BatchExecutor(1, launcher=batch, launch_timeout=2.0) as executor:
        with pytest.raises(LaunchError, match=f"(?s){words}"):
            executor.submit(len, "abc").result(timeout=60)
    eventually(lambda: all(j.status in ("SUCCEEDED", "FAILED") for j in aws.jobs()))


def test_a_new_accounts_quota_is_named_while_some_work(
    launcher_factory: Callable[[Any], Make], curious: None
) -> None:
    """Six vCPUs at once: those that wait are told apart from those for which AWS has no place."""
    with FakeAWS(grace=2.0, calls_per_second=1000, new_account=True) as aws:
        batch = launcher_factory(aws)()
        with BatchExecutor(8, launcher=batch, min_workers=8) as executor:
            expected = r"may run 6 vCPUs at once, and 6 are in use by this executor.*Service Quotas"
            eventually(lambda: executor.stats().workers.slots == 6)
            eventually(lambda: re.search(expected, batch.explain()))
        eventually(lambda: all(j.status in ("SUCCEEDED", "FAILED") for j in aws.jobs()))


def test_a_quota_of_instances_is_a_cause_too(aws: Any, launcher: Make, curious: None) -> None:
    """AWS Batch itself says nothing of it."""
    batch = launcher(compute="ec2", kinds=("EC2",), memory="1GiB")
    aws.faults.vcpu_quota(0, compute="ec2")
    executor = BatchExecutor(1, launcher=batch)
    executor.submit(len, "abc")
    eventually(lambda: re.search(r"quota.* may run 0 vCPUs.*Service Quotas", batch.explain()))
    executor.shutdown(cancel_futures=True)
    eventually(lambda: all(j.status in ("SUCCEEDED", "FAILED") for j in aws.jobs()))


def test_an_environment_that_aws_would_choke_on_is_refused_before(aws: Any, launcher: Make) -> None:
    """8192 characters: AWS would take it, and let the job fail."""
    batch = launcher(environment={"DATA": "x" * 8000})
    with BatchExecutor(1, launcher=batch) as executor:
        with pytest.raises(LaunchError, match="'DATA'"):
            executor.submit(len, "abc").result(timeout=30)
    assert not aws.jobs()


def test_a_user_cannot_overwrite_what_workers_need(aws: Any, launcher: Make) -> None:
    """Our own variables win over those of ``environment=``."""
    batch = launcher(environment={"CLOUDEXEC_SLOTS": "none"})
    with BatchExecutor(1, launcher=batch) as executor:
        assert executor.submit(len, "abc").result(timeout=60) == 3


def test_work_is_throttled_and_done(launcher_factory: Callable[[Any], Make]) -> None:
    """Five calls a second for the whole account slow nothing but the start."""
    with FakeAWS(grace=2.0, calls_per_second=5) as aws:
        with BatchExecutor(6, launcher=launcher_factory(aws)()) as executor:
            assert sum(executor.map(abs, range(2000))) == 1999000
            eventually(lambda: executor.stats().workers.slots == 6)
        eventually(lambda: all(j.status in ("SUCCEEDED", "FAILED") for j in aws.jobs()))


def test_the_ceiling_is_kept_in_mid_run(
    aws: Any, launcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is reached, workers end, and what is not done fails with a typed error."""
    # Each second is paid as it comes, so that the test need not run for minutes.
    monkeypatch.setattr(BatchPlatform, "stop_seconds", 1.0)
    monkeypatch.setattr("cloudexec._aws.prices.LEAST_SECONDS", 1)
    a_second = 0.05437 / 3600
    with BatchExecutor(1, launcher=launcher(), max_cost_usd=6 * a_second) as executor:
        with pytest.raises(BudgetExceededError, match="max_cost_usd") as caught:
            executor.submit(time.sleep, 60).result(timeout=30)
        with pytest.raises(BudgetExceededError):
            executor.submit(len, "abc")
    assert 0 < (caught.value.cost_usd or 0.0) <= 6 * a_second
    assert executor.cost().accrued_usd <= 7 * a_second
    eventually(lambda: all(j.status in ("SUCCEEDED", "FAILED") for j in aws.jobs()))


@pytest.mark.parametrize("value", [0, -1, "5", float("nan")])
def test_a_ceiling_is_a_positive_number(value: Any) -> None:
    """Anything else is refused at once."""
    with pytest.raises(ConfigError, match="max_cost_usd"):
        BatchExecutor(1, max_cost_usd=value)


def test_workers_that_never_dial_back_are_paid_for_too(
    aws: Any, launcher: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """They run, so they cost; and the warning says what may be wrong."""
    batch = launcher()
    where = {"advertise": "127.0.0.1:1", "listen": "127.0.0.1:0"}
    executor = BatchExecutor(2, launcher=batch, launch_timeout=9.0, **where)
    executor.submit(len, "abc")
    executor.submit(len, "abc")
    eventually(lambda: executor.cost().accrued_usd >= 2 * 60 * 0.05437 / 3600 - 1e-9)
    eventually(lambda: "advertise=" in caplog.text)
    executor.shutdown(wait=True, cancel_futures=True)
    assert executor.cost().accrued_usd > 0
    eventually(lambda: all(j.status in ("SUCCEEDED", "FAILED") for j in aws.jobs()))


def test_the_port_that_workers_dial_is_listened_on(aws: Any, launcher: Make) -> None:
    """Unless ``listen=`` says that another one is forwarded to it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    address = f"127.0.0.1:{port}"
    with BatchExecutor(1, launcher=launcher(), advertise=address) as executor:
        assert executor.submit(len, "abc").result(timeout=30) == 3
    (request,) = (r.parameters for r in aws.requests if r.operation == "SubmitJob")
    variables = {e["name"]: e["value"] for e in request["containerOverrides"]["environment"]}
    assert variables["CLOUDEXEC_TARGET"] == address
    eventually(lambda: all(j.status in ("SUCCEEDED", "FAILED") for j in aws.jobs()))


def test_workers_take_their_share_of_a_queue(aws: Any, launcher: Make) -> None:
    """A queue of the user's own with a fair-share policy takes no job without one."""
    batch = boto3.client("batch", region_name=aws.region)
    made = aws.set_up("plain")
    policy = batch.create_scheduling_policy(name="fair", fairsharePolicy={})["arn"]
    queue = batch.create_job_queue(
        jobQueueName="fair",
        priority=1,
        schedulingPolicyArn=policy,
        computeEnvironmentOrder=[{"order": 1, "computeEnvironment": made.compute_environments[0]}],
    )["jobQueueArn"]
    settings = {
        "queue": queue,
        "job_role": made.job_role,
        "execution_role": made.execution_role,
        "image": "example.com/worker:1",
        "region": aws.region,
    }
    with BatchExecutor(1, launcher=Batch(**settings)) as executor:
        with pytest.raises(LaunchError, match="shareIdentifier is required"):
            executor.submit(len, "abc").result(timeout=30)
    with BatchExecutor(1, launcher=Batch(**settings, share_identifier="team1")) as executor:
        assert executor.submit(len, "abc").result(timeout=30) == 3
