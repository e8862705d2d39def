"""``cloudexec run`` in tasks of Amazon ECS and on EC2 instances with GPUs, on a fake AWS."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from run_helpers import account, eventually, left_nothing, row

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.profile import Profile
from cloudexec._runs.bucket import RunBucket
from cloudexec._runs.budget import Budget
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(120)

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "subprocess.Popen[str]"]
ON = ("run", "--on", "fargate")


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account whose stack has a cluster, and queues for EC2."""
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch, fargate=True, ec2=True) as fake,
    ):
        yield fake


@pytest.fixture(autouse=True)
def _nothing_is_left(aws: FakeAWS) -> Iterator[None]:
    """The role of runs is enough for all that happens on the machine, and no task stays."""
    aws.clear_requests()
    yield
    left_nothing(aws, within=20.0)


def asks(aws: FakeAWS) -> list[str]:
    """Return the operations of jobs and tasks that AWS was asked for."""
    return [each.operation for each in aws.requests if each.operation in ("SubmitJob", "RunTask")]


def test_a_script_runs_as_a_task_and_its_files_come_back(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    (folder / "job.py").write_text(
        "import os, pathlib\n"
        "pathlib.Path('out/a.txt').write_text('content')\n"
        "print('attempt', os.environ['CLOUDEXEC_RUN_ATTEMPT'])\n"
        "raise SystemExit(5)\n"
    )
    words = ("--outputs", "out", "--cpus", "4", "--disk", "50", "--name", "first")
    done = run_here(*ON, "job.py", *words)
    assert done.returncode == 5, done.stderr
    assert done.stdout == "attempt 1\n"
    assert "4 vCPU with 8 GiB, 50 GiB of disk, about $0.206 an hour" in done.stderr
    (defined,) = (each for each in aws.requests if each.operation == "RegisterTaskDefinition")
    assert defined.parameters["ephemeralStorage"] == {"sizeInGiB": 50}
    assert "first: failed with exit code 5 after" in done.stderr
    assert (folder / "out" / "a.txt").read_text() == "content"
    assert asks(aws) == ["RunTask"]
    found = row(run_here, "first")
    assert (found["on"], found["state"], found["attempts"]) == ("fargate", "failed", 1)
    assert aws.jobs()[-1].tags["cloudexec:run"] == "first"
    # And the log is there under the run's name.
    assert "attempt 1\n" in run_here("logs", "first").stdout


def test_a_profile_without_cluster_says_how_to_get_one(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    bare = replace(Profile.load("default"), cluster="", name="bare")
    bare.save()
    done = run_here(*ON, "--profile", "bare", "--", "true")
    assert done.returncode == 2
    assert "no cluster of Amazon ECS, in which --on fargate would run" in done.stderr
    assert "`cloudexec up --with fargate --name bare` adds one" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpu", "1"), "Fargate has no GPUs: --on ec2 has them, and --on batch with"),
        (("--disk", "201"), "disks on Fargate have 20 to 200 GiB, not 201: --on ec2 has larger"),
        (("--cpus", "32"), "the largest has 16 vCPU and 120GiB. --on batch has up to 32 vCPU"),
    ],
)
def test_what_amazon_ecs_does_not_have_is_refused_with_another_place(
    aws: FakeAWS, run_here: Run, folder: Path, words: tuple[str, ...], said: str
) -> None:
    done = run_here(*ON, *words, "--", "true")
    assert done.returncode == 2
    assert said in done.stderr
    assert asks(aws) == []


def test_a_place_that_is_not_there_names_those_that_are(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    done = run_here("run", "--on", "moon", "--", "true")
    assert done.returncode == 2
    assert "on must be batch, ec2 or fargate, not 'moon'" in done.stderr


@pytest.mark.parametrize("conflict", [False, True])
def test_a_lost_answer_starts_no_second_machine(
    aws: FakeAWS, run_here: Run, folder: Path, conflict: bool
) -> None:
    """Amazon ECS is asked again with the same client token, and knows the task."""
    before = len(aws.jobs())
    aws.faults.ecs.tokens_conflict = conflict
    aws.faults.lose_response("RunTask", count=1)
    done = run_here(*ON, "-q", "--", "echo once")
    assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr
    assert len(aws.jobs()) == before + 1
    assert asks(aws).count("RunTask") == 2


def test_a_machine_that_is_taken_back_starts_its_next_attempt_without_a_client(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    """Its files are there again, and all commands show one run."""
    (folder / "job.py").write_text(
        "import os, pathlib, time\n"
        "mark = pathlib.Path('out/mark.txt')\n"
        "print('attempt', os.environ['CLOUDEXEC_RUN_ATTEMPT'], mark.exists(), flush=True)\n"
        "if not mark.exists():\n"
        "    mark.write_text('half')\n"
        "    time.sleep(600)\n"
        "mark.write_text(mark.read_text() + ' and half')\n"
    )
    done = run_here(*ON, "job.py", "--spot", "--outputs", "out", "--name", "on-spot", "-d")
    assert done.returncode == 0, done.stderr
    first = aws.jobs()[-1]
    assert first.spot
    eventually(lambda: "attempt 1" in run_here("logs", "on-spot").stdout)
    aws.faults.reclaim(first.job_id)
    eventually(lambda: row(run_here, "on-spot")["state"] == "succeeded")
    assert asks(aws) == ["RunTask", "RunTask"]
    # Both with the same role, image and size.
    assert aws.jobs()[-1].definition == first.definition
    found = row(run_here, "on-spot")
    assert (found["exit_code"], found["attempts"]) == (0, 2)
    done = run_here("attach", "on-spot")
    assert done.returncode == 0, done.stderr
    assert [each for each in done.stdout.splitlines() if each.startswith("attempt")] == [
        "attempt 1 False",
        "attempt 2 True",
    ]
    assert (folder / "out" / "mark.txt").read_text() == "half and half"
    # An hour later, Amazon ECS has forgotten both.
    aws.faults.forget_ended()
    again = row(run_here, "on-spot")
    assert (again["state"], again["exit_code"]) == ("succeeded", 0)
    assert again["machine_usd"] == pytest.approx(found["machine_usd"], rel=0.5)


def test_a_run_that_is_followed_goes_on_with_its_next_attempt(
    aws: FakeAWS, start: Start, folder: Path
) -> None:
    words = ("--spot", "--name", "followed", "--")
    line = 'echo "attempt $CLOUDEXEC_RUN_ATTEMPT"; test $CLOUDEXEC_RUN_ATTEMPT = 2 || sleep 600'
    client = start(*ON, *words, line)
    assert client.stdout is not None
    assert client.stdout.readline() == "attempt 1\n"
    aws.faults.reclaim(aws.jobs()[-1].job_id)
    output, errors = client.communicate(timeout=120)
    assert client.returncode == 0, errors
    assert output.endswith("by a person or as its machine was needed\nattempt 2\n")
    assert "followed: attempt 1 was lost; it is started again" in errors


def test_without_capacity_for_the_next_attempt_a_run_says_how_to_go_on(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    run_here(*ON, "--spot", "--name", "dry", "-d", "--", "echo up; sleep 600")
    eventually(lambda: "up\n" in run_here("logs", "dry").stdout)
    aws.faults.ecs.run_task_fails("Your account is blocked.", 1, code="ClientException")
    aws.faults.reclaim(aws.jobs()[-1].job_id)
    done = run_here("attach", "dry")
    assert done.returncode == 143
    assert "AWS took its machine back, and there is no other one for it: " in done.stderr
    assert "--resume goes on with its journal and its files" in done.stderr


@pytest.mark.parametrize("way", ["stop", "console"])
def test_a_run_that_is_stopped_has_no_other_attempt(
    aws: FakeAWS, run_here: Run, folder: Path, way: str
) -> None:
    """Whoever stops it, and though it is on Spot."""
    name = f"ended-by-{way}"
    words = ("--spot", "--name", name, "--env", "A=1", "-d", "--", "echo up; sleep 600")
    assert run_here(*ON, *words).returncode == 0
    eventually(lambda: "up\n" in run_here("logs", name).stdout)
    if way == "stop":
        assert f"among them 1 run of `cloudexec run`: {name}" in run_here("down").stderr
        no = run_here("stop", name, stdin="n\n")
        assert (no.returncode, "Stop 1 run?" in no.stderr) == (1, True)
        done = run_here("stop", name, "--yes")
        assert (done.returncode, done.stdout) == (0, f"stopped the run {name}\n"), done.stderr
    else:
        task = aws.jobs()[-1].job_id
        cluster = Profile.load("default").cluster
        boto3.client("ecs").stop_task(cluster=cluster, task=task, reason="by hand")
    done = run_here("attach", name)
    assert done.returncode == 143, done.stderr
    assert f"{name}: stopped with exit code 143" in done.stderr
    assert ("by hand" if way == "console" else "with `cloudexec stop`") in done.stderr
    assert asks(aws) == ["RunTask"]
    aws.faults.forget_ended()
    found = row(run_here, name)
    assert (found["state"], found["exit_code"]) == ("stopped", 143)
    fetched = run_here("fetch", name)
    assert (fetched.returncode, fetched.stdout) == (0, "")
    assert f"the run {name} has no files: it was started without --outputs" in fetched.stderr


def test_how_a_machine_ended_that_could_not_say_so_is_known_after_amazon_ecs_has_forgotten_it(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    run_here(*ON, "--name", "too-large", "-d", "--", "sleep", "600")
    eventually(lambda: aws.jobs()[-1].status == "RUNNING")
    aws.faults.out_of_memory(aws.jobs()[-1].job_id)
    done = run_here("attach", "too-large")
    assert done.returncode == 137
    assert "its memory of 2 GiB was used up: give a larger --memory" in done.stderr
    aws.faults.forget_ended()
    found = row(run_here, "too-large")
    assert (found["state"], found["exit_code"], found["attempts"]) == ("failed", 137, 1)
    assert "OutOfMemory" in str(found["reason"])


def test_no_capacity_and_no_quota_are_said_with_what_to_do(
    aws: FakeAWS, run_here: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudexec._runs.job_place._START_SECONDS", 0.1)
    for reason in ("Capacity is unavailable at this time.", "limit on the number of vCPUs"):
        aws.faults.ecs.run_task_fails(reason)
        done = run_here(*ON, "--spot", "--name", "no-room", "--", "true")
        assert done.returncode == 3
        assert reason in done.stderr
        assert "Try without --spot, another size, or later; --on batch waits" in done.stderr
        aws.faults.clear()
    assert all(each["name"] != "no-room" for each in json.loads(run_here("runs", "--json").stdout))


def test_executors_in_it_have_workers_in_the_same_cluster(
    aws: FakeAWS, run_here: Run, folder: Path, environment: dict[str, str]
) -> None:
    (folder / "job.py").write_text(
        "from cloudexec import BatchExecutor\n"
        "with BatchExecutor(1) as executor:\n"
        "    print(executor.submit(pow, 2, 5).result())\n"
    )
    environment["CLOUDEXEC_PROFILE"] = "default"
    done = run_here(*ON, "job.py", "--name", "with-workers")
    assert "32" in done.stdout.splitlines(), done.stdout + done.stderr
    assert asks(aws) == ["RunTask", "RunTask"]
    assert ", and ~$" in done.stderr
    assert "for workers" in done.stderr
    aws.faults.forget_ended()
    assert float(str(row(run_here, "with-workers")["workers_usd"])) > 0


def test_workers_that_amazon_ecs_has_forgotten_count_against_the_ceiling(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    """It does so an hour after their end, and a run may go on for days."""
    (folder / "job.py").write_text(
        "import time\n"
        "from cloudexec import BatchExecutor, Fargate\n"
        "with BatchExecutor(1, launcher=Fargate()) as executor:\n"
        "    print(executor.submit(pow, 2, 5).result(), flush=True)\n"
        "print('alone', flush=True)\n"
        "time.sleep(600)\n"
    )
    assert run_here(*ON, "job.py", "--name", "spends", "--max-cost", "3", "-d").returncode == 0
    machine = aws.jobs()[-1].job_id
    eventually(lambda: "alone\n" in run_here("logs", "spends").stdout)
    eventually(lambda: aws.jobs()[-1].status in ("SUCCEEDED", "FAILED"))

    async def look() -> tuple[float, str]:
        async with AwsClients("us-east-1") as clients:
            bucket = RunBucket(clients, Profile.load("default").bucket, "spends")
            plan = replace(await bucket.plan(), max_cost_usd=0.0018)
            over = await Budget(clients, plan, bucket).exceeded()
            known = await bucket.known(plan.start_id)
            assert known.job_id == machine
            return sum(each.usd for each in known.costs.values() if not each.is_own), over

    before, _ = asyncio.run(look())
    assert before > 0
    aws.faults.forget_ended()
    after, over = asyncio.run(look())
    assert after == before
    # The machine itself and its worker cost what a minute of each does, at the least.
    assert "and its workers $0.0009: that is the ceiling of $0.0018" in over
    assert float(str(row(run_here, "spends")["workers_usd"])) == before
    assert run_here("stop", "spends", "--yes").returncode == 0


def test_a_gpu_is_asked_for_on_ec2_and_is_in_the_price(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    """AWS Batch has instances with GPUs only where its environment names a family that has them."""
    done = run_here("run", "--gpu", "1", "--cpus", "2", "--name", "with-gpu", "--", "echo up")
    assert (done.returncode, done.stdout) == (0, "up\n"), done.stderr
    disk = run_here("run", "--gpu", "1", "--disk", "50", "--", "true")
    assert (disk.returncode, "leave out --disk, or give --on ec2" in disk.stderr) == (2, True)
    arm = run_here("run", "--gpu", "1", "--arch", "arm64", "--", "true")
    assert (arm.returncode, "leave out --arch, or ask for what Fargate" in arm.stderr) == (2, True)
    # The cheapest instance that has one is the machine: others have no use for the rest of it.
    assert "2 vCPU with 4 GiB and 1 GPU, about $0.5" in done.stderr
    (submitted,) = (each for each in aws.requests if each.operation == "SubmitJob")
    assert submitted.parameters["jobQueue"].endswith("-ec2")
    needs = submitted.parameters["containerOverrides"]["resourceRequirements"]
    assert {"type": "GPU", "value": "1"} in needs
    found = row(run_here, "with-gpu")
    assert (found["gpus"], found["vcpus"]) == (1, 2.0)
    hours = max(float(str(found["run_seconds"])), 60.0) / 3600
    assert float(str(found["machine_usd"])) == pytest.approx(hours * 0.526, rel=0.2)
    assert "2 vCPU 4 GiB 1 GPU" in run_here("runs").stdout


def test_a_task_that_amazon_ecs_has_taken_and_cannot_place_says_so(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    """Nothing waits for capacity in Amazon ECS: it stops the task."""
    aws.faults.ecs.tasks_stop_without_capacity = True
    aws.faults.no_capacity()
    done = run_here(*ON, "--name", "not-placed", "--", "true")
    assert done.returncode == 3, done.stderr
    assert "the run not-placed has no exit code: " in done.stderr
    assert "Capacity is unavailable at this time" in done.stderr
    assert "--on batch waits in a queue" in done.stderr
