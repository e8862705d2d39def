"""The EC2 launcher against emulated instances that run their user data, and real workers."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import subprocess
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
from launcher_helpers import eventually, kill_when, write_profile
from launcher_tasks import square

from cloudexec import (
    EC2,
    BatchExecutor,
    BudgetExceededError,
    ConfigError,
    Fallback,
    LaunchError,
    WorkerLostError,
)
from cloudexec._aws import instance_script
from cloudexec._aws.instance_diagnosis import cause_of_refused_fleet, may_pass, worst_of
from cloudexec._launchers.aws import asking
from cloudexec.launchers import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    JobStatus,
    Phase,
    Platform,
    Submitted,
    Target,
)
from cloudexec.testing import FakeAWS

Make = Callable[..., EC2]

NO_CAPACITY = "InsufficientInstanceCapacity"


def asked(aws: Any) -> list[dict[str, Any]]:
    """Return the fleets that were made, also those whose answers were lost."""
    return [
        r.parameters for r in aws.requests if r.operation == "CreateFleet" and r.status in (0, 200)
    ]


def alive(aws: Any) -> list[str]:
    return [each.instance_id for each in aws.instances() if each.state != "terminated"]


def squares(executor: BatchExecutor, count: int = 100) -> None:
    assert list(executor.map(square, range(count))) == [n * n for n in range(count)]


ODD = 'it\'s "odd" $HOME `id` \\ \n{x}'
VARIABLES = {
    # They wait for a client to dial, if their scripts run.
    "CLOUDEXEC_TARGET": "127.0.0.1:1",
    "CLOUDEXEC_EXECUTOR_ID": "0123456789abcdef",
    "CLOUDEXEC_SLOTS": "1",
    "CLOUDEXEC_LAUNCH": "1",
    "CLOUDEXEC_CERTIFICATE_SHA256": "00" * 32,
}


def with_platform(launcher: EC2, work: Callable[[Platform], Any]) -> Any:
    """Do something with the platform of an executor that has no tasks."""

    async def run() -> Any:
        executor = ExecutorInfo(id="0123456789abcdef", launch_timeout=60.0)
        async with launcher.connect(executor) as site:
            return await work(site.platform)

    return asyncio.run(run())


async def submit(platform: Platform, name: str, workers: int = 1, **settings: Any) -> Submitted:
    await platform.prepare()
    request = JobRequest(name=name, workers=workers, environment=VARIABLES, **settings)
    return await platform.submit(request)


async def look(platform: Platform, name: str, workers: int, **settings: Any) -> JobStatus:
    found = await platform.describe([Inspection(job_id=name, workers=workers, **settings)])
    return found[name]


async def until(platform: Platform, is_so: Callable[[JobStatus], bool]) -> JobStatus:
    """Look at the job of one worker until something is so."""
    async with asyncio.timeout(30):
        while True:
            status = await look(platform, "cloudexec-a-1", 1)
            if is_so(status):
                return status
            await asyncio.sleep(0.02)


@pytest.fixture
def still(aws: Any) -> Any:
    """The emulated AWS, whose instances do not run their scripts: only the calls count."""
    aws.faults.ec2.scripts_hang = True
    return aws


# What is asked for.


def test_one_request_starts_all_workers_without_a_secret(aws: Any, ec2: Make) -> None:
    """Each with its slots and variables, from an image of the account; each ends itself."""
    boto3.client("ecr", region_name=aws.region).create_repository(repositoryName="worker")
    registry = f"123456789012.dkr.ecr.{aws.region}.amazonaws.com"
    launcher = ec2(
        image=f"{registry}/worker@sha256:{'0' * 64}",
        environment={"ODD": ODD},
        tags={"a": "b"},
        max_runtime=3600,
    )
    with BatchExecutor(4, launcher=launcher, min_workers=4) as executor:
        squares(executor, 300)
        eventually(lambda: executor.stats().workers.slots == 4)
        assert executor.submit(os.getenv, "ODD").result(timeout=60) == ODD
        launches = executor.stats().launches
    (request,) = asked(aws)
    assert request["Type"] == "instant"
    assert request["TargetCapacitySpecification"] == {
        "TotalTargetCapacity": 2,
        "DefaultTargetCapacityType": "on-demand",
    }
    (config,) = request["LaunchTemplateConfigs"]
    wanted = config["Overrides"][0]["InstanceRequirements"]
    assert wanted["VCpuCount"] == {"Min": 2, "Max": 4}
    assert wanted["MemoryMiB"]["Min"] == 4096
    eventually(lambda: not alive(aws))
    instances = aws.instances()
    assert {each.instance_id for each in instances} == {each.job_id for each in launches}
    assert {each.state_reason for each in instances} == {"Client.InstanceInitiatedShutdown"}
    assert {each.exit_code for each in instances} == {0}
    (data,) = [r.parameters for r in aws.requests if r.operation == "CreateLaunchTemplate"]
    assert data["LaunchTemplateData"]["MetadataOptions"] == {
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
    }
    assert data["LaunchTemplateData"]["InstanceInitiatedShutdownBehavior"] == "terminate"
    for each in instances:
        assert each.tags["a"] == "b"
        assert each.tags["cloudexec:job"] == each.tags["Name"]
        assert {"cloudexec:executor", "cloudexec:user", "cloudexec:expires"} <= each.tags.keys()
        for text in (each.user_data, each.console, str(each.environment)):
            assert "0f" * 16 not in text
        # The timer is the first thing: an hour, with a margin before and after it.
        assert "shutdown -P +80 " in each.user_data.splitlines()[1]
        assert "docker login" in each.user_data
        assert len(each.user_data) < 8 * 1024
        checked = subprocess.run(["bash", "-n"], input=each.user_data, text=True)
        assert checked.returncode == 0


def test_templates_are_found_again_and_made_again_if_they_are_gone(still: Any, ec2: Make) -> None:
    client = boto3.client("ec2", region_name=still.region)

    async def work(platform: Platform) -> None:
        await submit(platform, "cloudexec-0123456789abcdef-1")
        for each in client.describe_launch_templates()["LaunchTemplates"]:
            client.delete_launch_template(LaunchTemplateName=each["LaunchTemplateName"])
        await submit(platform, "cloudexec-0123456789abcdef-2")

    with_platform(ec2(), work)
    with_platform(ec2(image="x"), lambda it: submit(it, "cloudexec-0123456789abcdef-3"))
    with_platform(ec2(disk_gib=50), lambda it: submit(it, "cloudexec-0123456789abcdef-4"))
    made = [r for r in still.requests if r.operation == "CreateLaunchTemplate" and r.status == 200]
    names = [each.parameters["LaunchTemplateName"] for each in made]
    assert names[0] == names[1] != names[2]
    assert len(still.instances()) == 4
    # From there, `cloudexec cost` has it, which Amazon EC2 does not tell.
    sizes = [each.tags["cloudexec:disk-gib"] for each in still.instances()]
    assert sizes == ["30", "30", "30", "50"]


@pytest.mark.parametrize(
    ("settings", "type_", "said"),
    [
        ({"instance_types": ["m7i.large", "c7i.xlarge"]}, "m7i.large", ""),
        ({"vcpus": 1, "arch": "arm64"}, "c7g.medium", ""),
        ({"vcpus": 4, "gpus": 1}, "g4dn.xlarge", "--gpus all"),
        ({"instance_types": ["g5.xlarge"], "gpus": 1}, "g5.xlarge", "--gpus all"),
    ],
)
def test_instances_are_what_is_asked_for(
    still: Any, ec2: Make, settings: Any, type_: str, said: str
) -> None:
    with_platform(ec2(**settings), lambda platform: submit(platform, "cloudexec-a-1"))
    (instance,) = still.instances()
    assert instance.type == type_
    assert said in instance.user_data


def test_another_type_is_taken_where_one_is_full(still: Any, ec2: Make) -> None:
    still.faults.ec2.full_types = frozenset(["c6i.large"])
    with_platform(ec2(), lambda platform: submit(platform, "cloudexec-a-1", 3))
    assert [each.type for each in still.instances()] == ["c7i.large"] * 3
    assert len(asked(still)) == 1


def test_variables_that_are_too_long_are_refused_before_they_are_sent(aws: Any, ec2: Make) -> None:
    launcher = ec2(environment={"LONG": "x" * 16000})
    with BatchExecutor(1, launcher=launcher) as executor:
        with pytest.raises(LaunchError, match=r"Amazon EC2 takes 16384.*'LONG'"):
            executor.submit(square, 1).result(timeout=60)
    assert not asked(aws)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vcpus": 1.5}, "whole vCPUs.*the nearest"),
        ({"vcpus": 100_000}, "has 1 to 1920 whole vCPUs .*not 100000 vCPU"),
        ({"vcpus": math.inf}, "has 1 to 1920 whole vCPUs .*not inf vCPU"),
        ({"spot": "yes"}, "spot must be"),
        ({"gpus": 17}, "gpus must be 16 or less"),
        ({"gpus": 1, "arch": "arm64"}, "goes with arch='x86_64'"),
        ({"instance_types": "c7i.larg"}, "do you mean 'c7i.large'"),
        ({"instance_types": ["c7g.large"]}, "of arch='arm64', not of 'x86_64'"),
        ({"instance_types": []}, "instance_types must be names"),
        ({"subnets": ["a", ""]}, "subnets must be ids"),
        ({"ami": "al2023"}, "ami must be like"),
        ({"disk_gib": 20}, "disk_gib"),
        ({"tags": {"Name": "x"}}, "cloudexec's own"),
        ({"packages": "here"}, "either packages or image"),
        ({"memory": ("4GiB", "2GiB")}, "must grow"),
    ],
)
def test_wrong_settings_are_refused(settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EC2(**{"image": "example.com/worker:1", "profile": "p", **settings})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"instance_types": ["c99.large"]}, r"no instances of type c99.large in us-east-1"),
        ({"instance_types": ["c7a.medium"]}, r"type c7a.medium have less than 2 vCPU"),
        ({"instance_types": ["c6i.large"], "gpus": 1}, r"type c6i.large have less than .* 1 GPU"),
        ({"instance_types": ["g5.xlarge"], "gpus": 2}, r"type g5.xlarge have less than .* 2 GPUs"),
    ],
)
def test_what_cannot_run_is_refused_at_the_start(ec2: Make, settings: Any, said: str) -> None:
    with pytest.raises((ConfigError, LaunchError), match=said):
        with BatchExecutor(1, launcher=ec2(**settings)) as executor:
            executor.submit(square, 1).result(timeout=60)


# Answers that are lost, late or wrong.


@pytest.mark.parametrize("answers_once", [False, True])
@pytest.mark.parametrize("losses", [2, 6])
def test_lost_answers_start_nothing_twice(
    still: Any, ec2: Make, answers_once: bool, losses: int
) -> None:
    """The call is made again with its token; beyond the tries of the SDK, tags tell what runs."""
    still.faults.ec2.answers_once = answers_once
    still.faults.lose_response("CreateFleet", losses)
    launcher = ec2(vcpus=1)
    with BatchExecutor(3, launcher=launcher, min_workers=3) as executor:
        executor.submit(square, 1)
        eventually(lambda: [each.api for each in executor.stats().launches if each.api])
        executor.shutdown(wait=True, cancel_futures=True)
    assert len(still.instances()) == 3
    assert not alive(still)


def test_lost_answers_before_the_shutdown_leave_nothing(still: Any, ec2: Make) -> None:
    still.faults.lose_response("CreateFleet", 1000)
    executor = BatchExecutor(2, launcher=ec2(vcpus=1), min_workers=2)
    executor.submit(square, 1)
    eventually(lambda: len(still.instances()) == 2)
    executor.shutdown(wait=True, cancel_futures=True)
    eventually(lambda: not alive(still))


def test_throttled_calls_and_late_lists_cost_nothing(still: Any, ec2: Make) -> None:
    """What DescribeInstances tells is consistent in the end only, and may go back."""

    async def work(platform: Platform) -> None:
        still.faults.throttle("CreateFleet", 3)
        still.faults.list_lag(1000.0)
        taken = await submit(platform, "cloudexec-a-1", 2)
        assert len(set(taken.worker_ids)) == 2
        status = await look(platform, "cloudexec-a-1", 2)
        assert {each.phase for each in status.workers.values()} == {Phase.ACCEPTED}
        still.faults.list_lag(0.0)
        status = await look(platform, "cloudexec-a-1", 2)
        assert {each.phase for each in status.workers.values()} <= {Phase.STARTING, Phase.RUNNING}
        still.faults.ec2.instances_go_missing(2)
        status = await look(platform, "cloudexec-a-1", 2)
        assert {each.phase for each in status.workers.values()} <= {Phase.STARTING, Phase.RUNNING}

    with_platform(ec2(vcpus=1), work)
    assert len(still.instances()) == 2


def test_instances_that_aws_forgets_end_their_workers(
    still: Any, ec2: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "MISSING", 0.0)

    async def work(platform: Platform) -> None:
        await submit(platform, "cloudexec-a-1")
        await look(platform, "cloudexec-a-1", 1)
        still.faults.ec2.instances_go_missing()
        status = await look(platform, "cloudexec-a-1", 1)
        assert status.workers[0].phase is Phase.ENDED
        assert "does not know its instance any more" in str(status.workers[0].ends[0].reason)

    with_platform(ec2(), work)
    # Should it run after all, nothing else would end it.
    eventually(lambda: not alive(still))


def test_a_worker_that_dials_before_the_answer_comes_again(aws: Any, ec2: Make) -> None:
    """Nobody knows yet which of the workers it is."""
    aws.faults.slow_response("CreateFleet", 2.5, 1)
    with BatchExecutor(2, launcher=ec2(vcpus=1), min_workers=2) as executor:
        squares(executor)
    assert len(aws.instances()) == 2


# Capacity.


def test_some_run_while_the_others_wait_and_say_so(
    aws: Any, ec2: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A fleet starts as many as there is room for, and it is asked again for the others."""
    aws.faults.ec2.room = 1
    caplog.set_level(logging.WARNING, logger="cloudexec")
    launcher = ec2(vcpus=1)
    with BatchExecutor(2, launcher=launcher, min_workers=2) as executor:
        squares(executor)
        eventually(lambda: NO_CAPACITY in launcher.explain())
        assert "another size, more instance types or subnets, or waiting" in launcher.explain()
        assert len(aws.instances()) == 1
        aws.faults.ec2.room = None
        eventually(lambda: executor.stats().workers.slots == 2)
    tokens = [each["ClientToken"] for each in asked(aws)]
    assert len(tokens) == len(set(tokens)), "a call that was answered is another one"
    eventually(lambda: not alive(aws))


def test_instances_that_end_for_want_of_capacity_are_asked_for_again(still: Any, ec2: Make) -> None:
    """They are named in an answer, and end while they are pending."""
    still.faults.ec2.ends_without_capacity = True
    still.faults.ec2.full_types = frozenset(["c6i.large", "c7i.large", "m7i.large"])

    async def work(platform: Platform) -> None:
        await submit(platform, "cloudexec-a-1")
        status = await until(platform, lambda status: Phase.WAITING in status.counts)
        assert NO_CAPACITY in status.reason
        assert platform.lacks_capacity(status.reason)
        still.faults.clear()
        still.faults.ec2.scripts_hang = True
        ended = {each.instance_id for each in still.instances()}
        status = await look(platform, "cloudexec-a-1", 1)
        assert list(status.worker_ids) == [""], "what has ended is not taken for another one"
        status = await until(platform, lambda status: Phase.RUNNING in status.counts)
        assert status.worker_ids[0] not in ended

    with_platform(ec2(), work)
    assert [each.state for each in still.instances()].count("running") == 1


def test_few_calls_are_made_while_there_is_no_capacity_and_nothing_is_left(
    aws: Any, ec2: Make
) -> None:
    aws.faults.no_capacity()
    launcher = ec2(vcpus=1)
    with BatchExecutor(250, launcher=launcher, min_workers=250) as executor:
        executor.submit(square, 1)
        eventually(lambda: NO_CAPACITY in launcher.explain())
        assert len(asked(aws)) < 8
        executor.shutdown(wait=False, cancel_futures=True)
    aws.faults.capacity_returns()
    assert aws.instances() == []


def test_capacity_that_never_comes_is_an_error_with_the_reason(aws: Any, ec2: Make) -> None:
    aws.faults.no_capacity()
    with BatchExecutor(1, launcher=ec2(), launch_timeout=4.0) as executor:
        with pytest.raises(LaunchError, match=NO_CAPACITY):
            executor.submit(square, 1).result(timeout=60)


@pytest.mark.parametrize("lack", ["capacity", "quota", "api"])
def test_a_fallback_moves_on(aws: Any, ec2: Make, lack: str) -> None:
    """From Spot to on demand, as two launchers: within seconds, and without a lost task."""
    if lack == "capacity":
        aws.faults.no_capacity("SPOT")
    elif lack == "quota":
        aws.faults.vcpu_quota(0.0, spot=True, compute="ec2")
    else:
        aws.faults.ec2.fleet_fails("UnauthorizedOperation", "You are not authorized", 1)
    began = time.monotonic()
    with BatchExecutor(1, launcher=Fallback([ec2(spot=True), ec2()])) as executor:
        squares(executor)
    assert time.monotonic() - began < 40
    assert {each.spot for each in aws.instances()} == {False}
    eventually(lambda: not alive(aws))


def test_spot_is_left_where_there_is_none(aws: Any, ec2: Make) -> None:
    aws.faults.no_capacity("SPOT")
    with BatchExecutor(1, launcher=ec2(spot="prefer")) as executor:
        squares(executor)
    assert [each.spot for each in aws.instances()] == [False]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("UnfulfillableCapacity", "no capacity of this kind"),
        ("SpotMaxPriceTooLow", "no capacity of this kind"),
        ("VcpuLimitExceeded", "vCPU quota is used up"),
        ("MaxSpotInstanceCountExceeded", "vCPU quota is used up"),
        ("RequestLimitExceeded", "could not start the instance now"),
        ("InternalError", "could not start the instance now"),
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", "create-service-linked-role"),
        ("InvalidParameterValue", "does not start the instance"),
    ],
)
def test_errors_of_amazon_ec2_are_explained(code: str, said: str) -> None:
    """Those that may pass are waited for; a fleet names one for each type and subnet."""
    reason = worst_of((("InvalidFleetConfig", "x"), (code, "words"))) if "Cap" in code else code
    cause = cause_of_refused_fleet(reason, spot=True)
    assert code in str(cause)
    assert said in str(cause)
    assert cause.fatal is not may_pass(reason)


def test_an_error_that_may_pass_is_tried_again(still: Any, ec2: Make) -> None:
    still.faults.ec2.fleet_fails("MaxSpotInstanceCountExceeded", "words of AWS", 1)

    async def work(platform: Platform) -> None:
        taken = await submit(platform, "cloudexec-a-1", spot=True)
        assert list(taken.worker_ids) == [""]
        assert "words of AWS" in (await look(platform, "cloudexec-a-1", 1)).reason
        status = await until(platform, lambda status: bool(status.worker_ids[0]))
        assert status.reason == ""

    with_platform(ec2(), work)
    assert len(still.instances()) == 1


def test_an_error_that_stays_is_told_at_once(aws: Any, ec2: Make) -> None:
    aws.faults.ec2.fleet_fails("InvalidParameterValue", "no such thing")
    with BatchExecutor(1, launcher=ec2()) as executor:
        with pytest.raises(LaunchError, match=r"InvalidParameterValue: no such.*up --with ec2"):
            executor.submit(square, 1).result(timeout=60)


def test_a_refusal_is_an_error_with_the_remedy(aws: Any, ec2: Make) -> None:
    aws.faults.deny("CreateFleet")
    with BatchExecutor(1, launcher=ec2()) as executor:
        with pytest.raises(LaunchError, match="cloudexec policy"):
            executor.submit(square, 1).result(timeout=60)


# Ends.


def test_a_notice_drains_the_worker_and_another_one_comes(
    aws: Any, ec2: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script sees it in the metadata, and tells the container."""
    monkeypatch.setattr(instance_script, "NOTICE_SECONDS", 0.2)
    with BatchExecutor(1, launcher=ec2(vcpus=1, spot=True), retries=0) as executor:
        future = executor.submit(time.sleep, 1.5)
        eventually(lambda: executor.stats().tasks.running == 1)
        (first,) = aws.instances()
        aws.faults.ec2.reclaim(first.instance_id)
        future.result(timeout=60)
        assert executor.submit(square, 3).result(timeout=60) == 9
    first, *others = aws.instances()
    assert first.exit_code == 143
    assert "reclaimed=true" in first.console
    assert len(others) == 1


def test_a_machine_that_fails_loses_its_tasks_to_another_one(aws: Any, ec2: Make) -> None:
    with BatchExecutor(1, launcher=ec2()) as executor:
        future = executor.submit(time.sleep, 0.5)
        eventually(lambda: executor.stats().tasks.running == 1)
        aws.faults.ec2.vanish(aws.instances()[0].instance_id)
        future.result(timeout=60)
    assert len(aws.instances()) == 2


def test_a_worker_that_is_killed_says_how_it_ended(aws: Any, ec2: Make) -> None:
    """Exit code and log come from the script of the instance."""
    with BatchExecutor(1, launcher=ec2(), retries=0) as executor:
        future = executor.submit(time.sleep, 60)
        eventually(lambda: executor.stats().tasks.running == 1)
        os.killpg(aws.instances()[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match=r"137|killed|SIGKILL"):
            future.result(timeout=60)


def test_an_image_that_cannot_be_pulled_fails_the_tasks_with_the_remedy(
    aws: Any, ec2: Make
) -> None:
    aws.faults.image_pull_fails()
    with BatchExecutor(1, launcher=ec2()) as executor:
        with pytest.raises(LaunchError, match=r"CannotPullContainerError.*cloudexec image push"):
            executor.submit(square, 1).result(timeout=60)
    eventually(lambda: not alive(aws))


def test_a_key_that_cannot_be_read_is_said(aws: Any, ec2: Make) -> None:
    with BatchExecutor(1, launcher=ec2()) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
        aws.faults.deny("GetSecretValue")
        aws.faults.ec2.vanish(aws.instances()[0].instance_id)
        with pytest.raises(LaunchError, match="the worker's key could not be read"):
            executor.submit(square, 1).result(timeout=60)


def test_an_instance_that_never_dials_is_ended(aws: Any, ec2: Make) -> None:
    aws.faults.ec2.scripts_hang = True
    with BatchExecutor(1, launcher=ec2(), launch_timeout=3.0) as executor:
        with pytest.raises(LaunchError):
            executor.submit(square, 1).result(timeout=60)
    eventually(lambda: not alive(aws))
    (request, *_) = [r.parameters for r in aws.requests if r.operation == "TerminateInstances"]
    assert request["SkipOsShutdown"] is True


def test_the_budget_counts_whole_instances_with_disk_and_address(aws: Any, ec2: Make) -> None:
    launcher = ec2()
    minute = launcher.estimate(1, 60).accrued_usd
    hourly = 0.085 + 30 * 0.08 / 730 + 0.005
    assert launcher.estimate(1, 3600).accrued_usd == pytest.approx(hourly)
    with BatchExecutor(1, launcher=launcher, max_cost_usd=0.5 * minute) as executor:
        with pytest.raises(BudgetExceededError):
            executor.submit(square, 1).result(timeout=60)
    assert aws.instances() == []


def test_the_type_that_was_given_is_what_is_paid_for(still: Any, ec2: Make) -> None:
    """Spot by the price at the moment, on demand by the list; and it is handed on."""
    still.faults.ec2.full_types = frozenset(["c6i.large"])

    async def work(platform: Platform) -> None:
        for spot, per_hour in ((False, 0.08925), (True, 0.4 * 0.08925)):
            name = f"cloudexec-a-{int(spot)}"
            await submit(platform, name, spot=spot)
            price = (await look(platform, name, 1)).price
            assert price is not None
            assert price.per_hour == pytest.approx(per_hour + 30 * 0.08 / 730, rel=1e-3)
            assert "c7i.large" in price.note

    with_platform(ec2(assign_public_ip=False), work)


# Clients that are killed.


def script_of(*lines: str, **options: Any) -> str:
    """Return a program with two workers, which sleep until it ends."""
    return textwrap.dedent(
        f"""
        import time
        from cloudexec import BatchExecutor, EC2
        if __name__ == "__main__":
            launcher = EC2(image="x", vcpus=1, profile="instances")
            executor = BatchExecutor(2, launcher=launcher, min_workers=2, **{options!r})
            futures = [executor.submit(time.sleep, 300) for _ in range(2)]
            {"; ".join(lines) or "time.sleep(300)"}
        """
    )


ALL_RUN = "exec('while executor.stats().tasks.running < 2: time.sleep(0.05)')"
PHASES: dict[str, tuple[Callable[[Any], object], Callable[[Any, Path], object], Sequence[str]]] = {
    "before the answer": (
        lambda aws: (aws.faults.lose_response("CreateFleet", 1000), aws.faults.slow_start(4.0)),
        lambda aws, path: any(r.operation == "CreateFleet" and r.status == 0 for r in aws.requests),
        (),
    ),
    "pending": (
        lambda aws: aws.faults.slow_start(4.0),
        lambda aws, path: [each.state for each in aws.instances()] == ["pending"] * 2,
        (),
    ),
    "running": (
        lambda aws: None,
        lambda aws, path: path.with_suffix(".running").exists(),
        (ALL_RUN, "open(__file__[:-3] + '.running', 'w').close()", "time.sleep(300)"),
    ),
    # Workers that have ended before the client asks for it need no request.
    "ending": (
        lambda aws: aws.faults.deny("TerminateInstances"),
        lambda aws, path: (
            path.with_suffix(".ended").exists()
            or any(r.operation == "TerminateInstances" for r in aws.requests)
        ),
        (
            ALL_RUN,
            "executor.shutdown(wait=False, cancel_futures=True)",
            "executor.kill_workers()",
            "open(__file__[:-3] + '.ended', 'w').close()",
            "time.sleep(300)",
        ),
    ),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_is_killed_leaves_nothing_running(
    aws: Any, ec2: Make, tmp_path: Path, phase: str
) -> None:
    """Whatever Amazon EC2 was told last: workers that find no client end their instances."""
    prepare, reached, lines = PHASES[phase]
    prepare(aws)
    path = tmp_path / "client.py"
    # Nobody waits for those that start late, which therefore dial for a moment only.
    patience = 20.0 if lines else 3.0
    kill_when(
        path,
        script_of(*lines, launch_timeout=patience, orphan_timeout=6.0),
        lambda: reached(aws, path),
    )
    aws.faults.clear()
    eventually(lambda: aws.instances() and not alive(aws), timeout=80.0)
    assert len(aws.instances()) == 2


def test_a_later_process_finds_the_workers_of_an_earlier_one(still: Any, ec2: Make) -> None:
    """It knows which worker is which by their instances, and ends one alone, or all."""
    jobs = [f"cloudexec-0123456789abcdef-{number}" for number in (1, 3, 5)]
    ids: dict[str, list[str]] = {}

    async def before(platform: Platform) -> None:
        for name in jobs[:2]:
            taken = await submit(platform, name, 2)
            assert taken.job_id == name
            ids[name] = list(reversed(taken.worker_ids))

    async def after(platform: Platform) -> None:
        looks = [
            Inspection(job_id=name, workers=2, survey=True, worker_ids=ids.get(name, ()))
            for name in jobs
        ]
        assert (await platform.describe(looks)).keys() == set(jobs[:2])
        one = ids[jobs[0]]
        await platform.terminate([Target(job_id=jobs[0], workers=[1], worker_ids=one)], "enough")
        gone = [each.instance_id for each in still.instances() if each.state == "terminated"]
        assert gone == [one[1]]
        phases = [
            each.phase for each in (await platform.describe(looks[:1]))[jobs[0]].workers.values()
        ]
        assert phases[1] is Phase.ENDED
        assert phases[0] is not Phase.ENDED
        assert await platform.find(jobs[1], spot=False) is not None
        assert await platform.find(jobs[2], spot=False) is None
        await platform.terminate([Target(job_id=name) for name in jobs], "enough")

    with_platform(ec2(vcpus=1), before)
    with_platform(ec2(vcpus=1), after)
    assert not alive(still)


# Time limits and rates.


def test_a_worker_ends_at_its_time_limit(aws: Any, ec2: Make) -> None:
    with BatchExecutor(1, launcher=ec2(max_runtime=3.0), retries=0) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
        eventually(lambda: aws.instances()[0].exit_code == 143)
        assert executor.submit(square, 3).result(timeout=60) == 9


def test_a_thousand_workers_stay_within_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten requests for a hundred instances each. The emulated AWS has nothing to refuse."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "profiles"))
    with FakeAWS(grace=2.0, max_running=1000) as aws:
        write_profile(aws)
        aws.faults.slow_start(600.0)  # only the calls count
        launcher = EC2(image="x", vcpus=1, profile="instances")
        with BatchExecutor(1000, launcher=launcher, min_workers=1000) as executor:
            executor.submit(square, 1)
            eventually(lambda: len(aws.instances()) == 1000)
            executor.shutdown(wait=False, cancel_futures=True)
        for operation in ("CreateFleet", "TerminateInstances", "DescribeInstances"):
            errors = Counter(r.error for r in aws.requests if r.operation == operation)
            assert set(errors) == {None}, operation
        assert sum(map(_count, asked(aws))) == 1000
        assert len(asked(aws)) <= 12
        eventually(lambda: not alive(aws))


def _count(request: dict[str, Any]) -> int:
    return int(request["TargetCapacitySpecification"]["TotalTargetCapacity"])
