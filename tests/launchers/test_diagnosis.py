"""AWS's words, turned into a cause and a remedy."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cloudexec import Batch
from cloudexec._aws.diagnosis import (
    LOG_LINES,
    JobEnd,
    Situation,
    cause_of_end,
    cause_of_refusal,
    cause_of_waiting,
)
from cloudexec._aws.limits import ECS_MOST_VCPUS, WorkerSize, fargate_memories, more_memory

ENVIRONMENT: dict[str, Any] = {
    "state": "ENABLED",
    "status": "VALID",
    "computeResources": {"maxvCpus": 16},
}


@pytest.mark.parametrize(
    ("end", "words", "fatal"),
    [
        (
            JobEnd(status_reason="Container Overrides length must be at most 8192"),
            "environment= of the launcher is too long",
            True,
        ),
        (
            JobEnd(
                status_reason="Task failed to start",
                container_reason="CannotPullContainerError: pull access denied",
            ),
            "cloudexec image push",
            True,
        ),
        (
            JobEnd(
                status_reason="Task failed to start",
                container_reason="CannotPullContainerError: dial tcp 1.2.3.4:443: i/o timeout",
            ),
            "NAT gateway",
            False,
        ),
        (
            JobEnd(
                status_reason="ResourceInitializationError: unable to pull secrets: AccessDenied"
            ),
            "GetSecretValue",
            True,
        ),
        (
            JobEnd(status_reason="ECS was unable to assume the role 'x' that was provided"),
            "cloudexec up",
            True,
        ),
        (JobEnd(status_reason="Your Spot Task was interrupted.", exit_code=143), "spot=", False),
        (JobEnd(status_reason="Host EC2 (instance i-1) terminated."), "spot=", False),
        (
            JobEnd(
                status_reason="Essential container in task exited",
                container_reason="OutOfMemoryError: Container killed due to memory usage",
                exit_code=137,
            ),
            "memory=",
            False,
        ),
        (JobEnd(status_reason="Job attempt duration exceeded timeout"), "max_runtime=", False),
        (
            JobEnd(status_reason="Essential container in task exited", exit_code=3, log_tail="Py"),
            "image that fits",
            True,
        ),
        (
            JobEnd(
                status_reason="Essential container in task exited",
                exit_code=4,
                log_tail="cloudexec worker: cannot reach the client at 10.0.0.1:5",
            ),
            "advertise=",
            False,
        ),
        (JobEnd(status_reason="Essential container in task exited", exit_code=4), "listen=", False),
        (
            JobEnd(exit_code=4, log_tail="cloudexec worker: no", relay="192.0.2.1:443"),
            r"reach this process through the relay 192\.0\.2\.1:443\ncloudexec worker: no; workers "
            r"must be able to connect to 192\.0\.2\.1:443, (?!.*(advertise|listen|security group))",
            False,
        ),
        (
            JobEnd(exit_code=4, relay="ssh://me@host"),
            "through the relay ssh://me@host; .*GatewayPorts (?!.*(advertise|security group))",
            False,
        ),
        (
            JobEnd(
                status_reason="You've reached the limit on the number of vCPUs you can run "
                "concurrently"
            ),
            "Service Quotas",
            False,
        ),
        (
            JobEnd(
                status_reason="ResourceInitializationError: unable to pull secrets or registry "
                "auth: execution resource retrieval failed: unable to retrieve ecr registry auth: "
                "AccessDeniedException: x is not authorized to perform: ecr:GetAuthorizationToken"
            ),
            "may not pull the worker's image.*ecr:BatchGetImage",
            True,
        ),
        (
            JobEnd(
                status_reason="ResourceInitializationError: unable to pull secrets or registry "
                "auth: execution resource retrieval failed: unable to retrieve secret from asm: "
                "failed to fetch secret arn from secrets manager: AccessDeniedException"
            ),
            "key could not be read.*GetSecretValue",
            True,
        ),
        (
            JobEnd(
                status_reason="ResourceInitializationError: failed to validate logger args: create "
                "stream has been retried 1 times: failed to create Cloudwatch log stream: "
                "ResourceNotFoundException: The specified log group does not exist."
            ),
            "log cannot be written.*logs:CreateLogStream",
            True,
        ),
        (
            JobEnd(status_reason="Timeout waiting for network interface provisioning to complete."),
            "no network interface.*--subnet",
            False,
        ),
        (JobEnd(exit_code=9, log_tail="boom"), "exit code 9.*AWS gives no reason\nboom", False),
    ],
)
def test_the_end_of_a_worker(end: JobEnd, words: str, fatal: bool) -> None:
    """Cause and remedy, and whether trying again can help."""
    cause = cause_of_end(end)
    assert re.search(words, str(cause)), str(cause)
    assert cause.fatal is fatal


@pytest.mark.parametrize(
    ("situation", "words", "fatal"),
    [
        (Situation(queue="q", queue_state="DISABLED"), "queue q is disabled", True),
        (
            Situation(queue="q", queue_status="INVALID", queue_reason="why"),
            "q is invalid: why",
            True,
        ),
        (
            Situation(
                environments=[{**ENVIRONMENT, "status": "INVALID", "statusReason": "no role"}]
            ),
            "no role.*cloudexec up",
            True,
        ),
        (Situation(environments=[{**ENVIRONMENT, "state": "DISABLED"}]), "disabled", True),
        (
            Situation(reasons=["MISCONFIGURATION:COMPUTE_ENVIRONMENT_MAX_RESOURCE - x"]),
            "smaller size",
            True,
        ),
        (
            Situation(reasons=["CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY - x"], spot=True),
            "spot=False",
            False,
        ),
        (
            Situation(reasons=["CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY - x"]),
            "try another size",
            False,
        ),
        (
            Situation(statuses={"RUNNABLE": 14}, vcpus=1, quota_vcpus=6, used_vcpus=6),
            "may run 6 vCPUs at once, and 6 are in use by this executor; .*Service Quotas",
            False,
        ),
        (
            Situation(statuses={"RUNNABLE": 4}, vcpus=4, environments=[ENVIRONMENT], used_vcpus=16),
            "4 workers wait .*allow 16 vCPUs in all, and 16 are in use.*--max-vcpus",
            False,
        ),
        (
            Situation(reasons=["MISCONFIGURATION:SERVICE_ROLE_PERMISSIONS - x"]),
            "lacks a permission",
            True,
        ),
        (
            Situation(statuses={"RUNNABLE": 3}, environments=[ENVIRONMENT], vcpus=32),
            "asks for 32 vCPUs.*16 in all",
            True,
        ),
        (
            Situation(statuses={"RUNNABLE": 3}, vcpus=4, quota_vcpus=2),
            "Service Quotas",
            False,
        ),
        (
            Situation(statuses={"RUNNABLE": 3}, environments=[ENVIRONMENT], vcpus=1, ahead=7),
            "3 workers wait for capacity.*7 jobs before them",
            False,
        ),
        (Situation(statuses={"STARTING": 2}), "image is pulled", False),
        (Situation(statuses={"RUNNING": 2}), "advertise=", False),
        (
            Situation(statuses={"RUNNING": 2}, relay="192.0.2.1:443"),
            r"told to dial the relay 192\.0\.2\.1:443; (?!.*(advertise|listen)=)",
            False,
        ),
    ],
)
def test_why_workers_do_not_come(situation: Situation, words: str, fatal: bool) -> None:
    """The first cause that is known to be one."""
    cause = cause_of_waiting(situation)
    assert cause is not None
    assert re.search(words, str(cause)), str(cause)
    assert cause.fatal is fatal


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "CannotPullContainerError: failed to resolve ref x: unexpected status from HEAD "
            "request to https://1.dkr.ecr.us-east-1.amazonaws.com/v2/x: 503 Service Unavailable",
            "need to start is busy",
        ),
        (
            "CannotPullContainerError: Error response from daemon: toomanyrequests: You have "
            "reached your pull rate limit",
            "image in Amazon ECR",
        ),
        ("CannotPullContainerError: received unexpected HTTP status: 500", "need to start is busy"),
        (
            "CannotPullContainerError: httpReadSeeker: failed open: 429 Too Many Requests",
            "usually passes",
        ),
        (
            "ResourceInitializationError: unable to pull secrets or registry auth: execution "
            "resource retrieval failed: unable to retrieve secret from asm: failed to fetch "
            "secret x from secrets manager: ThrottlingException: Rate exceeded status code: 400",
            "need to start is busy",
        ),
        (
            "ResourceInitializationError: failed to validate logger args: create stream has been "
            "retried 1 times: failed to create Cloudwatch log stream: ServiceUnavailable: status "
            "code: 503, request id: 5",
            "need to start is busy",
        ),
        (
            "ResourceInitializationError: unable to pull secrets or registry auth: RequestCanceled "
            "caused by: context deadline exceeded",
            "NAT gateway",
        ),
        ("CannotPullContainerError: failed to do request: Head https://x: EOF", "usually passes"),
        ("CannotPullContainerError: failed to do request: connection refused", "usually passes"),
        (
            "CannotPullContainerError: Get https://r/v2/: dial tcp 10.0.0.5:5000: connect: "
            "connection refused",
            "usually passes",
        ),
        ("CannotPullContainerError: net/http: TLS handshake timeout", "if it lasts"),
    ],
)
@pytest.mark.parametrize("on_fargate", [True, False])
def test_what_may_pass_is_tried_again(said: str, words: str, on_fargate: bool) -> None:
    """Throttling, errors of servers and timeouts are no reason to give a run up."""
    end = JobEnd(
        status_reason=said if on_fargate else "Task failed to start",
        container_reason="" if on_fargate else said,
    )
    cause = cause_of_end(end)
    assert words in str(cause)
    assert not cause.fatal


@pytest.mark.parametrize(
    "said",
    [
        "CannotPullContainerError: pull image manifest has been retried 5 time(s): failed to "
        "resolve ref x: 503.dkr.ecr.us-east-1.amazonaws.com/x:1: not found",
        "CannotPullContainerError: pull access denied, status code: 403, request id: 500-503",
        "CannotPullContainerError: failed to resolve ref typo.example/x:1: dial tcp: lookup "
        "typo.example on 10.0.0.2:53: no such host",
        "ResourceInitializationError: failed to fetch secret x: AccessDeniedException: status "
        "code: 400, request id: 429",
    ],
)
def test_what_does_not_pass_is_not(said: str) -> None:
    """Numbers elsewhere in AWS's words are no HTTP status."""
    assert cause_of_end(JobEnd(status_reason=said)).fatal


def test_a_worker_that_failed_outweighs_those_that_wait() -> None:
    """What ended last says more than a state; a reclaim says nothing about the rest."""
    pulled = JobEnd(container_reason="CannotPullContainerError: no such image")
    reclaimed = JobEnd(status_reason="Your Spot Task was interrupted.")
    waiting = Situation(statuses={"RUNNABLE": 1}, ends=[pulled, reclaimed])
    cause = cause_of_waiting(waiting)
    assert cause is not None
    assert "cannot be pulled" in str(cause)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ClientException: JobQueue q is DISABLED.", "enable it"),
        ("ClientException: Job Queue: q does not exist", "cloudexec doctor"),
    ],
)
def test_a_queue_that_takes_no_job(said: str, words: str) -> None:
    """AWS's words, and what to do."""
    assert re.search(f"{said}; .*{words}", str(cause_of_refusal(said)))
    assert str(cause_of_refusal("AccessDenied: the job queue q")) == "AccessDenied: the job queue q"


def test_nothing_known_is_nothing_said() -> None:
    """A job that was just submitted is no problem."""
    assert cause_of_waiting(Situation(statuses={"SUBMITTED": 1})) is None


PULL = "CannotPullContainerError: "


@pytest.mark.parametrize(
    ("end", "words", "fatal"),
    [
        (
            JobEnd(
                status_reason="Task failed to start",
                container_reason=f"{PULL}image Manifest does not contain descriptor matching "
                "platform 'linux/amd64'",
            ),
            "another kind of processor.*--platform linux/arm64",
            True,
        ),
        (
            JobEnd(
                status_reason="Essential container in task exited",
                exit_code=255,
                log_tail="exec /usr/local/bin/python3: exec format error",
            ),
            "another kind of processor.*--platform linux/arm64",
            True,
        ),
        (
            JobEnd(
                status_reason="Task failed to start",
                container_reason=f"{PULL}failed to register layer: no space left on device",
            ),
            r"disk is full.*ephemeral_gib=.*200 GiB",
            True,
        ),
        (
            JobEnd(
                status_reason="Essential container in task exited",
                exit_code=1,
                log_tail="cloudexec worker 1: x\nOSError: [Errno 28] No space left on device",
                compute="ec2",
            ),
            "disk is full.*launch template",
            False,
        ),
        (
            JobEnd(
                status_reason="Unable to assume the service linked role. Please verify that the "
                "ECS service linked role exists."
            ),
            "create-service-linked-role --aws-service-name ecs.amazonaws.com",
            True,
        ),
        (
            JobEnd(
                status_reason="Essential container in task exited",
                exit_code=0,
                log_tail="nginx: ready",
                image="nginx:1",
            ),
            "the image nginx:1 does not start a worker: it ended with exit code 0.*image push",
            False,
        ),
        (
            JobEnd(exit_code=1, log_tail="/usr/bin/python3: No module named 'cloudexec'"),
            "does not start a worker",
            False,
        ),
    ],
)
def test_causes_of_the_first_day_have_remedies(end: JobEnd, words: str, fatal: bool) -> None:
    cause = cause_of_end(end)
    assert re.search(f"(?s){words}", str(cause))
    assert cause.fatal is fatal


def test_a_worker_that_fails_is_not_taken_for_an_image_that_has_none() -> None:
    tail = "cloudexec worker 1: cloudexec 1.0, Python 3.11, 1 slot; dialing x\nTraceback"
    for end in (
        JobEnd(exit_code=1, log_tail=tail),
        JobEnd(exit_code=1),  # lines come late to the log
        JobEnd(exit_code=1, log_tail="line\n" * LOG_LINES),  # there was more
        JobEnd(exit_code=137, log_tail="killed before it said anything"),
    ):
        assert "does not start a worker" not in str(cause_of_end(end))


def test_what_aws_says_in_two_places_is_said_once() -> None:
    said = f"{PULL}pull access denied"
    text = str(cause_of_end(JobEnd(status_reason=said, container_reason=said)))
    assert text.count("pull access denied") == 1


@pytest.mark.parametrize(
    ("vcpus", "mib", "compute", "words"),
    [
        (0.25, 512, "fargate", "memory=('512MiB', '1GiB')"),
        (0.25, 2048, "fargate", "give vcpus=0.5 and memory='4GiB'"),
        (1, 5120, "fargate", "memory=('5GiB', '8GiB')"),
        (16, 32 * 1024, "fargate", "memory=('32GiB', '64GiB')"),
        (16, 120 * 1024, "fargate", "give vcpus=32 and memory='244GiB'"),
        (32, 244 * 1024, "fargate", "give compute='ec2' and memory='488GiB'"),
        (3, 5000, "ec2", "memory=('5000MiB', '10000MiB')"),
    ],
)
def test_more_memory_is_a_size_that_there_is(
    vcpus: float, mib: int, compute: str, words: str
) -> None:
    size = WorkerSize(vcpus=vcpus, memory_mib=mib)
    end = JobEnd(
        container_reason="OutOfMemoryError: Container killed due to memory usage",
        exit_code=137,
        size=size,
        compute=compute,
    )
    assert words in str(cause_of_end(end))


def test_a_task_of_amazon_ecs_is_not_advised_to_be_larger_than_it_takes() -> None:
    end = JobEnd(
        container_reason="OutOfMemoryError: Container killed due to memory usage",
        exit_code=137,
        size=WorkerSize(vcpus=16, memory_mib=120 * 1024),
        most_vcpus=ECS_MOST_VCPUS,
    )
    assert "vcpus=32" not in str(cause_of_end(end))


def test_every_size_of_fargate_has_advice_that_is_a_size() -> None:
    for vcpus in (0.25, 0.5, 1, 2, 4, 8, 16, 32):
        for mib in fargate_memories(vcpus):
            text = more_memory(WorkerSize(vcpus=vcpus, memory_mib=mib), "fargate")
            if found := re.search(r"memory=\('(\w+)', '(\w+)'\)", text):
                Batch(vcpus=vcpus, memory=(found[1], found[2]))
            elif found := re.search(r"vcpus=(\S+) and memory='(\w+)'", text):
                Batch(vcpus=float(found[1]), memory=found[2])
            else:
                assert "compute='ec2'" in text
