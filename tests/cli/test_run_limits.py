"""Ceilings of time and money, which hold without the client."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import boto3
import pytest
from run_helpers import IMAGE, PYTHON, account, machine_here

import cloudexec
from cloudexec import ConfigError, Run
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.policy import policy
from cloudexec._aws.profile import Profile
from cloudexec._runs.bucket import RunBucket
from cloudexec._runs.budget import Budget
from cloudexec._runs.plan import RunPlan
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(180)

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account that was set up, in which time limits of AWS pass 30 times as fast."""
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch, grace=1.0, speed=30.0) as fake,
    ):
        yield fake


def test_aws_ends_a_machine_whose_time_is_over(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    """Whatever became of the client, and of the program that watches it on the machine."""
    (folder / "job.py").write_text("import time; print('up'); time.sleep(600)\n")
    done = run_here("run", "job.py", "--max-hours", "0.025")
    assert done.returncode == 143
    assert "it ends after 1 min at the latest, which would cost $0.00" in done.stderr
    assert "its time limit was over: --max-hours or --max-cost allow more (Job att" in done.stderr
    (submitted,) = (each for each in aws.requests if each.operation == "SubmitJob")
    assert submitted.parameters["timeout"] == {"attemptDurationSeconds": 90}


def test_money_becomes_time(aws: FakeAWS, run_here: Command, folder: Path) -> None:
    """A minute for the image's download is set aside: it is paid for and not in the limit."""
    (folder / "job.py").write_text("")
    aws.clear_requests()
    words = ("--cpus", "4", "--disk", "50", "--max-cost", "0.1")
    assert run_here("run", "job.py", *words).returncode == 0
    (defined,) = (each for each in aws.requests if each.operation == "RegisterJobDefinition")
    container = defined.parameters["containerProperties"]
    assert container["ephemeralStorage"] == {"sizeInGiB": 50}
    (submitted,) = (each for each in aws.requests if each.operation == "SubmitJob")
    per_hour = 4 * 0.04048 + 8 * 0.004445 + 30 * 0.000111 + 0.005
    wanted = int(0.1 / per_hour * 3600 - 60)
    assert submitted.parameters["timeout"] == {"attemptDurationSeconds": wanted}


def _result(name: str) -> dict[str, object]:
    found = boto3.client("s3").get_object(
        Bucket=Profile.load("default").bucket, Key=f"cloudexec/runs/{name}/result.json"
    )
    return dict(json.loads(found["Body"].read()))


def test_a_program_is_ended_before_its_machine_so_that_its_files_come_back(
    aws: FakeAWS, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import pathlib, signal, sys, time\n"
        "pathlib.Path('out/a').write_text('so far')\n"
        "def end(*_): pathlib.Path('out/b').write_text('at the end'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "time.sleep(600)\n"
    )
    plan = RunPlan(
        name="short",
        kind="command",
        target="",
        args=(sys.executable, "-c", code),
        outputs=("out",),
        output_folders=("out",),
        max_seconds=4,
        region="us-east-1",
    )
    began = time.monotonic()
    assert machine_here(plan) == 143
    assert time.monotonic() - began < 60
    output = capfd.readouterr().out
    assert "its time limit of 4 s was nearly over: --max-hours or --max-cost" in output
    result = _result("short")
    assert (result["exit_code"], result["is_final"]) == (143, True)

    async def fetch() -> list[str]:
        async with AwsClients() as clients:
            bucket = RunBucket(clients, Profile.load("default").bucket, "short")
            return [each.path for each in await bucket.fetch(folder, ["out"])]

    assert asyncio.run(fetch()) == ["out/a", "out/b"]
    assert (folder / "out" / "b").read_text() == "at the end"


def test_an_attempt_that_comes_after_the_time_limit_does_not_begin(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each attempt has AWS's limit to itself, and the run has one for all of them."""
    plan = RunPlan(
        name="late",
        kind="command",
        target="",
        args=("echo", "up"),
        max_seconds=60,
        region="us-east-1",
    )
    began = json.dumps({"at": time.time() - 61}).encode()
    monkeypatch.setenv("AWS_BATCH_JOB_ATTEMPT", "2")
    assert machine_here(plan, {"started-.json": began}) == 125
    output = capfd.readouterr().out
    assert "its time limit of 60 s was over before attempt 2" in output
    assert "up\n" not in output


def test_workers_of_executors_count_against_the_ceiling(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    (folder / "job.py").write_text(
        "from cloudexec import Batch, BatchExecutor\n"
        "with BatchExecutor(4, launcher=Batch()) as executor:\n"
        "    print(sum(executor.map(abs, range(8))))\n"
    )
    assert run_here("run", "job.py", "--name", "costly").returncode == 0

    async def exceeded(most: float) -> str:
        async with AwsClients() as clients:
            plan = await RunBucket(clients, Profile.load("default").bucket, "costly").plan()
            return await Budget(clients, replace(plan, max_cost_usd=most)).exceeded()

    assert asyncio.run(exceeded(5.0)) == ""
    said = asyncio.run(exceeded(0.0015))
    assert "it was ended as it has cost $0.0009, and its workers $0.0" in said
    assert "the ceiling of $0.0015 (--max-cost)" in said


def test_workers_count_though_the_role_of_runs_may_not_look_at_those_of_other_launchers(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    """That of a stack from before runs with them may not; the rest of the cost is known."""
    whole = Profile.load("default")
    roles = {"function_role": "arn:aws:iam::1:role/f", "instance_profile": "arn:aws:iam::1:x/i"}
    replace(whole, cluster="cloudexec-default", **roles).save()
    (folder / "job.py").write_text(
        "from cloudexec import Batch, BatchExecutor\n"
        "with BatchExecutor(1, launcher=Batch()) as executor:\n"
        "    print(executor.submit(abs, 1).result())\n"
    )
    try:
        assert run_here("run", "job.py", "--name", "older-stack").returncode == 0
        assert float(str(_result("older-stack")["workers_usd"])) > 0
    finally:
        whole.save()


# For programs, and for users who may do little.


def test_a_program_starts_finds_follows_and_deletes_runs(aws: FakeAWS, folder: Path) -> None:
    (folder / "job.py").write_text(
        "import pathlib, sys\n"
        "print('up', *sys.argv[1:])\n"
        "pathlib.Path('out/a.txt').write_text('a')\n"
        "raise SystemExit(3)\n"
    )
    run = cloudexec.run("job.py", ["x"], cpus=0.5, outputs=["out"], name="by-program")
    assert repr(run) == "Run('by-program', profile='default')"
    assert list(run.lines()) == ["up x"]
    assert run.wait(timeout=100) == 3
    found = Run.find("by-program")
    info = found.info()
    assert (info.state, info.exit_code, info.vcpus) == ("failed", 3, 0.5)
    assert not info.is_active
    assert [each.read_text() for each in found.fetch(folder / "there")] == ["a"]
    found.delete()
    with pytest.raises(ConfigError, match="there is no run 'by-program'"):
        Run.find("by-program")
    with pytest.raises(ConfigError, match=r"there is no file 'absent\.py'"):
        cloudexec.run("absent.py")
    with pytest.raises(TypeError, match="cpu_count"):
        cloudexec.run("job.py", cpu_count=3)


def test_a_program_stops_a_run(aws: FakeAWS, folder: Path) -> None:
    run = cloudexec.run(args=["sleep", "600"])
    with pytest.raises(TimeoutError, match=r"is (running|starting|waiting|preparing) after 0 s"):
        run.wait(timeout=0)
    run.stop()
    assert run.wait(timeout=100) == 143
    assert run.info().state == "stopped"


def test_the_policy_of_users_is_enough(aws: FakeAWS, run_here: Command, folder: Path) -> None:
    (folder / "job.py").write_text("open('out/a', 'w').write('a')\n")
    aws.clear_requests()
    aws.faults.allow_only(policy(Profile.load("default")))
    try:
        words = ("run", "job.py", "--env", "A=b", "--outputs", "out", "--name", "allowed")
        assert run_here(*words).returncode == 0
        for command in (
            ("runs",),
            ("attach", "allowed"),
            ("logs", "allowed"),
            ("stop", "allowed"),
            ("fetch", "allowed", "--delete"),
        ):
            assert run_here(*command).returncode == 0, command
    finally:
        aws.faults.clear()
    assert not [each for each in aws.requests if each.status == 403]


def test_the_role_of_runs_reaches_its_part_of_the_bucket_only(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    (folder / "job.py").write_text(
        "import sys\n"
        "import boto3\n"
        "from botocore.exceptions import ClientError\n"
        "s3 = boto3.client('s3')\n"
        "for key in ('cloudexec/x', 'data/x', 'other/x'):\n"
        "    try:\n"
        "        s3.put_object(Bucket=sys.argv[1], Key=key, Body=b'x')\n"
        "        print(key, 'written')\n"
        "    except ClientError as exc:\n"
        "        print(key, exc.response['Error']['Code'])\n"
        "try:\n"
        "    boto3.client('iam').list_roles()\n"
        "except ClientError as exc:\n"
        "    print('iam', exc.response['Error']['Code'])\n"
    )
    done = run_here("run", "job.py", Profile.load("default").bucket, "-q")
    assert done.stdout.splitlines() == [
        "cloudexec/x written",
        "data/x written",
        "other/x AccessDenied",
        "iam AccessDenied",
    ]


def test_an_executor_in_a_run_knows_the_account_and_nothing_of_the_client(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    """Its address and relay are of no use there, and it starts no runs of its own."""
    (folder / "job.py").write_text(
        "import dataclasses, json\n"
        "from cloudexec.aws import Profile\n"
        "print(json.dumps(dataclasses.asdict(Profile.load('default'))))\n"
    )
    mine = Profile.load("default")
    replace(mine, advertise="203.0.113.7:5000", relay="auto").save()
    try:
        done = run_here("run", "job.py", "-q")
    finally:
        mine.save()
    found = json.loads(done.stdout)
    assert (found["advertise"], found["relay"], found["run_role"]) == ("", "", "")
    assert found["images"] == {f"{PYTHON}-linux/amd64": IMAGE}
    assert found["queues"] == asdict(mine)["queues"]
