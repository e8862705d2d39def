"""What the machine of a run does, as a process without a job."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
from run_helpers import account, asked, create, eventually, machine_here, place_of, start_machine

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.profile import Profile
from cloudexec._runs import inside
from cloudexec._runs.bucket import RunBucket
from cloudexec._runs.budget import Budget
from cloudexec._runs.found import Found
from cloudexec._runs.known import Known
from cloudexec._runs.places import MachineState
from cloudexec._runs.plan import RunPlan, RunResult
from cloudexec._runs.runs import AsyncRuns
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account that was set up."""
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch) as fake,
    ):
        yield fake


@pytest.fixture(autouse=True)
def _faults_end(aws: FakeAWS) -> Iterator[None]:
    yield
    aws.faults.clear()


def plan_of(name: str, code: str, *outputs: str) -> RunPlan:
    """Return a run of some Python code."""
    return RunPlan(
        name=name,
        kind="command",
        target="",
        args=(sys.executable, "-c", code),
        outputs=outputs,
        output_folders=outputs,
        region="us-east-1",
    )


def read(name: str, file: str) -> object:
    """Return what the bucket has of a run."""
    key = f"cloudexec/runs/{name}/{file}"
    found = boto3.client("s3").get_object(Bucket=Profile.load("default").bucket, Key=key)
    return json.loads(found["Body"].read())


def test_a_program_that_has_ended_is_not_run_again(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """AWS takes the machine back in between, and starts another attempt."""
    monkeypatch.setenv("AWS_BATCH_JOB_ATTEMPT", "2")
    result = RunResult(exit_code=7, attempt=1)
    plan = plan_of("has-ended", "print('up')")
    assert machine_here(plan, {"result.json": result.to_json()}) == 7
    output = capfd.readouterr().out
    assert "the program has ended in attempt 1, and is not run again" in output
    assert "up\n" not in output
    assert output.endswith("the run has-ended has ended, with exit code 7\n")


def test_a_machine_that_is_told_to_stop_after_the_program_has_the_last_word(
    aws: FakeAWS, tmp_path: Path
) -> None:
    """It is told while it sends files: no other attempt is to run the program again."""
    mark = tmp_path / "pid"
    code = (
        "import os, pathlib\n"
        "pathlib.Path('out/a').write_text('a')\n"
        f"pathlib.Path({str(tmp_path)!r}, 'draft').write_text(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'draft')!r}, {str(mark)!r})\n"
        "raise SystemExit(6)\n"
    )
    plan = plan_of("told-late", code, "out")
    create(plan)
    with start_machine(plan, tmp_path) as process:
        try:
            eventually(mark.exists)
            aws.faults.slow_response("PutObject", 2.0)
            eventually(lambda: not Path("/proc", mark.read_text()).exists())
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 6, output + errors
    result = read("told-late", "result.json")
    assert isinstance(result, dict)
    assert (result["exit_code"], result["is_final"]) == (6, True)
    assert [each["path"] for each in read("told-late", "outputs.json")] == ["out/a"]  # type: ignore[attr-defined]


def test_a_file_that_does_not_come_back_is_no_success(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It has a code of its own, and neither ends the program nor keeps back other files."""
    code = (
        "import os, time\n"
        "open(b'out/\\xff', 'w').close()\n"
        "open('out/a', 'w').close()\n"
        "time.sleep(0.5)\n"  # so that the machine looks at the files while it runs
        "print('to the end')\n"
    )
    monkeypatch.setattr(inside, "_KEEP_FIRST", 0.05)
    assert machine_here(plan_of("odd-name", code, "out")) == 122
    output = capfd.readouterr().out
    assert "to the end\n" in output
    assert "is not in the bucket yet: b'out/\\xff': its name is not UTF-8" in output
    result = read("odd-name", "result.json")
    assert isinstance(result, dict)
    assert result["exit_code"] == 122
    assert result["reason"].startswith("files did not come back: b'out/\\xff': its name is not")
    assert [each["path"] for each in read("odd-name", "outputs.json")] == ["out/a"]  # type: ignore[attr-defined]


def test_links_that_do_not_come_back_are_named(
    aws: FakeAWS, capfd: pytest.CaptureFixture[str]
) -> None:
    """A program that looks for its latest checkpoint in such a link would begin anew on Spot."""
    code = (
        "import os\n"
        "os.mkdir('out/step-1')\n"
        "open('out/step-1/a', 'w').close()\n"
        "for name, to in ('latest', 'step-1'), ('gone', 'step-0'), ('best', 'step-1/a'):\n"
        "    os.symlink(to, f'out/{name}')\n"
    )
    assert machine_here(plan_of("links", code, "out")) == 0
    assert (
        "cloudexec: symbolic links to folders, and to what is not there, do not come back: "
        "'out/gone', 'out/latest'\n"
    ) in capfd.readouterr().out
    found = read("links", "outputs.json")
    assert [each["path"] for each in found] == ["out/best", "out/step-1/a"]  # type: ignore[attr-defined]


def test_the_exit_code_stays_though_the_result_cannot_be_written(
    aws: FakeAWS, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    code = (
        "import pathlib, time\n"
        "print('up', flush=True)\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n"
        "raise SystemExit(5)\n"
    )
    plan = plan_of("no-result", code)
    create(plan)
    with start_machine(plan, tmp_path) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            aws.faults.deny("PutObject")
            go.touch()
            output, errors = process.communicate(timeout=100)
        finally:
            process.kill()
    assert process.returncode == 5, output + errors
    assert "how the program ended could not be written into the bucket: " in output
    assert output.endswith("the run no-result has ended, with exit code 5\n")


def test_a_job_of_an_earlier_start_or_of_a_run_that_was_stopped_runs_nothing(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = replace(plan_of("other-start", "print('up')"), start_id="second")
    assert machine_here(plan, start_id="first") == 125
    assert "the run was started again since this job was submitted" in capfd.readouterr().out
    stopped = RunResult(
        exit_code=125, reason="stopped by Anne", start_id="second", was_stopped=True
    )
    plan = replace(plan, name="stopped-early")
    assert machine_here(plan, {"result.json": stopped.to_json()}) == 125
    output = capfd.readouterr().out
    assert "the run was stopped by Anne, and the program is not run" in output
    monkeypatch.setenv("AWS_BATCH_JOB_ID", "mine")
    other = json.dumps({"job_id": "theirs"}).encode()
    plan = replace(plan, name="has-another")
    assert machine_here(plan, {"job-second.json": other}) == 125
    output += capfd.readouterr().out
    assert "the job theirs runs the program: this one does not run it" in output
    assert "up\n" not in output
    # And a result of another start is none.
    plan = replace(plan, name="started-again")
    earlier = RunResult(exit_code=7, start_id="first")
    assert machine_here(plan, {"result.json": earlier.to_json()}) == 0
    result = read("started-again", "result.json")
    assert isinstance(result, dict)
    assert (result["exit_code"], result["start_id"]) == (0, "second")
    assert read("started-again", "job-second.json") == {"job_id": "mine"}


def test_an_outage_does_not_hide_how_the_program_ended(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor do fields that a newer client has written into the profile."""
    monkeypatch.setattr("cloudexec._aws.clients._ATTEMPTS", 1)  # without the pauses of the SDK
    code = "from cloudexec.aws import Profile; print(Profile.load('default').bucket); exit(3)"
    profile = asdict(Profile.load("default")) | {"of_a_newer_release": 1}
    plan = replace(plan_of("outage", code), profile=profile, on="moon")
    create(plan)
    aws.faults.lose_response("GetObject", count=2)
    aws.faults.lose_response("PutObject", count=3)
    with monkeypatch.context() as patch:
        # The machine sets it for itself.
        patch.setenv("CLOUDEXEC_CONFIG_DIR", os.environ["CLOUDEXEC_CONFIG_DIR"])
        assert asyncio.run(inside._run(place_of(plan), plan.region, "")) == 3
    assert f"{profile['bucket']}\n" in capfd.readouterr().out
    result = read("outage", "result.json")
    assert isinstance(result, dict)
    assert result["exit_code"] == 3


def test_a_program_is_told_to_stop_while_a_file_is_sent(
    aws: FakeAWS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "told"
    code = (
        "import pathlib, signal, sys, time\n"
        "pathlib.Path('out/large').write_text('x')\n"
        f"def end(*_): pathlib.Path({str(told)!r}).touch(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(600)\n"
    )
    plan = plan_of("sends", code, "out")
    create(plan)
    monkeypatch.setattr(inside, "_KEEP_FIRST", 0.02)

    async def run() -> None:
        running = asyncio.ensure_future(inside._run(place_of(plan), plan.region, ""))
        await asyncio.to_thread(eventually, (tmp_path / "up").exists)
        sends = asked(aws, monkeypatch, "PutObject")
        aws.faults.slow_response("PutObject", 600.0)
        assert await asyncio.to_thread(sends.wait, 60)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.to_thread(eventually, told.exists, seconds=20.0)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    asyncio.run(run())


def test_what_the_program_has_made_of_it_counts_though_its_machine_was_killed() -> None:
    state = MachineState(
        job_id="a", phase="ended", created_at=datetime.now(UTC), exit_code=137, was_stopped=True
    )
    found = Found(plan_of("done", ""), state, RunResult(exit_code=0))
    assert (found.exit_code, found.state) == (0, "succeeded")
    found = Found(plan_of("done", ""), state, RunResult(exit_code=143, is_final=False))
    assert (found.exit_code, found.state) == (137, "stopped")


def test_a_run_waits_for_its_next_attempt_where_that_is_a_job_of_its_own(aws: FakeAWS) -> None:
    """Lists are late: it has not failed with the code of an attempt that was taken back."""
    plan = replace(plan_of("between", ""), on="fargate")
    now = datetime.now(UTC)
    told = RunResult(exit_code=143, is_final=False)

    async def state(ago: float, plan: RunPlan, result: RunResult = told) -> str:
        machine = MachineState(
            job_id="a",
            phase="ended",
            created_at=now,
            stopped_at=now - timedelta(seconds=ago),
            exit_code=143,
            was_reclaimed=True,
        )
        async with AwsClients("us-east-1") as clients:
            runs = AsyncRuns(clients, replace(Profile.load("default"), cluster="cluster"))
            return runs._found(plan, machine, result, Known()).state

    assert asyncio.run(state(5, plan)) == "waiting"
    assert asyncio.run(state(3600, plan)) == "failed"
    assert asyncio.run(state(5, plan, replace(told, is_final=True))) == "failed"
    # AWS Batch says itself that an attempt follows.
    assert asyncio.run(state(5, replace(plan, on="batch"))) == "failed"


def test_the_code_of_an_attempt_that_was_told_to_stop_is_not_the_programs() -> None:
    plan = plan_of("told", "")
    told = RunResult(exit_code=143, is_final=False)
    assert Found(plan, None, told).exit_code is None
    assert Found(plan, None, told).state == "failed"
    assert Found(plan, None, RunResult(exit_code=143)).exit_code == 143


def test_a_run_whose_objects_cannot_be_written_anew_says_so_once_and_tries_again(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of("not-renewed", "")
    create(plan)

    async def work() -> None:
        async with AwsClients("us-east-1") as clients:
            bucket = RunBucket(clients, Profile.load("default").bucket, plan.name)
            machine = inside._Machine(bucket, plan, Budget(clients, plan))
            machine._renewed_at = -1.0
            aws.faults.deny("PutObject")
            await machine._renew()
            await machine._renew()
            assert machine._renewed_at == -1.0
            aws.faults.clear()
            await machine._renew()
            assert machine._renewed_at > 0

    asyncio.run(work())
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 1
    text = "what another attempt needs could not be written anew, which is tried again: "
    assert said[0].startswith(f"cloudexec: {text}")
    assert "AccessDenied" in said[0]


def test_a_machine_of_a_place_without_time_limits_ends_itself_when_its_time_is_over(
    aws: FakeAWS, tmp_path: Path
) -> None:
    """Even where it hangs after the program: nothing else would end it."""
    profile = replace(Profile.load("default"), cluster="cluster")
    plan = replace(plan_of("hangs", "print('up')"), on="fargate", max_seconds=4)
    plan = replace(plan, profile=asdict(profile))
    create(plan)
    with start_machine(plan, tmp_path) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            aws.faults.slow_response("PutObject", 600.0)
            assert process.wait(60) == -signal.SIGALRM
        finally:
            process.kill()
