"""The checks of a launcher: ours pass them, and each fault that one may have is found."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from process_farm import Farm, ProcessFarm

from cloudexec import EC2, Batch, Fargate, Lambda, Local
from cloudexec.launchers import (
    Inspection,
    JobRequest,
    JobStatus,
    Phase,
    PlatformError,
    Reason,
    Submitted,
    Target,
    WaitingJob,
    WorkerEnd,
    WorkerStatus,
)
from cloudexec.testing import LauncherCheckError, check_launcher


@pytest.mark.parametrize(
    "launcher", [Local(), Local(slots_per_worker=1), ProcessFarm()], ids=["whole", "parts", "farm"]
)
def test_a_launcher_passes(launcher: Any) -> None:
    reported: list[str] = []
    assert check_launcher(launcher, report=reported.append) == reported
    assert len(reported) == 5 + isinstance(launcher, ProcessFarm)


def test_failed_submissions_are_tried_where_a_launcher_can_make_some_fail() -> None:
    farm = ProcessFarm()
    passed = check_launcher(farm, fail_next=farm.faults.append)
    assert passed[-1] == "failed submissions are tried again or reported"


def test_batch_passes(launcher: Callable[..., Batch]) -> None:
    assert len(check_launcher(launcher())) == 6


@pytest.mark.parametrize("spot", [False, True, "prefer"])
def test_fargate_passes(fargate: Callable[..., Fargate], spot: bool | str) -> None:
    assert len(check_launcher(fargate(spot=spot))) == 6


def test_ec2_passes(ec2: Callable[..., EC2]) -> None:
    assert len(check_launcher(ec2(vcpus=1, spot="prefer"))) == 6


def test_lambda_passes(function: Callable[..., Lambda]) -> None:
    assert len(check_launcher(function())) == 6


def test_the_example_of_the_documentation_passes(tmp_path: Path) -> None:
    """As readers have it: the file and the program of the page."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "launchers.md"
    found = re.search(r"<!-- file: processes.py -->\n```python\n(.*?)```", page.read_text(), re.S)
    assert found is not None
    (tmp_path / "processes.py").write_text(found[1])
    script = "import processes, cloudexec.testing as t; t.check_launcher(processes.Processes())"
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=100, check=True)


class Forgetful(Farm):
    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        return None


class Confused(Farm):
    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        return Submitted(job_id=name.removesuffix("0"))


class Loud(Farm):
    """Gives the key to a process on its command line."""

    def start(self, request: JobRequest, path: Path, index: int) -> None:
        super().start(request, path, index)
        if index:
            return
        script = ["sh", "-c", 'sleep 60; echo "$@"', *request.secrets.values()]
        self.loud = subprocess.Popen(script, start_new_session=True)

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        os.killpg(self.loud.pid, signal.SIGKILL)
        self.loud.wait()
        await super().terminate(targets, reason)


class Rough(Farm):
    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        await super().terminate([Target(job_id=each.job_id) for each in targets], reason)


class Blind(Farm):
    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        running = {0: WorkerStatus(phase=Phase.RUNNING)}
        found = await super().describe(inspections)
        return dict.fromkeys(found, JobStatus(workers=running))


class Generous(Farm):
    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        return {each.job_id: JobStatus(workers=self.workers(each.job_id)) for each in inspections}


class Lazy(Farm):
    async def submit(self, request: JobRequest) -> Submitted:
        return Submitted(job_id=request.name, shortfall=request.workers)


class Broken(Farm):
    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        raise PlatformError("nobody knows")


class Uniform(Farm):
    def variables(self, request: JobRequest, index: int) -> dict[str, str]:
        return request.environment_of(0)


class Stuck(Farm):
    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        await asyncio.Event().wait()
        raise AssertionError


class Lenient(Farm):
    """Ends no whole job, and tells of those workers alone that have ended."""

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        found = await super().describe(inspections)
        for job_id in found:
            ended = {
                index: worker
                for index, worker in self.workers(job_id).items()
                if worker.phase is Phase.ENDED
            }
            found = {**found, job_id: JobStatus(workers=ended) if ended else found[job_id]}
        return found

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        self.ignored = [each for each in targets if each.workers is None]
        await super().terminate([each for each in targets if each.workers is not None], reason)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Stuck, r"describe\(\) has not returned within 2 s"),
        (Lenient, r"for a job with 2 workers, and 2 s later describe\(\) says '1 ended' of it"),
        (Forgetful, r"find\(\) with the name of the job .* would be started twice"),
        (Confused, r"find\(\) with a name that no job has returned"),
        (Loud, r"JobRequest.secrets is in a command line"),
        (Rough, r"for worker 0 alone, and worker 1 was killed, too"),
        (Blind, r"for worker 0, and .* says '1 running', and not that worker 0 has ended"),
        (Generous, r"describe\(\) returned a job that does not exist"),
        (Lazy, r"says that 2 of them are missing; .* must raise a PlatformError"),
        (Broken, r"PlatformError: nobody knows"),
    ],
)
def test_what_a_platform_does_wrong_is_named(kind: type[Farm], words: str) -> None:
    """With the method that is to blame, or what it means for whoever uses it."""
    with pytest.raises(LauncherCheckError, match=words) as caught:
        check_launcher(ProcessFarm(kind=kind), timeout=2)
    assert caught.value.check == "a job is submitted, found, described and ended"
    assert str(caught.value).startswith(f"{caught.value.check}: ")


def test_workers_that_all_have_the_same_index_are_found() -> None:
    """Only one of them is let in."""
    with pytest.raises(LauncherCheckError, match=r"to start.*CLOUDEXEC_INDEX") as caught:
        check_launcher(ProcessFarm(kind=Uniform), timeout=30)
    assert caught.value.check == "several workers share the work"
