"""What the machine of a run does, as a process without a job."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from run_helpers import account, create, eventually, machine, start_machine

from cloudexec._aws.profile import Profile
from cloudexec._runs.plan import RunPlan, RunResult
from cloudexec._runs.runs import Found
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
    aws: FakeAWS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS takes the machine back in between, and starts another attempt."""
    monkeypatch.setenv("AWS_BATCH_JOB_ATTEMPT", "2")
    result = RunResult(exit_code=7, attempt=1)
    plan = plan_of("has-ended", "print('up')")
    done = machine(plan, tmp_path, {"result.json": result.to_json()})
    assert done.returncode == 7, done.stderr
    assert "the program has ended in attempt 1, and is not run again" in done.stdout
    assert "up\n" not in done.stdout
    assert done.stdout.endswith("the run has-ended has ended, with exit code 7\n")


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


def test_a_file_that_does_not_come_back_is_no_success(aws: FakeAWS, tmp_path: Path) -> None:
    """It has a code of its own, and neither ends the program nor keeps back other files."""
    code = (
        "import os, time\n"
        "open(b'out/\\xff', 'w').close()\n"
        "open('out/a', 'w').close()\n"
        "time.sleep(5)\n"  # so that the machine looks at the files while it runs
        "print('to the end')\n"
    )
    done = machine(plan_of("odd-name", code, "out"), tmp_path)
    assert done.returncode == 122, done.stdout + done.stderr
    assert "to the end\n" in done.stdout
    assert "is not in the bucket yet: b'out/\\xff': its name is not UTF-8" in done.stdout
    result = read("odd-name", "result.json")
    assert isinstance(result, dict)
    assert result["exit_code"] == 122
    assert result["reason"].startswith("files did not come back: b'out/\\xff': its name is not")
    assert [each["path"] for each in read("odd-name", "outputs.json")] == ["out/a"]  # type: ignore[attr-defined]


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


def test_the_code_of_an_attempt_that_was_told_to_stop_is_not_the_programs() -> None:
    plan = plan_of("told", "")
    told = RunResult(exit_code=143, is_final=False)
    assert Found(plan, None, told).exit_code is None
    assert Found(plan, None, told).state == "failed"
    assert Found(plan, None, RunResult(exit_code=143)).exit_code == 143
