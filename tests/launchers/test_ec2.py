"""The EC2 launcher against emulated instances that run their user data, and real workers."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import boto3
import pytest
from launcher_helpers import eventually, write_profile
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
from cloudexec._launchers.ec2 import platform as ec2_platform
from cloudexec.launchers import ExecutorInfo, Inspection, JobRequest, Phase, Target
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


# What is asked for.


def test_a_map_runs_on_instances(aws: Any, ec2: Make) -> None:
    """One request starts all of them, each with two slots, and each ends itself."""
    with BatchExecutor(6, launcher=ec2(tags={"a": "b"}), min_workers=6) as executor:
        squares(executor, 300)
        eventually(lambda: executor.stats().workers.slots == 6)
        launches = executor.stats().launches
    (request,) = asked(aws)
    assert request["Type"] == "instant"
    assert request["TargetCapacitySpecification"] == {
        "TotalTargetCapacity": 3,
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
    for each in instances:
        assert each.tags["a"] == "b"
        assert each.tags["cloudexec:job"] == each.tags["Name"]
        assert {"cloudexec:executor", "cloudexec:user", "cloudexec:expires"} <= each.tags.keys()


def test_the_key_is_nowhere_but_in_the_worker(aws: Any, ec2: Make) -> None:
    """Neither in the user data nor in the log of the instance: it reads it with its role."""
    with BatchExecutor(1, launcher=ec2()) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
    (instance,) = aws.instances()
    eventually(lambda: not alive(aws))
    for text in (instance.user_data, instance.console, str(instance.environment)):
        assert "0f" * 16 not in text
        assert "CLOUDEXEC_KEY=" not in text.replace("CLOUDEXEC_KEY=$key", "")
    (data,) = [r.parameters for r in aws.requests if r.operation == "CreateLaunchTemplate"]
    assert data["LaunchTemplateData"]["MetadataOptions"] == {
        "HttpTokens": "required",
        "HttpPutResponseHopLimit": 1,
    }
    assert data["LaunchTemplateData"]["InstanceInitiatedShutdownBehavior"] == "terminate"


def test_the_dead_man_timer_is_the_first_thing_that_an_instance_does(aws: Any, ec2: Make) -> None:
    with BatchExecutor(1, launcher=ec2(max_runtime=3600)) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
    script = aws.instances()[0].user_data
    assert script.splitlines()[1].startswith("shutdown -P +80 ")
    assert len(script) < 8 * 1024


def test_a_template_is_made_once_and_found_again(aws: Any, ec2: Make) -> None:
    for image in ("example.com/worker:1", "example.com/worker:2"):
        with BatchExecutor(1, launcher=ec2(image=image)) as executor:
            assert executor.submit(square, 2).result(timeout=60) == 4
    with BatchExecutor(1, launcher=ec2(disk_gib=50)) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
    made = [r for r in aws.requests if r.operation == "CreateLaunchTemplate" and r.status == 200]
    assert len(made) == 2
    names = [
        each["LaunchTemplateConfigs"][0]["LaunchTemplateSpecification"]["LaunchTemplateName"]
        for each in asked(aws)
    ]
    assert names[0] == names[1] != names[2]


def test_a_template_that_was_removed_meanwhile_is_made_again(aws: Any, ec2: Make) -> None:
    client = boto3.client("ec2", region_name=aws.region)
    with BatchExecutor(2, launcher=ec2(vcpus=1)) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
        (template,) = client.describe_launch_templates()["LaunchTemplates"]
        client.delete_launch_template(LaunchTemplateName=template["LaunchTemplateName"])
        futures = [executor.submit(time.sleep, 0.3) for _ in range(4)]
        eventually(lambda: executor.stats().workers.slots == 2)
        wait(futures)


def test_named_types_are_used(aws: Any, ec2: Make) -> None:
    launcher = ec2(instance_types=["m7i.large", "c7i.xlarge"])
    with BatchExecutor(1, launcher=launcher) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
    assert [each.type for each in aws.instances()] == ["m7i.large"]


def test_arm_instances_run_the_image_of_their_system(aws: Any, ec2: Make) -> None:
    with BatchExecutor(1, launcher=ec2(vcpus=1, arch="arm64")) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
    assert [each.type for each in aws.instances()] == ["c7g.medium"]


def test_gpus_come_with_an_instance_that_has_them(aws: Any, ec2: Make) -> None:
    with BatchExecutor(1, launcher=ec2(vcpus=4, gpus=1)) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
    (instance,) = aws.instances()
    assert instance.type == "g4dn.xlarge"
    assert "--gpus all" in instance.user_data


def test_variables_that_are_too_long_are_refused_before_they_are_sent(aws: Any, ec2: Make) -> None:
    launcher = ec2(environment={"LONG": "x" * 16000})
    with BatchExecutor(1, launcher=launcher) as executor:
        with pytest.raises(LaunchError, match=r"Amazon EC2 takes 16384.*'LONG'"):
            executor.submit(square, 1).result(timeout=60)
    assert not asked(aws)


def test_variables_reach_the_worker_as_they_are(aws: Any, ec2: Make) -> None:
    odd = {"ODD": 'it\'s "odd" $HOME `id` \\ \n{x}', "PATH_LIKE": "/a b"}
    with BatchExecutor(1, launcher=ec2(environment=odd)) as executor:
        for name, value in odd.items():
            assert executor.submit(os.getenv, name).result(timeout=60) == value


def test_an_image_of_the_account_is_pulled_with_the_role(aws: Any, ec2: Make) -> None:
    image = f"123456789012.dkr.ecr.{aws.region}.amazonaws.com/worker:1"
    boto3.client("ecr", region_name=aws.region).create_repository(repositoryName="worker")
    with BatchExecutor(1, launcher=ec2(image=f"{image.partition(':')[0]}@sha256:{'0' * 64}")) as ex:
        assert ex.submit(square, 2).result(timeout=60) == 4
    assert "GetAuthorizationToken" in {r.operation for r in aws.requests}
    assert "docker login" in aws.instances()[0].user_data


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vcpus": 1.5}, "whole vCPUs.*the nearest"),
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
    aws: Any, ec2: Make, answers_once: bool, losses: int
) -> None:
    """The call is made again with its token; beyond the tries of the SDK, tags tell what runs."""
    aws.faults.ec2.answers_once = answers_once
    aws.faults.lose_response("CreateFleet", losses)
    with BatchExecutor(3, launcher=ec2(vcpus=1), min_workers=3) as executor:
        squares(executor)
        eventually(lambda: executor.stats().workers.slots == 3)
    assert len(aws.instances()) == 3
    eventually(lambda: not alive(aws))


def test_lost_answers_before_the_shutdown_leave_nothing(aws: Any, ec2: Make) -> None:
    aws.faults.slow_start(30.0)
    aws.faults.lose_response("CreateFleet", 1000)
    executor = BatchExecutor(2, launcher=ec2(vcpus=1), min_workers=2)
    executor.submit(square, 1)
    eventually(lambda: len(aws.instances()) == 2)
    executor.shutdown(wait=True, cancel_futures=True)
    eventually(lambda: not alive(aws))


def test_a_worker_that_dials_before_the_answer_comes_again(aws: Any, ec2: Make) -> None:
    """Nobody knows yet which of the workers it is."""
    aws.faults.slow_response("CreateFleet", 2.5, 1)
    with BatchExecutor(2, launcher=ec2(vcpus=1), min_workers=2) as executor:
        squares(executor)
    assert len(aws.instances()) == 2


def test_throttled_calls_are_made_again(aws: Any, ec2: Make) -> None:
    aws.faults.throttle("CreateFleet", 8)
    with BatchExecutor(2, launcher=ec2(vcpus=1), min_workers=2) as executor:
        squares(executor)
    assert len(aws.instances()) == 2


def test_instances_that_are_not_seen_yet_are_waited_for(aws: Any, ec2: Make) -> None:
    """What DescribeInstances tells is consistent in the end only."""
    aws.faults.list_lag(1000.0)
    aws.faults.slow_start(2.0)
    with BatchExecutor(2, launcher=ec2(vcpus=1), min_workers=2) as executor:
        squares(executor)
    assert len(aws.instances()) == 2


def test_instances_that_aws_forgets_end_their_workers(
    aws: Any, ec2: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ec2_platform, "_MISSING", 1.0)
    with BatchExecutor(1, launcher=ec2()) as executor:
        future = executor.submit(time.sleep, 1.0)
        eventually(lambda: executor.stats().tasks.running == 1)
        (first,) = aws.instances()
        os.killpg(first.pid, signal.SIGKILL)
        aws.faults.ec2.instances_go_missing(3)
        future.result(timeout=60)


# Capacity.


@pytest.mark.parametrize("ends", [False, True])
def test_workers_wait_for_capacity_and_say_so(
    aws: Any, ec2: Make, ends: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether the fleet has errors, or instances end while they are pending."""
    aws.faults.ec2.ends_without_capacity = ends
    aws.faults.no_capacity()
    caplog.set_level(logging.WARNING, logger="cloudexec")
    launcher = ec2(vcpus=1)
    with BatchExecutor(2, launcher=launcher) as executor:
        futures = [executor.submit(square, n) for n in range(10)]
        eventually(lambda: NO_CAPACITY in launcher.explain())
        assert "another size, more instance types or subnets, or waiting" in launcher.explain()
        aws.faults.capacity_returns()
        assert [future.result(timeout=60) for future in futures] == [n * n for n in range(10)]
    tokens = [each["ClientToken"] for each in asked(aws)]
    assert len(tokens) == len(set(tokens)), "a call that was answered is another one"
    eventually(lambda: not alive(aws))


def test_some_run_while_the_others_wait(aws: Any, ec2: Make) -> None:
    """A fleet starts as many as there is room for."""
    aws.faults.ec2.room = 2
    with BatchExecutor(4, launcher=ec2(vcpus=1), min_workers=4) as executor:
        squares(executor)
        eventually(lambda: executor.stats().workers.slots == 2)
        assert len(aws.instances()) == 2
        aws.faults.ec2.room = None
        eventually(lambda: executor.stats().workers.slots == 4)
    assert len(aws.instances()) == 4


def test_another_type_is_taken_where_one_is_full(aws: Any, ec2: Make) -> None:
    aws.faults.ec2.full_types = frozenset(["c6i.large"])
    with BatchExecutor(1, launcher=ec2()) as executor:
        squares(executor)
    assert [each.type for each in aws.instances()] == ["c7i.large"]
    assert len(asked(aws)) == 1


def test_few_calls_are_made_while_there_is_no_capacity(aws: Any, ec2: Make) -> None:
    aws.faults.no_capacity()
    launcher = ec2(vcpus=1)
    with BatchExecutor(250, launcher=launcher, min_workers=250) as executor:
        executor.submit(square, 1)
        eventually(lambda: NO_CAPACITY in launcher.explain())
        assert len(asked(aws)) < 8
        executor.shutdown(wait=False, cancel_futures=True)


def test_capacity_that_never_comes_is_an_error_with_the_reason(aws: Any, ec2: Make) -> None:
    aws.faults.no_capacity()
    with BatchExecutor(1, launcher=ec2(), launch_timeout=4.0) as executor:
        with pytest.raises(LaunchError, match=NO_CAPACITY):
            executor.submit(square, 1).result(timeout=60)


def test_nothing_runs_after_shutdown_even_what_never_started(aws: Any, ec2: Make) -> None:
    aws.faults.no_capacity()
    with BatchExecutor(3, launcher=ec2(vcpus=1), min_workers=3) as executor:
        executor.submit(square, 1)
        eventually(lambda: asked(aws))
        executor.shutdown(wait=False, cancel_futures=True)
    aws.faults.capacity_returns()
    assert aws.instances() == []


def test_spot_is_left_where_there_is_none(aws: Any, ec2: Make) -> None:
    aws.faults.no_capacity("SPOT")
    began = time.monotonic()
    with BatchExecutor(2, launcher=ec2(spot="prefer")) as executor:
        squares(executor)
    assert time.monotonic() - began < 30
    assert {each.spot for each in aws.instances()} == {False}
    eventually(lambda: not alive(aws))


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
    with BatchExecutor(2, launcher=Fallback([ec2(spot=True), ec2()])) as executor:
        squares(executor)
    assert time.monotonic() - began < 40
    assert {each.spot for each in aws.instances()} == {False}
    eventually(lambda: not alive(aws))


def test_a_quota_is_waited_for_and_named(aws: Any, ec2: Make) -> None:
    aws.faults.vcpu_quota(1.0, compute="ec2")
    launcher = ec2(vcpus=1)
    with BatchExecutor(2, launcher=launcher, min_workers=2) as executor:
        assert executor.submit(square, 3).result(timeout=60) == 9
        eventually(lambda: "vCPU quota is used up" in launcher.explain())
        aws.faults.vcpu_quota(2.0, compute="ec2")
        eventually(lambda: executor.stats().workers.slots == 2)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("UnfulfillableCapacity", "no capacity of this kind"),
        ("SpotMaxPriceTooLow", "no capacity of this kind"),
        ("MaxSpotInstanceCountExceeded", "quota is used up"),
        ("RequestLimitExceeded", "could not start the instance now"),
        ("InternalError", "could not start the instance now"),
    ],
)
def test_errors_that_may_pass_are_tried_again(aws: Any, ec2: Make, code: str, said: str) -> None:
    aws.faults.ec2.fleet_fails(code, "words of AWS")
    launcher = ec2()
    with BatchExecutor(1, launcher=launcher) as executor:
        future = executor.submit(square, 3)
        eventually(lambda: said in launcher.explain())
        aws.faults.clear()
        assert future.result(timeout=60) == 9


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


def test_an_instance_that_is_reclaimed_without_time_is_replaced(aws: Any, ec2: Make) -> None:
    with BatchExecutor(1, launcher=ec2(spot=True)) as executor:
        future = executor.submit(time.sleep, 0.5)
        eventually(lambda: executor.stats().tasks.running == 1)
        aws.faults.ec2.reclaim(aws.instances()[0].instance_id, notice=0.0)
        future.result(timeout=60)
    assert aws.instances()[0].state_reason == "Server.SpotInstanceTermination"


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
    with BatchExecutor(8, launcher=launcher, max_cost_usd=2.5 * minute) as executor:
        squares(executor)
        eventually(lambda: executor.stats().workers.slots == 4)
    assert len(aws.instances()) == 2
    with BatchExecutor(1, launcher=launcher, max_cost_usd=0.5 * minute) as executor:
        with pytest.raises(BudgetExceededError):
            executor.submit(square, 1).result(timeout=60)


def test_the_type_that_was_given_is_what_is_paid_for(aws: Any, ec2: Make) -> None:
    """Spot by the price at the moment, on demand by the list."""
    aws.faults.ec2.full_types = frozenset(["c6i.large"])
    for spot, per_hour in ((False, 0.08925), (True, 0.4 * 0.08925)):
        with BatchExecutor(1, launcher=ec2(spot=spot, assign_public_ip=False)) as executor:
            squares(executor)
            found = eventually(
                lambda ex=executor: (cost := ex.cost()) and "c7i" in cost.note and cost
            )
            assert found.per_hour_usd == pytest.approx(per_hour + 30 * 0.08 / 730, rel=1e-3)


# Clients that are killed.


def script_of(*lines: str, **options: Any) -> str:
    """Return a program with three workers, which sleep until it ends."""
    return textwrap.dedent(
        f"""
        import time
        from cloudexec import BatchExecutor, EC2
        if __name__ == "__main__":
            launcher = EC2(image="x", vcpus=1, profile="instances")
            executor = BatchExecutor(3, launcher=launcher, min_workers=3, **{options!r})
            futures = [executor.submit(time.sleep, 300) for _ in range(3)]
            {"; ".join(lines) or "time.sleep(300)"}
        """
    )


ALL_RUN = "exec('while executor.stats().tasks.running < 3: time.sleep(0.05)')"
PHASES: dict[str, tuple[Callable[[Any], object], Callable[[Any, Path], object], Sequence[str]]] = {
    "before the answer": (
        lambda aws: aws.faults.lose_response("CreateFleet", 1000),
        lambda aws, path: any(r.operation == "CreateFleet" and r.status == 0 for r in aws.requests),
        (),
    ),
    "pending": (
        lambda aws: aws.faults.slow_start(4.0),
        lambda aws, path: [each.state for each in aws.instances()] == ["pending"] * 3,
        (),
    ),
    "running": (
        lambda aws: None,
        lambda aws, path: path.with_suffix(".running").exists(),
        (ALL_RUN, "open(__file__[:-3] + '.running', 'w').close()", "time.sleep(300)"),
    ),
    "ending": (
        lambda aws: aws.faults.deny("TerminateInstances"),
        lambda aws, path: any(r.operation == "TerminateInstances" for r in aws.requests),
        (
            ALL_RUN,
            "executor.shutdown(wait=False, cancel_futures=True)",
            "executor.kill_workers()",
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
    path.write_text(script_of(*lines, launch_timeout=20.0, orphan_timeout=6.0))
    client = subprocess.Popen([sys.executable, str(path)], stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: reached(aws, path) or client.poll() is not None)
    finally:
        client.kill()
        client.wait()
    aws.faults.clear()
    eventually(lambda: aws.instances() and not alive(aws), timeout=80.0)
    assert len(aws.instances()) == 3


def test_a_later_process_finds_the_workers_of_an_earlier_one(aws: Any, ec2: Make) -> None:
    """It knows which worker is which by their instances, and ends one alone, or all."""
    launcher = ec2(vcpus=1)
    executor = ExecutorInfo(id="0123456789abcdef", launch_timeout=60.0)
    # They wait for a client to dial.
    variables = {"CLOUDEXEC_TARGET": "127.0.0.1:1", "CLOUDEXEC_EXECUTOR_ID": executor.id}
    variables |= {"CLOUDEXEC_SLOTS": "1", "CLOUDEXEC_LAUNCH": "1"}
    variables |= {"CLOUDEXEC_CERTIFICATE_SHA256": "00" * 32}
    jobs = [f"cloudexec-{executor.id}-{number}" for number in (1, 3, 5)]

    async def before() -> dict[str, Sequence[str]]:
        async with launcher.connect(executor) as site:
            ids = {}
            for name in jobs[:2]:
                await site.platform.prepare()
                request = JobRequest(name=name, workers=2, environment=variables)
                taken = await site.platform.submit(request)
                assert taken.job_id == name
                ids[name] = list(reversed(taken.worker_ids))
            return ids

    async def after(ids: dict[str, Sequence[str]]) -> None:
        async with ec2(vcpus=1).connect(executor) as site:
            platform = site.platform
            looks = [
                Inspection(job_id=name, workers=2, survey=True, worker_ids=ids.get(name, ()))
                for name in jobs
            ]
            found = await platform.describe(looks)
            assert found.keys() == set(jobs[:2])
            one = ids[jobs[0]]
            await platform.terminate(
                [Target(job_id=jobs[0], workers=[1], worker_ids=one)], "enough"
            )
            gone = [each.instance_id for each in aws.instances() if each.state == "terminated"]
            assert gone == [one[1]]
            again = await platform.describe(looks[:1])
            phases = [again[jobs[0]].workers[index].phase for index in (0, 1)]
            assert phases[1] is Phase.ENDED
            assert phases[0] is not Phase.ENDED
            assert await platform.find(jobs[1], spot=False) is not None
            assert await platform.find(jobs[2], spot=False) is None
            await platform.terminate([Target(job_id=name) for name in jobs], "enough")

    asyncio.run(after(asyncio.run(before())))
    eventually(lambda: not alive(aws))


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


def test_the_script_is_what_was_sent(aws: Any, ec2: Make) -> None:
    with BatchExecutor(1, launcher=ec2()) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
    specification = asked(aws)[0]["LaunchTemplateConfigs"][0]["LaunchTemplateSpecification"]
    sent = base64.b64decode(specification["LaunchTemplateSpecificationUserData"]).decode()
    assert sent == aws.instances()[0].user_data
    assert subprocess.run(["bash", "-n"], input=sent, text=True, check=True).returncode == 0
