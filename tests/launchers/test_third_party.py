"""A launcher of another package: found by its name, and served by the fleet as well as Batch is."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import boto3
import process_farm
import pytest
from launcher_helpers import eventually
from process_farm import Farm, ProcessFarm

from cloudexec import (
    BatchExecutor,
    BrokenBatchExecutor,
    ConfigError,
    LaunchError,
    ObjectOptions,
    WorkerLostError,
)
from cloudexec._launchers import ending
from cloudexec.launchers import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    JobStatus,
    PlatformError,
    Site,
    Submitted,
    Target,
)
from cloudexec.testing import FakeAWS


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the launcher's package, as an installer leaves it."""
    shutil.copy(process_farm.__file__, tmp_path / "process_farm.py")
    info = tmp_path / "process_farm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: process-farm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[cloudexec.launchers]\n"
        "farm = process_farm:ProcessFarm\n"
        "ruin = process_farm:NothingOfThatName\n"
        "folder = pathlib:Path\n"
    )
    return tmp_path


def run(script: str, path: Path, **variables: str) -> str:
    """Run a script with a package installed; return what it prints."""
    (path / "script.py").write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "script.py"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path), **variables},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_launcher_of_another_package_is_found_by_its_name(installed: Path) -> None:
    """And loaded when it is asked for, not before."""
    script = """
        import sys
        from cloudexec import BatchExecutor

        BatchExecutor(1)
        print("process_farm" in sys.modules, "importlib.metadata" in sys.modules)
        with BatchExecutor(2, launcher="farm") as executor:
            print(executor)
            print(list(executor.map(abs, [-1, -2])))
        print("process_farm" in sys.modules)
    """
    before, executor, results, after = run(script, installed).splitlines()
    assert (before, results, after) == ("False False", "[1, 2]", "True")
    assert "ProcessFarm(" in executor


def test_a_variable_names_the_launcher_of_an_unchanged_script(installed: Path) -> None:
    """It counts more than the one that names a profile."""
    script = """
        from cloudexec import BatchExecutor
        print(BatchExecutor(1))
    """
    printed = run(script, installed, CLOUDEXEC_LAUNCHER="farm", CLOUDEXEC_PROFILE="there")
    assert "ProcessFarm(" in printed
    assert " Local(" in run(script, installed, CLOUDEXEC_LAUNCHER="local")
    assert " Batch(" in run(script, installed, CLOUDEXEC_LAUNCHER="batch")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "frm",
            r"launcher='frm': there is no such launcher; installed are: batch, ec2, .*local",
        ),
        ("ruin", r"launcher='ruin': the launcher cannot be made from process_farm:NothingOfThatN"),
        ("folder", r"launcher='folder': pathlib:Path is no launcher: .*PlatformLauncher"),
    ],
)
def test_a_name_that_gives_no_launcher_is_refused_with_a_remedy(
    installed: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    with pytest.raises(ConfigError, match=words):
        BatchExecutor(1, launcher=name)


def test_a_submission_that_may_pass_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    """What is said of it meanwhile is the platform's words."""
    farm = ProcessFarm(faults=[PlatformError("the farm is being fed", transient=True)])
    with BatchExecutor(1, launcher=farm) as executor:
        assert executor.submit(abs, -1).result(30) == 1
        assert farm.explain() == ""
    assert "trying again: the farm is being fed" in caplog.text


def test_a_submission_without_an_answer_is_looked_up_and_not_made_twice() -> None:
    farm = ProcessFarm(faults=[PlatformError("no answer", transient=True, uncertain=True)])
    with BatchExecutor(2, launcher=farm) as executor:
        assert list(executor.map(abs, [-1, -2])) == [1, 2]
        eventually(lambda: executor.stats().workers.slots == 2)
    assert len(list(Path(farm.folder).iterdir())) == 1
    assert len(list(Path(farm.folder).glob("*/*.pid"))) == 2


def test_a_submission_that_was_refused_fails_the_calls_with_the_reason() -> None:
    """The platform's own words are in it."""
    farm = ProcessFarm(faults=[PlatformError("wolves in the farm")] * 10)
    with BatchExecutor(1, launcher=farm) as executor:
        with pytest.raises(LaunchError, match="wolves in the farm"):
            executor.submit(abs, -1).result(30)


def test_workers_that_the_platform_had_no_room_for_are_said_to_be_missing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The others work."""
    farm = ProcessFarm(room=1)
    with BatchExecutor(3, launcher=farm) as executor:
        assert list(executor.map(abs, range(-50, 0))) == list(range(50, 0, -1))
        eventually(lambda: executor.stats().workers.slots == 1)
    assert "the farm took 1 of 3 workers" in caplog.text


def test_a_launch_is_split_into_as_many_jobs_as_the_platform_needs() -> None:
    farm = ProcessFarm(most_workers=2)
    with BatchExecutor(3, launcher=farm) as executor:
        list(executor.map(abs, range(3)))
        eventually(lambda: executor.stats().workers.slots == 3)
    workers = sorted(len(list(job.glob("*.pid"))) for job in Path(farm.folder).iterdir())
    assert workers == [1, 2]


def test_what_workers_cost_is_counted_by_the_price_that_the_platform_names() -> None:
    farm = ProcessFarm(hourly_usd=3600.0)
    with BatchExecutor(1, launcher=farm) as executor:
        executor.submit(abs, -1).result(30)
        cost = executor.cost()
        assert cost.per_hour_usd == 3600.0
        assert cost.note == "estimated from the price of electricity"
    assert executor.cost().accrued_usd >= 1.0


def test_a_program_ends_whose_standard_error_nobody_reads_any_more(installed: Path) -> None:
    """As in `2>&1 | head -1`: what the workers cost cannot be printed there."""
    script = """
        import sys
        from cloudexec import BatchExecutor
        from process_farm import ProcessFarm

        with BatchExecutor(1, launcher=ProcessFarm(hourly_usd=3600.0)) as executor:
            print(executor.submit(abs, -1).result(30))
        sys.stderr = None
    """
    (installed / "script.py").write_text(textwrap.dedent(script))
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "script.py"],
            stdout=subprocess.PIPE,
            stderr=writer,
            text=True,
            timeout=60,
            cwd=installed,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.stdout, done.returncode) == ("1\n", 0)


def test_a_worker_that_ended_before_it_connected_says_why() -> None:
    """Its exit code and its last words are in the error."""
    farm = ProcessFarm(environment={"PYTHONHOME": "/nowhere"})
    with BatchExecutor(1, launcher=farm, launch_timeout=20) as executor:
        with pytest.raises(LaunchError, match=r"(?s)exit code 1.*encodings"):
            executor.submit(abs, -1).result(60)


def test_a_worker_with_an_internal_error_has_an_exit_code_that_says_so(tmp_path: Path) -> None:
    """Here a package is missing that the worker needs for the bucket only."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['tenacity'] = None\n")
    farm = ProcessFarm(environment={"PYTHONPATH": str(tmp_path)})
    with FakeAWS():
        boto3.client("s3").create_bucket(Bucket="some-bucket")
        objects = ObjectOptions(bucket="some-bucket", bucket_threshold="1MiB")
        with BatchExecutor(2, launcher=farm, objects=objects, retries=0) as executor:
            for _ in range(4):
                executor.submit(time.sleep, 0.1)
            eventually(lambda: executor.stats().workers.idle == 2)
            with pytest.raises(WorkerLostError, match=r"(?s)exit code 1.*internal error"):
                executor.submit(bytes, 2_000_000).result(30)


def test_sizes_are_those_that_the_launcher_names() -> None:
    farm = ProcessFarm(cpus=2)
    executor = BatchExecutor(2, launcher=farm)
    view = executor.with_options(cpus=2)
    assert view._requirements is not None
    assert farm.size_name(view._requirements.requests[0].size) == "2 CPUs"
    with pytest.raises(ConfigError, match=r"cpus=3, .*: the largest of ProcessFarm has 2 CPUs"):
        executor.with_options(cpus=3)
    with pytest.raises(ConfigError, match=r"has workers of one size, and does not say what"):
        BatchExecutor(1, launcher=ProcessFarm()).with_options(cpus=3)


def test_one_launcher_serves_one_executor_at_a_time() -> None:
    farm = ProcessFarm()
    with BatchExecutor(1, launcher=farm) as executor:
        executor.submit(abs, -1).result(30)
        with pytest.raises(LaunchError, match=r"this ProcessFarm\(...\) serves an executor"):
            BatchExecutor(1, launcher=farm).submit(abs, -1)
    with BatchExecutor(1, launcher=farm) as executor:
        assert executor.submit(abs, -2).result(30) == 2


class DeafFarm(Farm):
    """Takes a job, and answers neither the submission nor its end."""

    asked = threading.Event()
    ended: ClassVar[list[str]] = []

    async def submit(self, request: JobRequest) -> Submitted:
        await super().submit(request)
        self.asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        self.ended.extend(target.job_id for target in targets)
        await super().terminate(targets, reason)


def test_a_job_of_whose_submission_no_answer_comes_is_ended_with_the_executor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long the platform takes to answer."""
    monkeypatch.setattr(ending, "PATIENCE", 0.5)
    farm = ProcessFarm(kind=DeafFarm)
    executor = BatchExecutor(1, launcher=farm)
    executor.submit(abs, -1)
    assert DeafFarm.asked.wait(30)
    executor.kill_workers()
    executor.shutdown()
    (job,) = Path(farm.folder).iterdir()
    assert DeafFarm.ended == [job.name]


@dataclasses.dataclass(frozen=True)
class SlowToClose(ProcessFarm):
    """Lets go of its platform when it is told to."""

    closing: threading.Event = dataclasses.field(default_factory=threading.Event)
    hold: threading.Event = dataclasses.field(default_factory=threading.Event)

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        async with super().connect(executor) as site:
            yield site
        self.closing.set()
        await asyncio.to_thread(self.hold.wait)


def test_a_launcher_that_is_closing_serves_no_other_executor() -> None:
    """The connection of the second one would be closed with that of the first."""
    farm = SlowToClose()
    executor = BatchExecutor(1, launcher=farm)
    assert executor.submit(abs, -1).result(30) == 1
    executor.shutdown(wait=False)
    assert farm.closing.wait(30)
    with pytest.raises(LaunchError, match="serves an executor already"):
        BatchExecutor(1, launcher=farm).submit(abs, -1)
    farm.hold.set()
    executor.shutdown()
    with BatchExecutor(1, launcher=farm) as another:
        assert another.submit(abs, -2).result(30) == 2


@dataclasses.dataclass(frozen=True)
class SlowToConnect(ProcessFarm):
    """Connects when two have asked, or a moment has passed."""

    both: threading.Barrier = dataclasses.field(default_factory=lambda: threading.Barrier(2))

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        with contextlib.suppress(threading.BrokenBarrierError):
            await asyncio.to_thread(self.both.wait, 1.0)
        async with super().connect(executor) as site:
            yield site


def test_of_two_executors_that_start_at_once_one_has_the_launcher() -> None:
    farm = SlowToConnect()
    outcomes: list[object] = []

    def use() -> None:
        try:
            with BatchExecutor(1, launcher=farm) as executor:
                outcomes.append(executor.submit(abs, -1).result(30))
        except LaunchError as exc:
            outcomes.append(str(exc)[:4])

    both = [threading.Thread(target=use) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert sorted(outcomes, key=str) == [1, "this"]


def test_a_job_that_was_not_needed_any_more_says_nothing_of_the_executor() -> None:
    """Its submission was tried again when its call was cancelled; the executor goes on."""
    busy = PlatformError("too many requests", transient=True)
    farm = ProcessFarm(faults=[busy] * 3)
    with BatchExecutor(1, launcher=farm, idle_timeout=0.1) as executor:
        future = executor.submit(abs, -1)
        eventually(lambda: "too many requests" in farm.explain())
        future.cancel()
        eventually(lambda: not executor.stats().workers.starting)
        eventually(lambda: not farm._running._submitting)
        assert "shut down" not in farm.explain()
        assert executor.submit(abs, -2).result(30) == 2


class SlowFarm(Farm):
    """Takes a job only when it is told to."""

    asked = threading.Event()
    answer = threading.Event()
    ended: ClassVar[list[Sequence[int] | None]] = []

    async def submit(self, request: JobRequest) -> Submitted:
        self.asked.set()
        await asyncio.to_thread(self.answer.wait)
        return await super().submit(request)

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        self.ended.extend(target.workers for target in targets)
        await super().terminate(targets, reason)


def test_a_worker_that_is_given_up_before_the_platform_has_answered_is_ended() -> None:
    """The others of its job go on."""
    farm = ProcessFarm(kind=SlowFarm)
    with BatchExecutor(2, launcher=farm, idle_timeout=0.3) as executor:
        first, second = executor.submit(abs, -1), executor.submit(abs, -2)
        assert SlowFarm.asked.wait(30)
        assert second.cancel()
        eventually(lambda: executor.stats().workers.starting == 1)
        SlowFarm.answer.set()
        assert first.result(30) == 1
        (workers,) = eventually(lambda: SlowFarm.ended)
        assert workers is not None
        assert len(workers) == 1


class BuggyFarm(Farm):
    """Fails as no platform is meant to: not with a ``PlatformError``."""

    asked = threading.Event()

    async def submit(self, request: JobRequest) -> Submitted:
        self.asked.set()
        return Submitted(job_id="nothing")

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        raise KeyError("describe")

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        raise KeyError("terminate")


def test_a_bug_in_a_platform_keeps_no_executor_from_ending(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged with its traceback."""
    with BatchExecutor(1, launcher=ProcessFarm(kind=BuggyFarm)) as executor:
        future = executor.submit(abs, -1)
        assert BuggyFarm.asked.wait(30)
        executor.kill_workers()
    assert isinstance(future.exception(30), BrokenBatchExecutor)
    assert "jobs could not be terminated" in caplog.text
    assert "KeyError: 'terminate'" in caplog.text


class SilentFarm(Farm):
    """Forgets to say what it has submitted."""

    async def submit(self, request: JobRequest) -> Submitted:
        return None  # type: ignore[return-value]


def test_a_submission_that_returns_nonsense_fails_the_calls() -> None:
    with BatchExecutor(1, launcher=ProcessFarm(kind=SilentFarm)) as executor:
        with pytest.raises(LaunchError, match="job_id"):
            executor.submit(abs, -1).result(30)


TAKEN_OVER = """
    import os
    import time
    from cloudexec import BatchExecutor
    from cloudexec.launchers import Phase, WorkerStatus
    from process_farm import Farm, ProcessFarm

    class LaggingFarm(Farm):
        def workers(self, job_id):
            found = super().workers(job_id)
            late = WorkerStatus(phase=Phase.STARTING)
            return {n: late if s.phase is Phase.RUNNING else s for n, s in found.items()}

    def slowly(n):
        with open(f"begun-{n}", "a") as file:
            file.write("x")
        while not __import__("os").path.exists("go"):
            time.sleep(0.01)
        return n + 1

    if __name__ == "__main__":
        kind = LaggingFarm if "LAG" in os.environ else Farm
        farm = ProcessFarm(folder="farm", cpus=1, hourly_usd=1.0, kind=kind)
        with BatchExecutor(2, launcher=farm, journal="journal", orphan_timeout=60) as executor:
            futures = [executor.submit(slowly, n) for n in (1, 2)]
            print([future.result(60) for future in futures], executor.stats().workers.launched)
            print(executor.stats().workers.taken_over, executor.stats().tasks.taken_over)
"""


def _dial(farm: Path) -> bool:
    return sum("dialing" in path.read_text() for path in farm.glob("*/*.log")) == 2


@pytest.mark.parametrize("killed", ["at work", "at work, as the platform lags", "as workers dial"])
def test_workers_outlive_a_program_that_was_killed_and_are_taken_over(
    installed: Path, killed: str
) -> None:
    """The same program, run again, launches none, however soon the first one was killed."""
    (installed / "farm").mkdir()
    (installed / "script.py").write_text(textwrap.dedent(TAKEN_OVER))
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    if "lags" in killed:
        environment["LAG"] = "1"
    first = subprocess.Popen([sys.executable, "script.py"], cwd=installed, env=environment)
    try:
        if killed.startswith("at work"):
            eventually(lambda: all((installed / f"begun-{n}").exists() for n in (1, 2)))
        else:
            eventually(lambda: _dial(installed / "farm"))
    finally:
        first.kill()
        first.wait()
    (installed / "go").touch()
    second = subprocess.run(
        [sys.executable, "script.py"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=installed,
        env=environment,
        check=True,
    )
    held = 2 if killed.startswith("at work") else 0
    launched, taken_over = second.stdout.splitlines()
    assert launched == "[2, 3] 0"
    assert taken_over.startswith("2 ")
    assert held <= int(taken_over.split()[1]) <= 2
    assert [(installed / f"begun-{n}").read_text() for n in (1, 2)] == ["x", "x"]
    assert "cloudexec: 2 tasks on 2 workers, 2 taken over, in 0:" in second.stderr
    assert len(list((installed / "farm").iterdir())) == 1
