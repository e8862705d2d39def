"""What goes wrong on request, and how AWS words it."""

from __future__ import annotations

import time

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnectionError
from fake_helpers import Account, eventually

from cloudexec.testing import FakeAWS

LOOP = "while :; do sleep 0.05; done"


# Work that does not start.


@pytest.mark.parametrize("target", [None, "test", "test-1", "FARGATE"])
def test_without_capacity_jobs_wait_and_say_why(account: Account, target: str | None) -> None:
    account.aws.faults.no_capacity(target)
    job_id = account.submit("exit 0")
    eventually(
        lambda: (account.aws.job(job_id).status_reason or "").startswith(
            "CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY"
        )
    )
    assert account.detail(job_id)["status"] == "RUNNABLE"
    account.aws.faults.capacity_returns(target)
    assert account.ended(job_id).status == "SUCCEEDED"


def test_without_fitting_instances_jobs_wait_and_say_why(account: Account) -> None:
    account.aws.faults.no_fitting_instance()
    job_id = account.submit("exit 0")
    reason = eventually(lambda: account.aws.job(job_id).status_reason)
    assert reason.startswith("MISCONFIGURATION:JOB_RESOURCE_REQUIREMENT")
    account.aws.faults.capacity_returns()
    assert account.ended(job_id).status == "SUCCEEDED"


def test_job_larger_than_every_environment_says_so(account: Account) -> None:
    requirements = [{"type": "VCPU", "value": "32"}, {"type": "MEMORY", "value": "61440"}]
    definition = account.define("exit 0", resourceRequirements=requirements)
    job_id = account.submit(jobDefinition=definition)
    reason = eventually(lambda: account.aws.job(job_id).status_reason)
    assert reason.startswith("MISCONFIGURATION:COMPUTE_ENVIRONMENT_MAX_RESOURCE")


def test_broken_service_role_makes_the_environment_invalid(account: Account) -> None:
    account.aws.faults.service_role_broken()
    job_id = account.submit("exit 0")
    reason = eventually(lambda: account.aws.job(job_id).status_reason)
    assert reason.startswith("MISCONFIGURATION:SERVICE_ROLE_PERMISSIONS")
    shown = account.batch.describe_compute_environments()["computeEnvironments"][0]
    assert shown["status"] == "INVALID"
    assert "sts:AssumeRole" in shown["statusReason"]


def test_quota_of_vcpus_limits_what_runs(account: Account) -> None:
    account.aws.faults.vcpu_quota(2)
    jobs = [account.submit("echo up; exec sleep 60") for _ in range(3)]
    for job_id in jobs[:2]:
        account.prints(job_id, "up")
    account.reach(jobs[2], "RUNNABLE")
    quota = account.service_quotas.get_service_quota(ServiceCode="fargate", QuotaCode="L-3032A538")
    assert quota["Quota"]["Value"] == 2
    account.aws.faults.vcpu_quota(None)
    account.prints(jobs[2], "up")


def test_quota_of_vcpus_on_instances(aws: FakeAWS) -> None:
    account = Account(aws, kinds=("EC2",))
    aws.faults.vcpu_quota(1, compute="ec2")
    jobs = [account.submit("echo up; exec sleep 60") for _ in range(2)]
    account.prints(jobs[0], "up")
    account.reach(jobs[1], "RUNNABLE")
    quotas = account.service_quotas.list_service_quotas(ServiceCode="ec2")["Quotas"]
    assert {each["QuotaCode"]: each["Value"] for each in quotas}["L-1216C47A"] == 1
    aws.faults.vcpu_quota(None, compute="ec2")
    account.prints(jobs[1], "up")
    account.close()
    with pytest.raises(ValueError, match="'lambda'"):
        aws.faults.vcpu_quota(1, compute="lambda")


def test_queue_time_limit_cancels_the_head() -> None:
    """After AWS's ten minutes (here seconds) at the head the queue's own action cancels."""
    reason = "CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY"
    with FakeAWS(step=0.005, speed=2000.0) as aws:
        account = Account(aws, time_limits=((reason, 600),))
        aws.faults.no_capacity()
        job = account.ended(account.submit("exit 0"))
        account.close()
    expected = f"Canceled by JobStateTimeLimit action due to reason: {reason}"
    assert job.status_reason == expected


def test_slow_start_keeps_jobs_starting(account: Account) -> None:
    account.aws.faults.slow_start(30)
    job_id = account.submit("exit 0")
    account.reach(job_id, "STARTING")
    assert "taskArn" in account.detail(job_id)["container"]
    account.batch.terminate_job(jobId=job_id, reason="too slow")
    assert account.ended(job_id).status_reason == "too slow"


@pytest.mark.parametrize("kind", ["FARGATE", "EC2"])
def test_image_that_cannot_be_pulled(aws: FakeAWS, kind: str) -> None:
    """As often as asked for; a retry rule on the field that has the reason brings the job through.

    On Fargate that is the status reason, on EC2 the container's.
    """
    account = Account(aws, kinds=(kind,))
    aws.faults.image_pull_fails("worker:*", count=1, why="429 Too Many Requests")
    field = "onStatusReason" if kind == "FARGATE" else "onReason"
    rules = [
        {field: "CannotPullContainerError*", "action": "RETRY"},
        {"onReason": "*", "action": "EXIT"},
    ]
    job_id = account.submit("exit 0", retryStrategy={"attempts": 2, "evaluateOnExit": rules})
    job = account.ended(job_id)
    account.close()
    assert job.status == "SUCCEEDED"
    first = job.attempts[0]
    said = {"FARGATE": first.status_reason, "EC2": first.reason}[kind] or ""
    assert said.startswith("CannotPullContainerError: ")
    assert said.endswith("429 Too Many Requests")
    other = {"FARGATE": first.reason, "EC2": first.status_reason}[kind]
    assert other == {"FARGATE": None, "EC2": "Task failed to start"}[kind]
    assert first.exit_code is None


@pytest.mark.parametrize("kind", ["FARGATE", "EC2"])
def test_task_that_cannot_be_set_up(aws: FakeAWS, kind: str) -> None:
    """The same two fields."""
    account = Account(aws, kinds=(kind,))
    text = "ResourceInitializationError: context deadline exceeded"
    aws.faults.start_fails(text, count=1)
    (attempt,) = account.ended(account.submit("exit 0")).attempts
    account.close()
    expected = {"FARGATE": (text, None), "EC2": ("Task failed to start", text)}[kind]
    assert (attempt.status_reason, attempt.reason) == expected


def test_no_route_and_missing_role_fail_with_their_texts(account: Account) -> None:
    account.aws.faults.no_route(count=1)
    job = account.ended(account.submit("exit 0"))
    assert (job.status_reason or "").startswith("ResourceInitializationError: unable to pull")
    account.aws.faults.missing_execution_role(count=1)
    job = account.ended(account.submit("exit 0"))
    assert (job.status_reason or "").startswith("ECS was unable to assume the role")
    assert account.ended(account.submit("exit 0")).status == "SUCCEEDED"


def test_execution_role_must_exist(account: Account) -> None:
    role = "arn:aws:iam::123456789012:role/nobody"
    job = account.ended(
        account.submit(jobDefinition=account.define("exit 0", executionRoleArn=role))
    )
    assert (job.status_reason or "").startswith(f"ECS was unable to assume the role '{role}'")


def test_overrides_above_8192_characters_fail_late(account: Account) -> None:
    """SubmitJob takes them; the job fails when it is to start."""
    environment = [{"name": "LONG", "value": "x" * 8000}]
    job_id = account.submit("exit 0", containerOverrides={"environment": environment})
    job = account.ended(job_id)
    assert job.status_reason == "Container Overrides length must be at most 8192"
    assert job.exit_code is None


def test_command_that_does_not_exist(account: Account) -> None:
    job = account.ended(account.submit(jobDefinition=account.define(command=["no-such-program"])))
    assert job.status == "FAILED"
    assert job.exit_code == 127
    assert "CannotStartContainerError" in (job.attempts[0].reason or "")


# Work that is lost.


def test_reclaimed_spot_job_is_told_and_says_so(spot_account: Account) -> None:
    account = spot_account
    job_id = account.submit(f"trap 'echo told; exit 143' TERM; echo up; {LOOP}")
    account.prints(job_id, "up")
    account.aws.faults.reclaim(job_id)
    job = account.ended(job_id)
    assert job.status == "FAILED"
    assert job.status_reason == "Your Spot Task was interrupted."
    assert job.exit_code == 143
    assert "told" in account.aws.logs(job_id)


def test_reclaimed_job_that_exits_zero_has_succeeded(spot_account: Account) -> None:
    """AWS's trap: no retry rule sees such an end."""
    account = spot_account
    job_id = account.submit(f"trap 'exit 0' TERM; echo up; {LOOP}", retryStrategy={"attempts": 3})
    account.prints(job_id, "up")
    account.aws.faults.reclaim(job_id)
    assert account.ended(job_id).status == "SUCCEEDED"


def test_reclaim_kills_after_its_grace_and_the_job_is_retried(spot_account: Account) -> None:
    account = spot_account
    rules = [{"onStatusReason": "Your Spot Task was interrupted*", "action": "RETRY"}]
    job_id = account.submit(
        f"trap '' TERM; [ $AWS_BATCH_JOB_ATTEMPT = 2 ] && exit 0; echo up; {LOOP}",
        retryStrategy={
            "attempts": 2,
            "evaluateOnExit": [*rules, {"onReason": "*", "action": "EXIT"}],
        },
    )
    account.prints(job_id, "up")
    account.aws.faults.reclaim(job_id, notice=0.05, grace=0.1)
    job = account.ended(job_id)
    assert job.status == "SUCCEEDED"
    assert [attempt.exit_code for attempt in job.attempts] == [137, 0]


def test_a_fraction_of_the_spot_jobs_is_reclaimed(spot_account: Account) -> None:
    account = spot_account
    parent = account.submit("echo up; exec sleep 60", arrayProperties={"size": 6})
    for index in range(6):
        account.prints(f"{parent}:{index}", "up")
    chosen = account.aws.faults.reclaim_fraction(1 / 3)
    assert len(chosen) == 2
    for job_id in chosen:
        assert account.ended(job_id).status_reason == "Your Spot Task was interrupted."
    running = [job for job in account.aws.jobs() if job.status == "RUNNING"]
    assert len(running) == 4


def test_spot_instance_that_goes_takes_the_job_with_it(aws: FakeAWS) -> None:
    """On EC2 the host's end is the reason; killed without notice there is no exit code."""
    account = Account(aws, kinds=("SPOT",))
    job_id = account.submit("echo up; exec sleep 60")
    account.prints(job_id, "up")
    assert "containerInstanceArn" in account.detail(job_id)["container"]
    aws.faults.kill_instance(job_id)
    job = account.ended(job_id)
    account.close()
    assert (job.status_reason or "").startswith("Host EC2 (instance i-")
    assert (job.status_reason or "").endswith(") terminated.")
    assert job.exit_code is None


def test_jobs_that_have_ended_are_forgotten_on_request(account: Account) -> None:
    """All calls then know as little of them as of any other id; what runs is still there."""
    ended = [account.submit("exit 0"), account.submit("exit 0", arrayProperties={"size": 2})]
    for job_id in ended:
        account.ended(job_id)
    running = account.submit("echo up; exec sleep 60")
    account.prints(running, "up")
    assert account.aws.faults.forget_ended() == ended
    wanted = [*ended, f"{ended[1]}:0", running]
    found = account.batch.describe_jobs(jobs=wanted)["jobs"]
    assert [job["jobId"] for job in found] == [running]
    with pytest.raises(ClientError, match="does not exist"):
        account.batch.list_jobs(arrayJobId=ended[1])
    assert account.aws.faults.forget_ended() == []


def test_out_of_memory_on_request(account: Account) -> None:
    job_id = account.submit("echo up; exec sleep 60")
    account.prints(job_id, "up")
    account.aws.faults.out_of_memory(job_id)
    job = account.ended(job_id)
    assert job.exit_code == 137
    assert job.status_reason == "Essential container in task exited"
    expected = "OutOfMemoryError: Container killed due to memory usage"
    assert job.attempts[0].reason == expected
    assert account.detail(job_id)["container"]["reason"] == expected


def test_job_that_outgrows_its_memory_is_killed(account: Account) -> None:
    requirements = [{"type": "VCPU", "value": "0.25"}, {"type": "MEMORY", "value": "512"}]
    definition = account.define(
        "exec python -c 'import time; x = bytearray(600 << 20); time.sleep(60)'",
        resourceRequirements=requirements,
    )
    job = account.ended(account.submit(jobDefinition=definition))
    assert job.exit_code == 137
    assert (job.attempts[0].reason or "").startswith("OutOfMemoryError")


def test_largest_process_of_a_job_is_killed_for_memory(account: Account) -> None:
    """As in a container: a small main process outlives a large child."""
    requirements = [{"type": "VCPU", "value": "0.25"}, {"type": "MEMORY", "value": "512"}]
    definition = account.define(
        "python -c 'import time; x = bytearray(600 << 20); time.sleep(60)'; echo child $?",
        resourceRequirements=requirements,
    )
    job_id = account.submit(jobDefinition=definition)
    job = account.ended(job_id)
    assert job.status == "SUCCEEDED"
    assert "child 137" in account.aws.logs(job_id)


# The API.


def _client(attempts: int = 1) -> object:
    return boto3.client("batch", config=Config(retries={"total_max_attempts": attempts}))


def test_throttled_call_is_429(account: Account) -> None:
    account.aws.faults.throttle("ListJobs", count=2)
    client = _client()
    for _ in range(2):
        with pytest.raises(ClientError) as caught:
            client.list_jobs(jobQueue=account.setup.queue)  # type: ignore[attr-defined]
        assert caught.value.response["Error"]["Code"] == "TooManyRequestsException"
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 429
    client.list_jobs(jobQueue=account.setup.queue)  # type: ignore[attr-defined]
    client.close()  # type: ignore[attr-defined]


def test_too_many_batch_calls_a_second_are_throttled() -> None:
    """AWS takes fifty; with ten the test needs no fast machine."""
    assert FakeAWS().calls_per_second == 50
    with FakeAWS(calls_per_second=10) as aws:
        client = _client()
        refused = 0
        for _ in range(80):
            try:
                client.describe_job_queues()  # type: ignore[attr-defined]
            except ClientError:
                refused += 1
        client.close()  # type: ignore[attr-defined]
        codes = {request.error for request in aws.requests}
    assert refused
    assert codes == {None, "TooManyRequestsException"}


def test_lost_response_leaves_its_effect(account: Account) -> None:
    """The call is carried out and the connection closed: a retry makes a second job."""
    definition = account.define("exit 0")
    account.aws.faults.lose_response("SubmitJob")
    client = _client()
    with pytest.raises((NoConnectionError, HTTPClientError)):
        client.submit_job(  # type: ignore[attr-defined]
            jobName="once", jobQueue=account.setup.queue, jobDefinition=definition
        )
    client.close()  # type: ignore[attr-defined]
    assert [job.name for job in account.aws.jobs()] == ["once"]
    assert account.aws.requests[-1].status == 0
    found = account.batch.list_jobs(
        jobQueue=account.setup.queue, filters=[{"name": "JOB_NAME", "values": ["once"]}]
    )
    assert len(found["jobSummaryList"]) == 1


def test_unreachable_api_closes_connections_for_a_while(account: Account) -> None:
    client = _client()
    account.aws.faults.unreachable(0.5)
    started = time.monotonic()
    with pytest.raises((NoConnectionError, HTTPClientError)):
        client.describe_job_queues()  # type: ignore[attr-defined]

    def answers() -> bool:
        try:
            client.describe_job_queues()  # type: ignore[attr-defined]
        except (NoConnectionError, HTTPClientError):
            return False
        return True

    eventually(answers)
    client.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started >= 0.5


def test_expired_credentials_fail_until_renewed(account: Account) -> None:
    account.aws.faults.expire_credentials()
    for name, code in (("batch", "ExpiredTokenException"), ("s3", "ExpiredToken")):
        client = boto3.client(name)
        call = client.describe_job_queues if name == "batch" else client.list_buckets
        with pytest.raises(ClientError) as caught:
            call()
        client.close()
        assert caught.value.response["Error"]["Code"] == code
    account.aws.faults.renew_credentials()
    fresh = boto3.Session().client("batch")
    fresh.describe_job_queues()
    fresh.close()


def test_denied_operation(account: Account) -> None:
    account.aws.faults.deny("batch:SubmitJob")
    with pytest.raises(ClientError) as caught:
        account.submit("exit 0")
    error = caught.value.response["Error"]
    assert error["Code"] == "AccessDeniedException"
    assert "batch:SubmitJob" in error["Message"]
    account.aws.faults.clear()
    account.submit("exit 0")


@pytest.mark.parametrize("name", ["SubmitJobs", "submit_job", "batch:GetObject", "x:SubmitJob", ""])
def test_a_fault_of_a_call_that_does_not_exist_is_refused(aws: FakeAWS, name: str) -> None:
    """A slip would otherwise make a test that tests nothing."""
    faults = aws.faults
    for inject in (
        faults.throttle,
        faults.lose_response,
        faults.deny,
        faults.cut_response,
        faults.corrupt_response,
        lambda operation: faults.slow_response(operation, 1.0),
    ):
        with pytest.raises(ValueError, match="no operation"):
            inject(name)
