"""Starts of runs: interrupted ones, and those that have the name of an earlier one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from run_helpers import account, asked, eventually, left_nothing, row

import cloudexec
from cloudexec import AwsError, ConfigError, Run
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.profile import Profile
from cloudexec._runs.plan import RunPlan, RunResult
from cloudexec._runs.run import make_request
from cloudexec._runs.runs import AsyncRuns
from cloudexec.cli.run import run_command
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(180)

Command = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account that was set up."""
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch, grace=1.0) as fake,
    ):
        yield fake


@pytest.fixture(autouse=True)
def _nothing_is_left(aws: FakeAWS) -> Iterator[None]:
    aws.clear_requests()
    yield
    left_nothing(aws, within=60.0)


def objects(name: str) -> list[str]:
    """Return what the bucket has of a run."""
    bucket, prefix = Profile.load("default").bucket, f"cloudexec/runs/{name}/"
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [each["Key"].removeprefix(prefix) for each in listed.get("Contents", ())]


@pytest.mark.parametrize("resumes", [False, True])
def test_ctrl_c_while_a_machine_is_asked_for_leaves_none(
    aws: FakeAWS,
    start: Start,
    run_here: Command,
    monkeypatch: pytest.MonkeyPatch,
    resumes: bool,
) -> None:
    """Though AWS's answer comes later; a run that was to go on can still do so."""
    name = f"interrupted-{resumes}".lower()
    if resumes:
        assert run_here("run", "--name", name, "--", "true").returncode == 0
    submitted = asked(aws, monkeypatch, "SubmitJob")
    aws.faults.slow_response("SubmitJob", 3.0)
    client = start("run", "--name", name, "--resume", "--env", "A=b", "--", "sleep", "600")
    assert submitted.wait(60)
    client.send_signal(signal.SIGINT)
    _, errors = client.communicate(timeout=60)
    assert client.returncode == 130
    assert f"run {name}: its start was interrupted, and no machine is left running" in errors
    assert aws.jobs()[-1].name.startswith(f"cloudexec-run-{name}-r")
    eventually(lambda: aws.jobs()[-1].status == "FAILED")
    assert aws.jobs()[-1].status_reason == "stopped by its user before it began"
    assert not [each for each in objects(name) if each.startswith("variables-")]
    if not resumes:
        assert objects(name) == []
        return
    assert row(run_here, name)["state"] == "stopped"
    aws.faults.clear()
    assert run_here("run", "--name", name, "--resume", "--", "true").returncode == 0


def test_a_start_that_failed_lets_the_run_go_on_another_time(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    assert run_here("run", "--name", "refused", "--", "true").returncode == 0
    aws.faults.deny("SubmitJob")
    again = ("run", "--name", "refused", "--resume", "--", "true")
    assert run_here(*again).returncode == 3
    found = row(run_here, "refused")
    assert found["state"] == "failed"
    assert str(found["reason"]).startswith("it could not be started: ")
    aws.faults.clear()
    aws.clear_requests()
    assert run_here(*again).returncode == 0


def test_a_run_that_goes_on_is_not_taken_for_the_earlier_one(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    """Though the lists of AWS Batch are late; nor are its time and its cost added."""
    words = ("--name", "again", "--resume", "--", "sh", "-c")
    assert run_here("run", *words, "exit 5").returncode == 5
    aws.faults.list_lag(600.0)
    assert run_here("run", *words, "exit 6").returncode == 6
    run = cloudexec.run(args=["sh", "-c", "exit 7"], name="again", resume=True)
    assert run.wait(timeout=100) == 7
    assert Run.find("again").info().exit_code == 7
    aws.faults.clear()
    info = Run.find("again").info()
    assert info.exit_code == 7
    started, stopped = aws.jobs()[-1].started_at, aws.jobs()[-1].stopped_at
    assert started is not None
    assert stopped is not None
    assert info.run_seconds == pytest.approx(stopped - started, abs=0.3)


def _prepared(name: str, **values: object) -> None:
    """Leave what a client leaves that dies before it has asked for a machine."""
    plan = RunPlan(name=name, kind="command", target="", args=("true",), **values)  # type: ignore[arg-type]
    boto3.client("s3").put_object(
        Bucket=Profile.load("default").bucket,
        Key=f"cloudexec/runs/{name}/run.json",
        Body=plan.to_json(),
    )


def test_a_start_that_died_is_marked_when_it_is_stopped(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    _prepared("died")
    again = ("run", "--name", "died", "--resume", "--", "true")
    done = run_here(*again)
    assert done.returncode == 2
    assert "If it has died, `cloudexec fetch died --delete` removes what the bucket" in done.stderr
    Run.find("died").stop()
    assert Run.find("died").info().state == "stopped"
    assert run_here(*again).returncode == 0


@pytest.mark.parametrize("has_machine", [False, True])
def test_a_start_that_is_interrupted_while_it_writes_leaves_nothing(
    aws: FakeAWS, folder: Path, monkeypatch: pytest.MonkeyPatch, has_machine: bool
) -> None:
    """It writes what is to be run, and once it has a machine, which one that is."""
    name = f"half-written-{has_machine}".lower()
    submits = asked(aws, monkeypatch, "SubmitJob")
    writes = asked(aws, monkeypatch, "PutObject")
    aws.faults.slow_response("SubmitJob", 0.5)
    if not has_machine:
        aws.faults.slow_response("PutObject", 0.5)

    async def interrupt() -> None:
        async with AwsClients() as clients:
            runs = AsyncRuns(clients, Profile.load("default"))
            request = make_request(args=["sleep", "600"], name=name)
            starting = asyncio.ensure_future(runs.start(request, print))
            if has_machine:
                assert await asyncio.to_thread(submits.wait, 60)
                writes.clear()
                aws.faults.slow_response("PutObject", 0.5)
            assert await asyncio.to_thread(writes.wait, 60)
            starting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await starting

    asyncio.run(interrupt())
    assert objects(name) == []


def test_a_run_that_is_stopped_while_it_is_prepared_gets_no_machine(
    aws: FakeAWS, run_here: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    prepares = asked(aws, monkeypatch, "DescribeJobDefinitions", until=may_go_on)
    words = {"name": "unwanted", "env": {"A": "b"}}
    with ThreadPoolExecutor(1) as threads:
        started = threads.submit(cloudexec.run, args=["sleep", "600"], **words)
        assert prepares.wait(60)
        stopped = run_here("stop", "unwanted", "--yes")
        may_go_on.set()
        assert (stopped.returncode, stopped.stdout) == (0, "stopped the run unwanted\n")
        with pytest.raises(ConfigError, match=r"run unwanted was stopped by .* while it"):
            started.result(60)
    assert row(run_here, "unwanted")["state"] == "stopped"
    assert not [each for each in objects("unwanted") if each.startswith("variables-")]
    absent = run_here("stop", "never-there", "--yes")
    assert absent.returncode == 3
    assert "there is no job never-there" in absent.stderr


def test_a_run_is_stopped_though_the_lists_of_aws_are_late(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    aws.faults.list_lag(600.0)
    run = cloudexec.run(args=["sleep", "600"], name="unlisted", env={"A": "b"})
    assert run_here("stop", "unlisted", "--yes").returncode == 0
    assert run.wait(timeout=100) == 143
    assert run.info().state == "stopped"
    assert not [each for each in objects("unlisted") if each.startswith("variables-")]


def test_a_program_runs_once_though_two_machines_were_started(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    """An answer of AWS is lost, and its lists are late."""
    ran = folder / "ran"
    before = len(aws.jobs())
    aws.faults.list_lag(600.0)
    aws.faults.lose_response("SubmitJob")
    words = ("run", "--name", "twice", "--", f"echo ran >> {ran}; exit 6")
    assert run_here(*words).returncode == 6
    assert len(aws.jobs()) == before + 2
    left_nothing(aws, within=60.0)
    assert ran.read_text() == "ran\n"
    assert row(run_here, "twice")["exit_code"] == 6


def submit_beside(job: Any, executor: str, run: str) -> str:
    """Submit a job of an executor in a run to the queue that another one is in; return its id."""
    submitted = boto3.client("batch").submit_job(
        jobName=f"cloudexec-{executor}-0",
        jobQueue=job.queue,
        jobDefinition=job.definition,
        tags={"cloudexec:executor": executor, "cloudexec:run": run},
    )
    return str(submitted["jobId"])


def test_the_variables_of_a_run_stay_if_another_stacks_run_of_that_name_is_stopped(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    run = cloudexec.run(args=["sleep", "600"], name="shared", env={"A": "b"})
    mine = aws.jobs()[-1]
    theirs = submit_beside(mine, "run-shared", "other")
    assert run_here("stop", theirs, "--yes").returncode == 0
    assert [each for each in objects("shared") if each.startswith("variables-")]
    run.stop()


def test_runs_of_a_newer_release_do_not_hide_others(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    _prepared("elsewhere", on="moon")
    _prepared("here")
    _prepared("older", created_at=time.time() - 60)
    assert row(run_here, "elsewhere")["state"] == "unknown"
    # A run that goes on is written anew now and then.
    newest = [each["name"] for each in json.loads(run_here("runs", "--json").stdout)]
    assert newest.index("here") < newest.index("older")
    assert row(run_here, "here")["state"] == "preparing"


def test_workers_end_when_a_machine_dies_that_could_not_end_them(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    run = cloudexec.run(args=["sleep", "600"], name="leaves-workers")
    eventually(lambda: aws.jobs()[-1].status == "RUNNING")
    machine = aws.jobs()[-1]
    aws.faults.no_capacity()
    worker = submit_beside(machine, "left", "leaves-workers")
    aws.faults.kill_instance(machine.job_id)
    aws.faults.deny("TerminateJob", count=1)
    followed = run_here("attach", "leaves-workers")
    assert followed.returncode == 3
    assert "leaves-workers: workers of executors in it could not be ended: " in followed.stderr
    assert "the run leaves-workers has no exit code: " in followed.stderr
    aws.clear_requests()
    with pytest.raises(AwsError, match="has no exit code"):
        run.wait(timeout=100)
    eventually(lambda: aws.job(worker).status == "FAILED")
    assert aws.job(worker).status_reason == (
        "cloudexec: the run leaves-workers has ended, and it is not needed any more"
    )


def test_workers_that_an_earlier_attempt_has_left_end_with_the_next_one(
    aws: FakeAWS, folder: Path
) -> None:
    """Also if the program had ended before its machine was taken back."""
    run = cloudexec.run(args=["sleep", "600"], name="taken-back", spot=True)
    eventually(lambda: aws.jobs()[-1].status == "RUNNING")
    machine = aws.jobs()[-1]
    queue = Profile.load("default").queues["fargate"]
    aws.faults.no_capacity(queue)
    worker = boto3.client("batch").submit_job(
        jobName="cloudexec-left-1",
        jobQueue=queue,
        jobDefinition=machine.definition,
        tags={"cloudexec:executor": "left", "cloudexec:run": "taken-back"},
    )["jobId"]
    (start_id,) = (
        each.removeprefix("job-").removesuffix(".json")
        for each in objects("taken-back")
        if each.startswith("job-")
    )
    boto3.client("s3").put_object(
        Bucket=Profile.load("default").bucket,
        Key="cloudexec/runs/taken-back/result.json",
        Body=RunResult(exit_code=4, start_id=start_id).to_json(),
    )
    aws.faults.reclaim(machine.job_id)
    assert run.wait(timeout=100) == 4
    eventually(lambda: aws.job(worker).status == "FAILED")
    assert aws.job(worker).status_reason == (
        "cloudexec: the run taken-back does not need it any more"
    )


# What the client makes of a run.


def test_output_without_a_newline_at_its_end_is_shown(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    done = run_here("run", "-q", "--", "printf", "one\\ntwo")
    assert (done.returncode, done.stdout) == (0, "one\ntwo\n")


def test_files_that_cannot_be_written_do_not_hide_how_the_program_ended(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    (folder / "out" / "a.txt").mkdir(parents=True)
    done = run_here(
        "run", "--name", "blocked", "--outputs", "out", "--", "echo a > out/a.txt; exit 0"
    )
    assert done.returncode == 122
    assert "blocked: succeeded with exit code 0 after" in done.stderr
    assert "blocked: its files did not come back: " in done.stderr
    assert "`cloudexec fetch blocked --to DIR` brings them into another folder" in done.stderr
    assert run_here("attach", "blocked", "--no-fetch").returncode == 0


def test_what_the_bucket_has_lost_does_not_keep_the_run_there(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    _prepared("lost-files", outputs=("out",))
    listed = [
        {"path": path, "size": 1, "sha256": "0" * 64, "of_a_newer_release": 1}
        for path in ("out/expired", "elsewhere")
    ]
    boto3.client("s3").put_object(
        Bucket=Profile.load("default").bucket,
        Key="cloudexec/runs/lost-files/outputs.json",
        Body=json.dumps(listed).encode(),
    )
    assert run_here("fetch", "lost-files").returncode == 3
    assert len(objects("lost-files")) == 2
    done = run_here("fetch", "lost-files", "--delete")
    assert done.returncode == 3
    assert "the bucket does not have 'out/expired' of the run lost-files" in done.stderr
    assert "lists 'elsewhere', which is not below its outputs (out)" in done.stderr
    assert objects("lost-files") == []


def test_a_run_that_cannot_be_followed_any_longer_is_said_to_go_on(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    done = run_here("run", "--name", "full", "--log-file", "/dev/full", "--", "echo up; sleep 600")
    assert done.returncode == 3
    assert "/dev/full cannot be written: No space left on device" in done.stderr
    assert "The run goes on. `cloudexec attach full` shows it again" in done.stderr
    assert aws.jobs()[-1].status == "RUNNING"
    assert run_here("stop", "full", "--yes").returncode == 0


def test_a_run_is_followed_again_when_aws_answers_again(
    aws: FakeAWS, run_here: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudexec._aws.clients._ATTEMPTS", 1)  # without the pauses of the SDK
    run = cloudexec.run(args=["sh", "-c", "echo up"], name="cut-off")
    for operation in ("ListJobs", "GetObject", "DescribeJobs"):
        aws.faults.lose_response(operation)
    assert run.wait(timeout=100) == 0
    for operation in ("ListJobs", "GetLogEvents", "GetObject"):
        aws.faults.lose_response(operation)
    done = run_here("attach", "cut-off")
    assert (done.returncode, done.stdout) == (0, "up\n"), done.stderr
    assert done.stderr.count("; trying again") == 2


def test_the_profile_in_use_is_the_one_in_the_run(
    aws: FakeAWS, run_here: Command, folder: Path, environment: dict[str, str]
) -> None:
    """Also where a variable names another one here; and it is the default one there."""
    (folder / "job.py").write_text(
        "import os\n"
        "from cloudexec.aws import Profile\n"
        "print(os.environ.get('CLOUDEXEC_PROFILE'), Profile.load('default').bucket)\n"
    )
    work = replace(Profile.load("default"), name="work")
    work.save()
    try:
        done = run_here("run", "job.py", "-q", "--profile", "work")
        assert done.stdout == f"None {work.bucket}\n"
        environment["CLOUDEXEC_PROFILE"] = "absent-there"
        done = run_here("run", "job.py", "-q", "--profile", "work")
        assert done.stdout == f"work {work.bucket}\n"
    finally:
        work.delete()


# The command line.


@pytest.mark.parametrize(
    ("words", "args", "own"),
    [
        (["train.py", "-seed", "3"], ("train.py", "-seed", "3"), {"detach": False}),
        (["train.py", "-d", "-q"], ("train.py",), {"detach": True, "is_quiet": True}),
        (["train.py", "--name", "a", "-10"], ("train.py", "-10"), {"name": "a"}),
        (["-m", "shop", "-verbose"], ("-verbose",), {"module": "shop"}),
        (["a.py", "--project", "-dash", "-nq"], ("a.py", "-nq"), {"project": "-dash"}),
        (["a.py", "--log-file", "-abc"], ("a.py",), {"log_file": Path("-abc")}),
        (["a.py", "--cpus", "-12"], ("a.py",), {"cpus": -12.0}),
        (["a.py", "--env", "-AB=1"], ("a.py",), {"env": {"-AB": "1"}}),
    ],
)
def test_options_of_a_program_are_not_taken_apart(
    words: list[str], args: tuple[str, ...], own: dict[str, object]
) -> None:
    with run_command.make_context("run", words) as context:
        assert context.params["words"] == args
        assert own.items() <= context.params.items()


def test_a_command_needs_a_word_and_a_log_file_a_command_that_waits(
    run_here: Command, folder: Path
) -> None:
    done = run_here("run", "--", "")
    assert done.returncode == 2
    assert "say what is to be run" in done.stderr
    done = run_here("run", "--detach", "--log-file", "a.log", "--", "true")
    assert done.returncode == 2
    assert "give it to `cloudexec attach`" in done.stderr
    assert os.listdir(folder) == []
