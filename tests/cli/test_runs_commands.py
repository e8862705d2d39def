"""Runs that outlive the client: they are found, followed, fetched and stopped by their names."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from run_helpers import account, eventually, left_nothing, row

from cloudexec._aws.profile import Profile
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(180)

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account that was set up, with a time limit of AWS's minute in two seconds."""
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch, grace=3.0) as fake,
    ):
        yield fake


@pytest.fixture(autouse=True)
def _nothing_is_left(aws: FakeAWS) -> Iterator[None]:
    aws.clear_requests()
    yield
    left_nothing(aws)


def objects(name: str) -> list[str]:
    """Return what the bucket has of a run."""
    bucket, prefix = Profile.load("default").bucket, f"cloudexec/runs/{name}/"
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [each["Key"].removeprefix(prefix) for each in listed.get("Contents", ())]


def has_variables(name: str) -> bool:
    """Say whether the bucket has variables of a run."""
    return any(each.startswith("variables-") for each in objects(name))


def test_a_run_is_followed_from_another_folder_after_its_client_has_gone(
    aws: FakeAWS,
    run_here: Run,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go = folder / "go"
    (folder / "job.py").write_text(
        "import pathlib, time\n"
        "print('first')\n"
        "pathlib.Path('out/a.txt').write_text('a')\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n"
        "print('last')\n"
        "raise SystemExit(7)\n"
    )
    done = run_here("run", "job.py", "--detach", "--outputs", "out")
    name = done.stdout.strip()
    assert done.returncode == 0
    assert name.startswith("job-")
    assert f"`cloudexec attach {name}` shows the program's output" in done.stderr
    # Another machine: with the same profile, and nothing else.
    profile = Profile.load("default")
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path_factory.mktemp("other")))
    profile.save()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    eventually(lambda: "first" in run_here("logs", name).stdout)
    assert row(run_here, name)["state"] == "running"
    assert run_here("fetch", name, "--delete").returncode == 2
    go.touch()
    followed = run_here("attach", name, "--log-file", "log.txt")
    assert (followed.returncode, followed.stdout) == (7, "first\nlast\n")
    assert Path("out/a.txt").read_text() == "a"
    assert Path("log.txt").read_text() == "first\nlast\n"
    again = run_here("attach", name, "--no-fetch", "-q")
    assert (again.returncode, again.stdout, again.stderr) == (7, "first\nlast\n", "")
    found = row(run_here, name)
    assert (found["state"], found["exit_code"], found["command"]) == ("failed", 7, "job.py")
    assert found["cost_usd"] > 0  # type: ignore[operator]
    table = run_here("runs").stdout
    assert table.splitlines()[0].split()[:3] == ["RUN", "STATE", "EXIT"]
    assert run_here("runs", "--active").stdout == "No runs that have not ended.\n"
    fetched = run_here("fetch", name, "--to", "there", "--delete")
    assert (fetched.returncode, fetched.stdout) == (0, "there/out/a.txt\n")
    assert objects(name) == []
    gone = run_here("attach", name)
    assert gone.returncode == 2
    assert f"there is no run {name!r} in the bucket" in gone.stderr
    assert "The run goes on." not in gone.stderr


def test_files_come_back_while_it_runs(aws: FakeAWS, run_here: Run, folder: Path) -> None:
    """And are kept although the machine dies without a word."""
    (folder / "job.py").write_text(
        "import pathlib, time\n"
        "pathlib.Path('out/a.txt').write_text('a')\n"
        "print('up')\n"
        "time.sleep(600)\n"
    )
    done = run_here(
        "run", "job.py", "-d", "--outputs", "out", "--env", "X=1", "--name", "keeps-files"
    )
    assert done.returncode == 0
    eventually(
        lambda: any(each.endswith("/out/a.txt") for each in objects("keeps-files")), seconds=120
    )
    eventually(lambda: run_here("fetch", "keeps-files").stdout == "out/a.txt\n")
    aws.faults.kill_instance(aws.jobs()[-1].job_id)
    assert (folder / "out" / "a.txt").read_text() == "a"
    eventually(lambda: aws.jobs()[-1].status == "FAILED")
    # The machine could not delete them.
    assert has_variables("keeps-files")
    assert row(run_here, "keeps-files")["exit_code"] is None
    assert not has_variables("keeps-files")


def test_the_variables_of_a_run_that_is_stopped_do_not_stay_in_the_bucket(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    aws.faults.no_capacity()  # so that no machine can delete them
    words = ("run", "-d", "--name", "has-variables", "--env", "TOKEN=secret", "--", "true")
    assert run_here(*words).returncode == 0
    assert has_variables("has-variables")
    assert run_here("stop", "has-variables", "--yes").returncode == 0
    assert not has_variables("has-variables")


def test_a_run_whose_spot_machine_is_taken_back_runs_again_with_its_files(
    aws: FakeAWS, run_here: Run, start: Start, folder: Path
) -> None:
    (folder / "job.py").write_text(
        "import os, pathlib, time\n"
        "mark = pathlib.Path('out/mark.txt')\n"
        "print('attempt', os.environ['CLOUDEXEC_RUN_ATTEMPT'], mark.exists(), flush=True)\n"
        "if not mark.exists():\n"
        "    mark.write_text('half')\n"
        "    time.sleep(600)\n"
        "mark.write_text(mark.read_text() + ' and half')\n"
    )
    client = start("run", "job.py", "--spot", "--outputs", "out", "--name", "on-spot")
    assert client.stdout is not None
    assert client.stdout.readline() == "attempt 1 False\n"
    assert aws.jobs()[-1].spot
    aws.faults.reclaim(aws.jobs()[-1].job_id)
    output, errors = client.communicate(timeout=120)
    assert client.returncode == 0, errors
    assert "attempt 2 True\n" in output
    assert "on-spot: attempt 1 was lost; it is started again" in errors
    assert (folder / "out" / "mark.txt").read_text() == "half and half"
    assert row(run_here, "on-spot")["attempts"] == 2


def test_a_machine_that_is_lost_for_good_leaves_no_exit_code(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    run_here("run", "--name", "lost", "-d", "--", "sleep", "600")
    eventually(lambda: aws.jobs()[-1].status == "RUNNING")
    aws.faults.kill_instance(aws.jobs()[-1].job_id)
    done = run_here("attach", "lost")
    assert done.returncode == 3
    assert "the run lost has no exit code: AWS took its machine back in attempt 1" in done.stderr


def test_a_run_that_is_killed_for_its_memory_says_so(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    run_here("run", "--name", "too-large", "-d", "--", "sleep", "600")
    eventually(lambda: aws.jobs()[-1].status == "RUNNING")
    aws.faults.out_of_memory(aws.jobs()[-1].job_id)
    done = run_here("attach", "too-large")
    assert done.returncode == 137
    assert "its memory of 2 GiB was used up: give a larger --memory" in done.stderr


def test_stopping_a_run_stops_the_workers_in_it(aws: FakeAWS, run_here: Run, folder: Path) -> None:
    (folder / "job.py").write_text(
        "import time\n"
        "from cloudexec import Batch, BatchExecutor\n"
        "executor = BatchExecutor(2, launcher=Batch())\n"
        "futures = [executor.submit(time.sleep, 600) for _ in range(2)]\n"
        "while not all(each.running() for each in futures): time.sleep(0.05)\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    run_here("run", "job.py", "-d", "--name", "with-workers")
    eventually(lambda: "up" in run_here("logs", "with-workers").stdout)
    assert row(run_here, "with-workers")["workers"] == 1
    stopped = run_here("stop", "with-workers", "--yes")
    assert stopped.returncode == 0
    assert stopped.stdout.count("stopped ") == 2
    eventually(lambda: all(each.status in ("SUCCEEDED", "FAILED") for each in aws.jobs()))
    found = row(run_here, "with-workers")
    assert found["state"] == "stopped"
    assert found["workers_usd"] > 0  # type: ignore[operator]


# Clients that are killed.


def test_a_client_that_dies_before_it_has_asked_for_a_machine_leaves_none(
    aws: FakeAWS, start: Start, run_here: Run, folder: Path
) -> None:
    (folder / "job.py").write_text("print('up')\n")
    before = len(aws.jobs())
    aws.faults.slow_response("DescribeJobDefinitions", 600.0)
    client = start("run", "job.py", "--name", "dies-early")
    eventually(lambda: "files.tar.gz" in objects("dies-early"))
    client.kill()
    client.communicate()
    aws.faults.clear()
    assert len(aws.jobs()) == before
    assert row(run_here, "dies-early")["state"] == "preparing"
    taken = run_here("run", "job.py", "--name", "dies-early")
    assert taken.returncode == 2
    assert "there is a run 'dies-early' already" in taken.stderr
    assert run_here("fetch", "dies-early", "--delete").returncode == 0
    assert objects("dies-early") == []


@pytest.mark.parametrize("phase", ["waiting", "running"])
def test_a_run_goes_on_when_its_client_is_killed(
    aws: FakeAWS, start: Start, run_here: Run, folder: Path, phase: str
) -> None:
    go = folder / "go"
    (folder / "job.py").write_text(
        "import pathlib, time\n"
        "print('up')\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)\n"
        "pathlib.Path('out/a.txt').write_text('a')\n"
    )
    name = f"killed-{phase}"
    if phase == "waiting":
        aws.faults.no_capacity()
    client = start("run", "job.py", "--name", name, "--outputs", "out")
    wanted = "waits for a machine" if phase == "waiting" else ": runs"
    assert client.stderr is not None
    while wanted not in (line := client.stderr.readline()):
        assert line
    client.send_signal(signal.SIGKILL)
    client.communicate()
    if phase == "waiting":
        assert row(run_here, name)["state"] == "waiting"
        aws.faults.capacity_returns()
    go.touch()
    followed = run_here("attach", name)
    assert (followed.returncode, followed.stdout) == (0, "up\n")
    assert (folder / "out" / "a.txt").read_text() == "a"


def test_ctrl_c_before_there_is_a_machine_leaves_nothing(
    aws: FakeAWS, start: Start, folder: Path
) -> None:
    (folder / "job.py").write_text("print('up')\n")
    before = len(aws.jobs())
    aws.faults.slow_response("DescribeJobDefinitions", 3.0)
    client = start("run", "job.py", "--name", "interrupted")
    eventually(lambda: "files.tar.gz" in objects("interrupted"))
    client.send_signal(signal.SIGINT)
    client.communicate(timeout=60)
    assert client.returncode == 130
    assert objects("interrupted") == []
    assert all(each.status == "FAILED" for each in aws.jobs()[before:])


def test_a_run_with_a_name_that_is_forgotten_still_has_its_exit_code(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    """AWS Batch forgets jobs days before the bucket forgets runs."""
    (folder / "job.py").write_text("raise SystemExit(9)\n")
    assert run_here("run", "job.py", "--name", "forgotten").returncode == 9
    aws.faults.forget_ended()
    found = row(run_here, "forgotten")
    assert (found["state"], found["exit_code"]) == ("failed", 9)
    assert found["cost_usd"] > 0  # type: ignore[operator]


def test_a_run_resumes_with_the_journal_and_the_files_of_an_earlier_one(
    aws: FakeAWS, run_here: Run, folder: Path
) -> None:
    """The calls that succeeded are not made again."""
    calls = folder / "calls"
    calls.mkdir()
    (folder / "tasks.py").write_text(
        "import pathlib, uuid\n"
        "def square(n):\n"
        f"    pathlib.Path({str(calls)!r}, f'{{n}}-{{uuid.uuid4().hex}}').touch()\n"
        "    return n * n\n"
    )
    program = (
        "import os, pathlib, tasks\n"
        "from cloudexec import Batch, BatchExecutor\n"
        "journal = os.environ.get('CLOUDEXEC_RUN_JOURNAL')\n"
        "with BatchExecutor(1, launcher=Batch(), journal=journal) as executor:\n"
        "    total = sum(executor.map(tasks.square, range(10)))\n"
        "earlier = pathlib.Path('out/earlier.txt')\n"
        "print('total', total, earlier.exists())\n"
        "if not earlier.exists():\n"
        "    earlier.write_text('there')\n"
        "    raise SystemExit('as after a crash')\n"
    )
    words = ("run", "job.py", "--name", "resumed", "--resume", "--outputs", "out")
    (folder / "job.py").write_text(program)
    first = run_here(*words)
    assert first.returncode == 1
    assert "total 285 False" in first.stdout
    again = run_here(*words[:-3], "--outputs", "out")
    assert again.returncode == 2
    assert "there is a run 'resumed' already" in again.stderr
    # Without outputs, those of the earlier run are meant.
    second = run_here(*words[:-2])
    assert second.returncode == 0, second.stdout + second.stderr
    assert "total 285 True" in second.stdout
    assert len(list(calls.iterdir())) == 10
    found = row(run_here, "resumed")
    assert (found["state"], found["exit_code"]) == ("succeeded", 0)
    assert run_here("run", "job.py", "--resume").returncode == 2
    run_here("run", "--name", "sleeps", "-d", "--", "sleep", "600")
    busy = run_here("run", "--name", "sleeps", "--resume", "--", "true")
    assert busy.returncode == 2
    assert "`cloudexec attach sleeps` shows it" in busy.stderr
    assert run_here("stop", "sleeps", "--yes").returncode == 0
    eventually(lambda: all(each.status in ("SUCCEEDED", "FAILED") for each in aws.jobs()))
