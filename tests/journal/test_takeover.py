"""Clients that are killed and run again: their workers, which live on, are taken over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from journal_tasks import calls

from cloudexec._journal.sqlite import SqliteStore
from cloudexec.testing import FakeAWS

Program = Callable[..., "subprocess.Popen[str]"]

CLIENT = """
import json, sys, logging
from cloudexec import Batch, BatchExecutor
from journal_tasks import held, note, roll

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
settings = json.loads(sys.argv[1])
if __name__ == "__main__":
    batch = Batch(image="x", **settings["batch"])
    options = {"output": "off", "orphan_timeout": 60.0}
    if "initializer" in settings:
        options.update(initializer=note, initargs=(settings["initializer"],))
    with BatchExecutor(3, launcher=batch, journal=settings["journal"], **options) as executor:
        work = {"held": held, "roll": roll}[settings.get("work", "held")]
        numbers = settings.get("numbers") or range(settings["tasks"])
        futures = [executor.submit(work, settings["ran"], x) for x in numbers]
        results = [future.result() for future in futures]
        stats = executor.stats()
        said = {
            "results": [len(each) if isinstance(each, bytes) else each for each in results],
            "resumed": stats.tasks.resumed,
            "tasks": stats.tasks.taken_over,
            "workers": stats.workers.taken_over,
            "launched": stats.workers.launched,
            "lost": stats.lost_attempts,
        }
        print(json.dumps(said), flush=True)
"""


@pytest.fixture
def aws() -> Iterator[Any]:
    with FakeAWS(grace=2.0, calls_per_second=1000) as fake:
        yield fake


class Runs:
    """Runs of one program that has a journal and workers in an emulated AWS."""

    def __init__(self, aws: Any, program: Program, directory: Path, ran: str) -> None:
        made = aws.set_up("queue", max_vcpus=8)
        self._batch = {
            "queue": made.queue,
            "job_role": made.job_role,
            "execution_role": made.execution_role,
            "region": aws.region,
        }
        self._program = program
        self._directory = directory
        self.ran = ran
        self.journal = directory / "journal"
        self._script = directory / "client.py"
        self._script.write_text(CLIENT)

    def start(self, tasks: int, **settings: Any) -> subprocess.Popen[str]:
        """Run it."""
        told = {
            "batch": self._batch,
            "journal": str(self.journal),
            "ran": self.ran,
            "tasks": tasks,
            **settings,
        }
        return self._program(self._script, json.dumps(told))

    def start_and_kill(self, tasks: int, **settings: Any) -> None:
        """Run it, and kill it once each of its three workers has begun with a call."""
        client = self.start(tasks, **settings)
        self.begun(3)
        kill(client)

    def begun(self, count: int) -> None:
        """Wait until so many calls have begun."""
        self.wait(lambda: len(self.calls("begun-")) >= count)

    def calls(self, prefix: str) -> dict[str, int]:
        """Return how often calls have begun (``begun-``), or ended (nothing)."""
        found = calls(self.ran)
        if prefix:
            return {name: n for name, n in found.items() if name.startswith(prefix)}
        return {name: n for name, n in found.items() if name.isdecimal()}

    def open(self) -> None:
        """Let all calls end."""
        (self._directory / "open").touch()

    @staticmethod
    def wait(condition: Callable[[], Any], timeout: float = 110.0) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "it did not come about in time"
            time.sleep(0.02)


@pytest.fixture
def runs(aws: Any, program: Program, tmp_path: Path, ran: str) -> Runs:
    return Runs(aws, program, tmp_path, ran)


def said_by(client: subprocess.Popen[str], timeout: float = 110.0) -> dict[str, Any]:
    """Return what a client says in the end."""
    out, err = client.communicate(timeout=timeout)
    assert client.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def kill(client: subprocess.Popen[str]) -> None:
    client.send_signal(signal.SIGKILL)
    client.wait()


def unfinished(aws: Any) -> list[Any]:
    return [job for job in aws.jobs() if job.status not in ("SUCCEEDED", "FAILED")]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("opened", ["before", "after"])
def test_workers_go_on_and_hand_over(aws: Any, runs: Runs, opened: str) -> None:
    """No call begins twice, whether it ends while there is no client, or later."""
    runs.start_and_kill(8)
    jobs = {job.job_id for job in aws.jobs()}
    if opened == "before":
        runs.open()
        runs.wait(lambda: len(runs.calls("")) == 3)
    second = runs.start(8)
    if opened == "after":
        assert second.stderr is not None
        while "may live" not in second.stderr.readline():
            pass
        runs.open()
    said = said_by(second)
    assert said["results"] == [x * x for x in range(8)]
    assert (said["workers"], said["tasks"], said["launched"], said["lost"]) == (3, 3, 0, 0)
    assert runs.calls("begun-") == {f"begun-{x}": 1 for x in range(8)}
    assert {job.job_id for job in aws.jobs()} == jobs
    runs.wait(lambda: not unfinished(aws))


@pytest.mark.timeout(120)
def test_a_large_result_is_parked(runs: Runs) -> None:
    """It goes another way than small ones, in parts that a client that is gone may have had."""
    runs.start_and_kill(3, work="roll")
    runs.open()
    runs.wait(lambda: len(runs.calls("")) == 3)
    said = said_by(runs.start(3, work="roll"))
    assert said["results"] == [3_000_000 + x for x in range(3)]
    assert said["tasks"] == 3
    assert runs.calls("begun-") == {f"begun-{x}": 1 for x in range(3)}


@pytest.mark.timeout(120)
def test_what_is_called_for_later_is_there(runs: Runs) -> None:
    """The program may first want something else than what its workers hold."""
    runs.start_and_kill(3)
    runs.open()
    said = said_by(runs.start(0, numbers=[3, 4, 5, 2, 1, 0]))
    assert said["results"] == [9, 16, 25, 4, 1, 0]
    assert said["tasks"] == 3
    assert runs.calls("begun-") == {f"begun-{x}": 1 for x in range(6)}


@pytest.mark.timeout(120)
def test_what_is_never_called_for_is_in_the_journal(runs: Runs) -> None:
    """What came of calls that a program did not make again is there when it does."""
    runs.start_and_kill(3)
    runs.open()
    runs.wait(lambda: len(runs.calls("")) == 3)
    assert said_by(runs.start(0, numbers=[10, 11, 12]))["results"] == [100, 121, 144]
    said = said_by(runs.start(3))
    assert (said["resumed"], said["launched"]) == (3, 0)
    assert runs.calls("begun-") == {f"begun-{x}": 1 for x in [0, 1, 2, 10, 11, 12]}


@pytest.mark.timeout(120)
def test_killed_twice(aws: Any, runs: Runs) -> None:
    """Workers are taken over by one client after the other."""
    runs.start_and_kill(6)
    second = runs.start(6)
    assert second.stderr is not None
    while "may live" not in second.stderr.readline():
        pass
    kill(second)
    runs.open()
    said = said_by(runs.start(6))
    assert said["results"] == [x * x for x in range(6)]
    assert (said["workers"], said["launched"]) == (3, 0)
    assert runs.calls("begun-") == {f"begun-{x}": 1 for x in range(6)}
    runs.wait(lambda: not unfinished(aws))


@pytest.mark.timeout(120)
def test_a_worker_that_died_meanwhile(aws: Any, runs: Runs) -> None:
    """Its call is run again, by a worker that takes its place; those of the others are not."""
    runs.start_and_kill(3)
    victim = next(job for job in aws.jobs() if job.pid)
    os.kill(victim.pid, signal.SIGKILL)
    runs.wait(lambda: len([job for job in aws.jobs() if job.pid]) == 2)
    runs.open()
    said = said_by(runs.start(3))
    assert said["results"] == [0, 1, 4]
    assert (said["workers"], said["tasks"]) == (2, 2)
    assert sorted(runs.calls("begun-").values()) == [1, 1, 2]
    runs.wait(lambda: not unfinished(aws))


@pytest.mark.timeout(120)
def test_jobs_that_aws_has_forgotten(aws: Any, runs: Runs) -> None:
    """The program is run again long after: its calls are too, at once, by new workers."""
    runs.start_and_kill(3)
    for job in aws.jobs():
        if job.pid:
            os.kill(job.pid, signal.SIGKILL)
    runs.wait(lambda: not unfinished(aws))
    assert aws.faults.forget_ended()
    runs.open()
    second = runs.start(3)
    said = said_by(second)
    assert said["results"] == [0, 1, 4]
    assert (said["workers"], said["tasks"], said["launched"]) == (0, 0, 3)
    assert runs.calls("begun-") == {f"begun-{x}": 2 for x in range(3)}


@pytest.mark.timeout(120)
def test_an_api_that_does_not_answer_at_once(aws: Any, runs: Runs) -> None:
    """Who is there is asked for until it is known."""
    runs.start_and_kill(3)
    aws.faults.throttle("DescribeJobs", count=8)
    runs.open()
    said = said_by(runs.start(3))
    assert (said["workers"], said["tasks"], said["launched"]) == (3, 3, 0)
    assert runs.calls("begun-") == {f"begun-{x}": 1 for x in range(3)}


@pytest.mark.timeout(120)
def test_an_api_that_does_not_answer_ends_no_worker(aws: Any, runs: Runs) -> None:
    """The program fails and says why; its workers are there for the run after that."""
    runs.start_and_kill(3)
    aws.faults.deny("DescribeJobs")
    second = runs.start(3)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "batch:DescribeJobs" in err.splitlines()[-1]
    assert len([job for job in aws.jobs() if job.pid]) == 3
    aws.faults.clear()
    runs.open()
    said = said_by(runs.start(3))
    assert (said["workers"], said["tasks"], said["launched"]) == (3, 3, 0)
    assert runs.calls("begun-") == {f"begun-{x}": 1 for x in range(3)}
    runs.wait(lambda: not unfinished(aws))


@pytest.mark.timeout(120)
def test_workers_that_were_set_up_otherwise_are_not_taken_over(aws: Any, runs: Runs) -> None:
    """Another initializer: what they would do is not what is asked for now."""
    runs.start_and_kill(3, initializer="one")
    runs.open()
    second = runs.start(3, initializer="another")
    out, err = second.communicate(timeout=60)
    said = json.loads(out)
    assert said["results"] == [0, 1, 4]
    assert said["workers"] == 0
    assert "are not taken over: versions, launcher settings" in err
    assert sorted(runs.calls("begun-").values()) == [2, 2, 2]


@pytest.mark.timeout(120)
def test_a_port_that_is_taken_is_no_obstacle(runs: Runs) -> None:
    """Somebody else listens where workers dial: new ones are launched."""
    runs.start_and_kill(3)
    runs.open()
    with listening_where(runs.journal):
        second = runs.start(3)
        out, err = second.communicate(timeout=60)
    assert json.loads(out)["results"] == [0, 1, 4]
    assert "is taken" in err


@contextmanager
def listening_where(journal: Path) -> Iterator[None]:
    """Take the port that the journal's client had."""
    store = SqliteStore(journal)
    left = store.get_state("takeover")
    store.close()
    assert left is not None
    host, _, port = json.loads(left[16:])["listen"].rpartition(":")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind((host, int(port)))
        taken.listen()
        yield


def test_a_journal_that_was_closed_in_order_leaves_nothing(runs: Runs) -> None:
    """No key and no address stays behind."""
    runs.open()
    said_by(runs.start(2))
    store = SqliteStore(runs.journal)
    assert store.get_state("takeover") is None
    store.close()
