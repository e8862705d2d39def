"""``cloudexec run`` on EC2 instances of their own, on a fake AWS."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from run_helpers import account, asked, create, eventually, left_nothing, row

from cloudexec import ConfigError, Run
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.policy import policy
from cloudexec._aws.profile import Profile
from cloudexec._runs.bucket import RunBucket
from cloudexec._runs.plan import RunPlan, RunResult
from cloudexec._runs.run import make_request
from cloudexec._runs.runs import AsyncRuns
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(120)

Command = Callable[..., subprocess.CompletedProcess[str]]
ON = ("run", "--on", "ec2")


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account whose stack has roles for instances, and images that run no Python."""
    folder = tmp_path_factory.mktemp("images")
    images = {}
    # The kernel sends SIGALRM to what watches a program when its time is over.
    for way, line in (("time", "kill -ALRM $$"), ("memory", "exec sleep 600")):
        images[f"dies/of-{way}"] = str(folder / way)
        (folder / way).write_text(f"#!/bin/sh\n{line}\n")
        (folder / way).chmod(0o755)
    profiles = tmp_path_factory.mktemp("profiles")
    with (
        pytest.MonkeyPatch.context() as patch,
        account(profiles, patch, instances=True, functions=True, grace=10.0, images=images) as fake,
    ):
        yield fake


@pytest.fixture(autouse=True)
def _nothing_is_left(aws: FakeAWS) -> Iterator[None]:
    """The role of runs is enough for all that happens on the machine, and no instance stays."""
    aws.clear_requests()
    yield
    left_nothing(aws, within=20.0)


def console(aws: FakeAWS) -> None:
    """Terminate the newest instance, as somebody may do who knows nothing of runs."""
    boto3.client("ec2").terminate_instances(InstanceIds=[aws.instances()[-1].instance_id])


def asks(aws: FakeAWS) -> list[str]:
    """Return the operations of machines that AWS was asked for."""
    kinds = ("CreateFleet", "RunTask", "SubmitJob")
    return [each.operation for each in aws.requests if each.operation in kinds]


def test_a_machine_that_is_taken_back_starts_its_next_attempt_which_has_a_worker(
    aws: FakeAWS, run_here: Command, folder: Path, environment: dict[str, str]
) -> None:
    """Without a client, and with the credentials that the instance's metadata service has.

    The notice is there, too, before Amazon EC2 says anything to others.
    """
    (folder / "job.py").write_text(
        "import os, pathlib, time\n"
        "mark = pathlib.Path('out/mark.txt')\n"
        "print('attempt', os.environ['CLOUDEXEC_RUN_ATTEMPT'], mark.exists(), flush=True)\n"
        "if not mark.exists():\n"
        "    mark.write_text('half')\n"
        f"    pathlib.Path({str(folder / 'up')!r}).touch()\n"
        "    time.sleep(600)\n"
        "mark.write_text(mark.read_text() + ' and half')\n"
        "from cloudexec import BatchExecutor, Lambda\n"
        "for launcher in (None, Lambda()):\n"
        "    with BatchExecutor(2, launcher=launcher) as executor:\n"
        "        print(executor.submit(pow, 2, 5).result())\n"
        "raise SystemExit(5)\n"
    )
    environment["CLOUDEXEC_PROFILE"] = "default"
    words = ("--spot", "--cpus", "2", "--outputs", "out", "--name", "on-spot", "-d")
    done = run_here(*ON, "job.py", *words)
    assert done.returncode == 0, done.stderr
    # At 30 % of a c6i.large, with 30 GiB and an address.
    assert "2 vCPU with 4 GiB on Spot, about $0.034 an hour" in done.stderr
    first = aws.instances()[-1]
    eventually((folder / "up").exists)
    aws.faults.lose_response("CreateFleet", count=1)
    aws.faults.ec2.reclaim(first.instance_id)
    done = run_here("attach", "on-spot")
    assert done.returncode == 5, done.stderr
    printed = ["attempt 1 False", "attempt 2 True", "32", "32"]

    def program(output: str) -> list[str]:
        return [each for each in output.splitlines() if "cloudexec" not in each]

    assert program(done.stdout) == printed
    assert (folder / "out" / "mark.txt").read_text() == "half and half"
    # The same client token twice for the second machine, and then its worker.
    assert asks(aws) == ["CreateFleet"] * 4
    second, worker = aws.instances()[-2:]
    assert [each.tags["cloudexec:attempt"] for each in (first, second)] == ["1", "2"]
    assert worker.tags["cloudexec:run"] == "on-spot"
    assert len(aws.invocations()) == 1
    # Workers dial the machine. Their own tasks have no credentials.
    assert "--network host" in second.user_data
    assert "--network" not in worker.user_data
    found = row(run_here, "on-spot")
    assert (found["on"], found["state"], found["attempts"]) == ("ec2", "failed", 2)
    # Each at what Spot costs now, for a minute at least.
    hours = (60.0 + max(float(str(found["run_seconds"])) / 2, 60.0)) / 3600
    assert float(str(found["machine_usd"])) == pytest.approx(hours * 0.0423, rel=0.1)
    assert float(str(found["workers_usd"])) > 0
    assert found["reason"] == ""
    assert program(run_here("logs", "on-spot").stdout) == printed
    # An hour later, Amazon EC2 has forgotten all three. The bucket and the log have them.
    aws.faults.forget_ended()
    again = row(run_here, "on-spot")
    for key in ("state", "exit_code", "reason", "attempts", "workers_usd", "is_estimate"):
        assert again[key] == found[key], key
    assert again["machine_usd"] == pytest.approx(found["machine_usd"], rel=0.1)
    assert again["run_seconds"] == pytest.approx(found["run_seconds"], abs=5.0)
    last = run_here("logs", "on-spot", "-n", "2", "--json").stdout.splitlines()
    assert [json.loads(each)["attempt"] for each in last] == [2, 2]
    assert "with exit code 5" in json.loads(last[-1])["message"]
    assert program(run_here("logs", "on-spot").stdout) == printed
    done = run_here("attach", "on-spot", "--no-fetch")
    assert (done.returncode, program(done.stdout)) == (5, printed)
    logs, group = boto3.client("logs"), Profile.load("default").log_group
    stream = f"instance/worker/{second.instance_id}"
    logs.delete_log_stream(logGroupName=group, logStreamName=stream)
    done = run_here("logs", "on-spot")
    assert program(done.stdout) == printed[:1]
    assert f"the log {stream} is not in {group} (any more)" in done.stderr


def test_a_run_that_is_stopped_has_no_other_attempt_and_sends_its_files(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    words = ("--spot", "--name", "ended", "--env", "A=1", "--outputs", "out", "-d", "--")
    line = f"trap 'echo end > out/end; exit' TERM; touch {folder}/up; sleep 600 & wait"
    assert run_here(*ON, *words, line).returncode == 0
    eventually((folder / "up").exists)
    done = run_here("stop", "ended", "--yes")
    assert (done.returncode, done.stdout) == (0, "stopped the run ended\n"), done.stderr
    done = run_here("attach", "ended")
    assert done.returncode == 143, done.stderr
    assert "ended: stopped with exit code 143" in done.stderr
    assert "with `cloudexec stop`" in done.stderr
    assert (folder / "out" / "end").read_text() == "end\n"
    assert asks(aws) == ["CreateFleet"]


@pytest.mark.parametrize(
    ("way", "said"),
    [("stop", "with `cloudexec stop`"), ("console", "it was stopped by a request to Amazon EC2")],
)
def test_a_run_is_shown_and_stopped_before_its_program_has_begun(
    aws: FakeAWS, run_here: Command, folder: Path, way: str, said: str
) -> None:
    """Amazon EC2 takes no reason, so that of `cloudexec stop` is in the bucket."""
    aws.faults.ec2.scripts_hang = True
    name = f"boots-{way}"
    assert run_here(*ON, "--name", name, "-d", "--", "true").returncode == 0
    eventually(lambda: aws.instances()[-1].state == "running")
    if way == "stop":
        assert f"run-{name}" in run_here("ps").stdout
        assert "0 MiB" not in run_here("jobs").stdout  # of a type that the price list lacks
        assert f"among them 1 run of `cloudexec run`: {name}" in run_here("down").stderr
        assert run_here("stop", name, "--yes").returncode == 0
    else:
        console(aws)
    done = run_here("attach", name)
    assert done.returncode == 3
    assert f"{name}: stopped after" in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("way", "code", "said"),
    [
        ("time", 142, "its time limit was over: --max-hours or --max-cost allow more"),
        ("memory", 137, "its memory of 2 GiB was used up: give a larger --memory"),
        ("lost", 3, ": Server.InternalError: Internal error on launch"),
        ("image", 3, "CannotPullContainerError: "),
    ],
)
def test_how_a_machine_ended_that_could_not_say_so_is_known_after_amazon_ec2_has_forgotten_it(
    aws: FakeAWS, run_here: Command, folder: Path, way: str, code: int, said: str
) -> None:
    """Its script has said so in the log, unless it was lost, too."""
    name = f"ends-by-{way}"
    aws.faults.ec2.scripts_hang = way == "lost"
    if way == "image":
        aws.faults.image_pull_fails()
    words = ("--image", f"dies/of-{way}", "--name", name, "-d", "--", "true")
    assert run_here(*ON, *words).returncode == 0
    machine = aws.instances()[-1]
    # Its own timer stands behind the program's: a quarter of an hour for the image, and five
    # minutes for the log.
    assert "shutdown -P +1460 " in machine.user_data
    # Where the script has not set it, the tag says so, for clocks that differ by five minutes.
    expires = datetime.fromisoformat(machine.tags["cloudexec:expires"])
    seconds = (expires - datetime.now(UTC)).total_seconds()
    assert seconds == pytest.approx((1460 + 5) * 60, abs=60)
    if way == "lost":
        aws.faults.ec2.vanish(machine.instance_id)
    elif way == "memory":
        eventually(lambda: aws.instances()[-1].pid is not None)
        aws.faults.ec2.out_of_memory(machine.instance_id)
    done = run_here("attach", name)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    aws.faults.forget_ended()
    found = row(run_here, name)
    assert (found["state"], found["attempts"]) == ("failed", 1)
    assert found["exit_code"] == (None if code == 3 else code)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "17"), "the most there is are 1920 vCPUs, 32768 GiB and 16 GPUs"),
        (("--disk", "20"), "disk_gib must be 30 or more, not 20"),
        (("--gpu", "1", "--arch", "arm64"), "instances with GPUs are of x86_64"),
    ],
)
def test_what_amazon_ec2_does_not_have_is_refused(
    aws: FakeAWS, run_here: Command, folder: Path, words: tuple[str, ...], said: str
) -> None:
    done = run_here(*ON, *words, "--", "true")
    assert done.returncode == 2
    assert said in done.stderr
    assert asks(aws) == []


def test_what_a_machine_must_have_is_asked_for_once_though_an_answer_is_lost(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    """Amazon EC2 is asked again with the same client token, and does not name the instance.

    The policy of users is enough for that.
    """
    aws.faults.ec2.scripts_hang = True
    aws.faults.ec2.answers_once = True
    aws.faults.allow_only(policy(Profile.load("default")))
    before = len(aws.instances())
    aws.faults.lose_response("CreateFleet", count=1)
    words = ("--gpu", "1", "--disk", "900", "--name", "with-gpu", "-d")
    done = run_here(*ON, *words, "--", "true")
    assert "2 GiB and 1 GPU, 900 GiB of disk, about $0.630 an hour" in done.stderr
    assert asks(aws) == ["CreateFleet", "CreateFleet"]
    assert len(aws.instances()) == before + 1
    assert aws.instances()[-1].type == "g4dn.xlarge"
    assert "--gpus all" in aws.instances()[-1].user_data
    (made,) = (each for each in aws.requests if each.operation == "CreateLaunchTemplate")
    (disk,) = made.parameters["LaunchTemplateData"]["BlockDeviceMappings"]
    assert disk["Ebs"]["VolumeSize"] == 900
    found = row(run_here, "with-gpu")
    assert (found["gpus"], found["memory_mib"]) == (1, 2048)
    assert found["machine_usd"] == pytest.approx(0.63 / 60, rel=0.01)  # of a minute, the least
    console(aws)
    run_here(*ON, "--arch", "arm64", "-d", "--image", "x/y:1", "--", "true")
    assert aws.instances()[-1].type == "c7g.medium"
    console(aws)
    # Much memory comes with more processors.
    run_here(*ON, "--memory", "32GiB", "-d", "--image", "x/y:1", "--", "true")
    assert aws.instances()[-1].type == "r6i.xlarge"
    console(aws)


def test_a_stack_without_what_runs_need_says_how_to_get_it(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    profile = Profile.load("default")
    replace(profile, run_profile="", name="older").save()
    done = run_here(*ON, "--profile", "older", "--", "true")
    assert done.returncode == 2
    assert "the stack of the profile 'older' is older than runs on EC2" in done.stderr
    # What it has besides would be removed by a list that does not name it.
    assert "`cloudexec up --with lambda,ec2 --name older` brings it up to date" in done.stderr
    replace(profile, run_profile="", instance_profile="", function_role="", name="bare").save()
    done = run_here(*ON, "--profile", "bare", "--", "true")
    assert "has no role for EC2 instances, on which --on ec2 would run" in done.stderr
    assert "`cloudexec up --with ec2 --name bare` adds it" in done.stderr


def test_no_capacity_and_no_quota_are_said_with_what_to_do(
    aws: FakeAWS, run_here: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudexec._runs.job_place._START_SECONDS", 0.1)
    aws.faults.no_capacity("SPOT")
    done = run_here(*ON, "--spot", "--name", "no-room", "--", "true")
    assert done.returncode == 3
    assert "AWS has no capacity of this kind: InsufficientInstanceCapacity" in done.stderr
    assert "Try without --spot, another size, or later; --on batch waits" in done.stderr
    aws.faults.clear()
    aws.faults.vcpu_quota(1, compute="ec2")
    words = (*ON, "--cpus", "2", "--name")
    done = run_here(*words, "no-room", "--", "true")
    assert done.returncode == 3
    assert "VcpuLimitExceeded" in done.stderr
    assert all(each["name"] != "no-room" for each in json.loads(run_here("runs", "--json").stdout))
    # A run that was to go on stays. Were there a machine after all, it would not run the program.
    ended = RunPlan(name="ended-before", kind="command", target="", on="ec2", start_id="0a")
    create(ended, {"result.json": RunResult(exit_code=0, start_id="0a").to_json()})
    done = run_here(*words, ended.name, "--resume", "--", "true")
    assert "VcpuLimitExceeded" in done.stderr

    async def why() -> str:
        async with AwsClients() as clients:
            bucket = RunBucket(clients, Profile.load("default").bucket, ended.name)
            return await bucket.stop_reason((await bucket.plan()).start_id)

    assert asyncio.run(why()).startswith("it could not be started: ")


def test_a_start_that_is_interrupted_while_an_instance_is_asked_for_leaves_none(
    aws: FakeAWS, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleets = asked(aws, monkeypatch, "CreateFleet")
    aws.faults.slow_response("CreateFleet", 0.3)

    async def interrupt() -> None:
        async with AwsClients() as clients:
            runs = AsyncRuns(clients, Profile.load("default"))
            request = make_request(args=["sleep", "600"], name="interrupted", on="ec2")
            starting = asyncio.ensure_future(runs.start(request, print))
            assert await asyncio.to_thread(fleets.wait, 60)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting

    asyncio.run(interrupt())
    instance = aws.instances()[-1]
    assert instance.tags["cloudexec:run"] == "interrupted"
    assert instance.state in ("shutting-down", "terminated")
    with pytest.raises(ConfigError, match="there is no run 'interrupted'"):
        Run.find("interrupted")
