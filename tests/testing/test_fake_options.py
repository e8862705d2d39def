"""Lists that lag and policies that bind, in an account of the fake AWS in which nothing starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ClientError
from fake_helpers import Account

from cloudexec._aws.policy import policy
from cloudexec._aws.profile import Profile
from cloudexec.testing import FakeAWS


@pytest.fixture(scope="module")
def account() -> Iterator[Account]:
    with FakeAWS(step=0.005, calls_per_second=1000.0) as aws:
        account = Account(aws)
        yield account
        account.close()


@pytest.fixture(autouse=True)
def nothing_starts(account: Account) -> Iterator[None]:
    account.aws.faults.no_capacity()
    yield
    account.aws.faults.clear()


def test_lists_lag(account: Account) -> None:
    """What was submitted just now is not listed, and is described."""
    account.aws.faults.list_lag(60)
    job = account.submit("exit 0", jobName="lagging")
    filters = [{"name": "JOB_NAME", "values": ["lagging"]}]

    def listed() -> list[Any]:
        queue = account.setup.queue
        return list(account.batch.list_jobs(jobQueue=queue, filters=filters)["jobSummaryList"])

    assert listed() == []
    assert account.detail(job)["jobName"] == "lagging"
    account.aws.faults.list_lag(0)
    assert [each["jobId"] for each in listed()] == [job]


def _profile(account: Account) -> Profile:
    setup = account.setup
    return Profile(
        name="p",
        region=account.aws.region,
        queues={"fargate": setup.queue},
        job_role=setup.job_role,
        execution_role=setup.execution_role,
    )


def _launch(account: Account, name: str) -> None:
    """Do what an executor does to have workers."""
    definition = account.batch.register_job_definition(
        jobDefinitionName=f"cloudexec-{name}",
        type="container",
        platformCapabilities=["FARGATE"],
        tags={"a": "b"},
        containerProperties={
            "image": "worker:1",
            "executionRoleArn": account.setup.execution_role,
            "jobRoleArn": account.setup.job_role,
            "resourceRequirements": [
                {"type": "VCPU", "value": "1"},
                {"type": "MEMORY", "value": "2048"},
            ],
        },
    )
    job = account.batch.submit_job(
        jobName="cloudexec-1",
        jobQueue=account.setup.queue,
        jobDefinition=definition["jobDefinitionArn"],
        tags={"a": "b"},
    )
    account.batch.terminate_job(jobId=job["jobId"], reason="the test is over")


@pytest.mark.parametrize("service", ["ecs-tasks.amazonaws.com", "batch.amazonaws.com"])
@pytest.mark.parametrize("submit_names_jobs", [True, False])
def test_the_printed_policy_is_enough_to_launch(
    account: Account, service: str, submit_names_jobs: bool
) -> None:
    """Whichever of what is published is so."""
    account.aws.faults.allow_only(
        policy(_profile(account)), roles_are_passed_to=service, submit_names_jobs=submit_names_jobs
    )
    _launch(account, f"allowed-{service[:3]}-{submit_names_jobs}")
    with pytest.raises(ClientError, match="batch:DeleteJobQueue"):
        account.batch.delete_job_queue(jobQueue=account.setup.queue)


def test_a_policy_that_lacks_something_is_not_enough(account: Account) -> None:
    """One that lets roles be passed to the other service only, or submits on queues only."""
    document = json.dumps(policy(_profile(account)))
    both = json.dumps(["batch.amazonaws.com", "ecs-tasks.amazonaws.com"])
    assert both in document
    narrow = json.loads(document.replace(both, json.dumps("ecs-tasks.amazonaws.com")))
    account.aws.faults.allow_only(narrow, roles_are_passed_to="batch.amazonaws.com")
    with pytest.raises(ClientError, match="iam:PassRole on resource"):
        _launch(account, "narrow")
    without = json.loads(document)
    for each in without["Statement"]:
        if each["Sid"] == "Jobs":
            each["Action"].remove("batch:SubmitJob")
    account.aws.faults.allow_only(without)
    with pytest.raises(ClientError, match=r"batch:SubmitJob on resource: .*:job/new"):
        _launch(account, "without")
    account.aws.faults.allow_only(without, submit_names_jobs=False)
    _launch(account, "without")
