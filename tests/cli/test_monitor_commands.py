"""``cloudexec ps``, ``jobs``, ``logs``, ``stop``, ``cost`` and ``definitions``, on a fake AWS."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import boto3
import click
import pytest
from click.testing import CliRunner

from cloudexec._aws.profile import Profile
from cloudexec.cli import _group
from cloudexec.testing import FakeAWS

T = TypeVar("T")
Completed = subprocess.CompletedProcess[str]
Run = Callable[..., Completed]
Start = Callable[..., "subprocess.Popen[str]"]

ANN = "0f3a7c9912ab44de"
BERT = "b0b0b0b0b0b0b0b0"
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
NUMBERS = "for i in range(5000): print(i)"


def eventually(probe: Callable[[], T], *, seconds: float = 50.0) -> T:
    """Return the first answer that is true."""
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        threading.Event().wait(0.02)
    return answer


class Account:
    """An account with one queue, in which jobs like an executor's are submitted."""

    def __init__(self, aws: FakeAWS) -> None:
        self.aws = aws
        self.batch = boto3.client("batch")
        self.setup = aws.set_up("work", max_vcpus=64)
        self.define("cloudexec-0123456789abcdef", image="worker:1")

    def define(self, name: str, *, image: str) -> None:
        """Register a definition of 1 vCPU with 2 GiB."""
        self.batch.register_job_definition(
            jobDefinitionName=name,
            type="container",
            platformCapabilities=["FARGATE"],
            containerProperties={
                "image": image,
                "executionRoleArn": self.setup.execution_role,
                "resourceRequirements": [
                    {"type": "VCPU", "value": "1"},
                    {"type": "MEMORY", "value": "2048"},
                ],
            },
        )

    def submit(
        self, code: str, *, executor: str = ANN, first: int = 1, size: int = 1, name: str = ""
    ) -> str:
        """Submit a job of ours that runs Python code, and return its id."""
        array: Any = {"arrayProperties": {"size": size}} if size > 1 else {}
        answer = self.batch.submit_job(
            jobName=name or f"cloudexec-{executor}-{first}",
            jobQueue=self.setup.queue,
            jobDefinition="cloudexec-0123456789abcdef",
            containerOverrides={"command": [sys.executable, "-c", code]},
            tags={
                "cloudexec:executor": executor,
                "cloudexec:user": "ann" if executor == ANN else "bert",
                "cloudexec:project": "sweep",
                "cloudexec:expires": "2099-01-01T00:00:00+00:00",
            },
            **array,
        )
        return str(answer["jobId"])

    def until(self, job_id: str, *states: str) -> None:
        """Wait until a job is in one of the states."""
        eventually(lambda: self.aws.job(job_id).status in states)

    def running(self, job_id: str, size: int = 1) -> str:
        """Wait until a job's workers run, and return its id."""
        for each in [job_id] if size == 1 else [f"{job_id}:{i}" for i in range(size)]:
            self.until(each, "RUNNING")
        return job_id


@pytest.fixture
def account(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Account]:
    """An account with one queue and no profile."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path_factory.mktemp("configuration")))
    with FakeAWS(grace=2.0, calls_per_second=1000.0) as aws:
        yield Account(aws)


@pytest.fixture
def run(run_here: Run) -> Run:
    """Run the command in this process; those that are started, and not run, have their own."""
    return run_here


@pytest.fixture
def environment(account: Account, environment: dict[str, str]) -> dict[str, str]:
    """The environment of commands, made once the account is there; tables as wide as they need."""
    return {key: value for key, value in environment.items() if key != "COLUMNS"}


def rows(result: Completed) -> list[list[str]]:
    """Return the cells of a table, without its head; columns are two spaces apart at least."""
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines()[1:]]


class TestPs:
    def test_says_in_one_line_that_there_is_nothing(self, account: Account, run: Run) -> None:
        assert run("ps").stdout == "No executor has jobs that have not ended.\n"
        assert run("ps", "--all").stdout == "No executors.\n"
        assert json.loads(run("ps", "--json").stdout) == []

    def test_shows_executors(self, account: Account, run: Run) -> None:
        account.running(account.submit(SLEEP, size=3), 3)
        account.until(account.submit("pass", executor=BERT), "SUCCEEDED")
        result = run("ps")
        (row,) = rows(result)
        assert row[:3] == [ANN, "ann", "sweep"]
        assert row[4:6] == ["3", "running"]
        assert row[6:9] == ["3", "6", "GiB"]
        assert row[9] == "$0.0025"
        assert [each[0] for each in rows(run("ps", "--all"))] == [BERT, ANN]
        (data,) = json.loads(run("ps", "--json").stdout)
        assert data["id"] == ANN
        assert data["workers"] == {"RUNNING": 3}
        assert data["expires_at"] == "2099-01-01T00:00:00+00:00"

    def test_a_relay_is_none_of_the_workers(self, account: Account, run: Run) -> None:
        """It has a line of its own in what was paid for."""
        account.running(account.submit(SLEEP))
        account.running(account.submit(SLEEP, name=f"cloudexec-{ANN}-relay-r0a1b2c3d"))
        (row,) = rows(run("ps"))
        assert row[4:11] == ["1", "running,", "1", "relay", "1", "2", "GiB"]
        (data,) = json.loads(run("ps", "--json").stdout)
        assert (data["workers"], data["relays"]) == ({"RUNNING": 1}, 1)
        paid, relay, total = rows(run("cost"))
        assert paid[4] == total[-6] == "1"
        assert relay[:2] == ["its", "relay"]
        assert relay[-1] == paid[-2]
        (cost,) = json.loads(run("cost", "--json").stdout)["executors"]
        assert cost["runs"] == 1
        assert cost["relay_usd"] == pytest.approx(cost["cost_usd"] / 2)

    def test_names_the_remedy_where_workers_found_nobody(self, account: Account, run: Run) -> None:
        index = "int(os.environ['AWS_BATCH_JOB_ARRAY_INDEX'])"
        code = f"import os, time; {index} or time.sleep(60); raise SystemExit(4)"
        job_id = account.submit(code, size=3)
        for child in (1, 2):
            account.until(f"{job_id}:{child}", "FAILED")
        hint = f"2 workers of {ANN} could not reach the program."
        result = run("ps")
        assert len(rows(result)) == 1
        assert hint in result.stderr
        assert f"`cloudexec stop --executor {ANN}`" in result.stderr
        run("stop", "--executor", ANN, "--yes")
        account.until(job_id, "FAILED")
        assert hint not in run("ps", "--all").stderr

    def test_tables_fit_the_terminal(
        self, account: Account, environment: dict[str, str], run: Run
    ) -> None:
        account.aws.faults.image_pull_fails(count=1)
        account.until(account.submit("pass"), "FAILED")
        account.running(account.submit(SLEEP, first=2, size=3), 3)
        for columns in (80, 120):
            environment["COLUMNS"] = str(columns)
            for arguments, count in (
                (["ps"], 1),
                (["jobs"], 2),
                (["jobs", "--workers"], 4),
                (["cost"], 1),
            ):
                head, *lines = run(*arguments).stdout.splitlines()
                assert max(map(len, (head, *lines))) <= columns
                assert len(lines) == count
                assert all(ANN in line and "$" in line for line in lines)


class TestJobs:
    def test_shows_how_they_ended(self, account: Account, run: Run) -> None:
        assert run("jobs").stdout == "No jobs.\n"
        failed = account.submit("raise SystemExit(3)", first=2)
        account.until(failed, "FAILED")
        running = account.running(account.submit(SLEEP, first=3))
        result = run("jobs")
        newest, oldest = rows(result)
        assert newest[:3] == [f"cloudexec-{ANN}-3", "worker-3", "running"]
        assert oldest[:3] == [f"cloudexec-{ANN}-2", "worker-2", "failed"]
        assert "Essential container in task exited" in result.stdout
        assert failed in result.stdout

        def shown(*arguments: str) -> list[str]:
            return [each["id"] for each in json.loads(run("jobs", "--json", *arguments).stdout)]

        assert shown() == [running, failed]
        assert shown("--active") == [running]
        assert shown("--inactive") == [failed]
        assert shown("--state", "failed", "--state", "SUCCEEDED") == [failed]
        assert shown("--limit", "1") == [running]
        assert shown("--executor", BERT) == []

    def test_an_unknown_state_is_refused(self, account: Account, run: Run) -> None:
        result = run("jobs", "--state", "sleeping")
        assert result.returncode == 2
        assert "sleeping" in result.stderr


class TestLogs:
    def test_prints_lines(self, account: Account, run: Run) -> None:
        job = account.submit("for i in range(3): print('line', i)")
        account.until(job, "SUCCEEDED")
        assert run("logs", job).stdout == "line 0\nline 1\nline 2\n"
        assert run("logs", "worker-1", "--tail", "1").stdout == "line 2\n"
        assert run("logs", job, "--timestamps", "-n1").stdout.endswith("Z line 2\n")
        (line,) = map(json.loads, run("logs", job, "--json", "-n1").stdout.splitlines())
        assert (line["message"], line["job_id"], line["attempt"]) == ("line 2", job, 1)

    def test_follows_until_the_job_ends(
        self, account: Account, start: Start, tmp_path: Path
    ) -> None:
        gate = tmp_path / "gate"
        account.submit(
            f"import os, time\nprint('first', flush=True)\n"
            f"while not os.path.exists({str(gate)!r}): time.sleep(0.05)\nprint('last')"
        )
        process = start("logs", "-f", "worker-1")
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        gate.touch()
        assert process.communicate(timeout=30) == ("last\n", "")
        assert process.returncode == 0

    def test_following_is_interrupted_by_ctrl_c(self, account: Account, start: Start) -> None:
        account.submit(SLEEP)
        process = start("logs", "-f", "worker-1")
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
        assert (output, errors.strip()) == ("", "Interrupted.")
        assert process.returncode == 130

    def test_ends_quietly_when_its_reader_goes_away(self, account: Account, start: Start) -> None:
        job = account.submit(NUMBERS)
        account.until(job, "SUCCEEDED")
        eventually(lambda: len(account.aws.logs(job)) == 5000)
        process = start("logs", job)
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 141

    def test_that_are_not_there_say_what_to_do(self, account: Account, run: Run) -> None:
        account.aws.faults.no_capacity()
        account.until(account.submit("pass"), "RUNNABLE")
        result = run("logs", "worker-1")
        assert (result.returncode, result.stdout) == (3, "")
        assert "has no log yet" in result.stderr
        assert "Traceback" not in result.stderr


class TestStop:
    def test_asks_first_and_says_what_it_would_stop(self, account: Account, run: Run) -> None:
        job = account.running(account.submit(SLEEP, size=2), 2)
        no = run("stop", "--executor", ANN, stdin="n\n")
        assert no.returncode != 0
        assert f"cloudexec-{ANN}-1" in no.stderr
        assert "Stop 1 job with 2 workers?" in no.stderr
        assert account.aws.job(f"{job}:0").status == "RUNNING"
        yes = run("stop", "--executor", ANN, stdin="y\n")
        assert (yes.returncode, yes.stdout) == (0, f"stopped cloudexec-{ANN}-1\n")
        account.until(job, "FAILED")
        assert "with `cloudexec stop`" in (account.aws.job(f"{job}:0").status_reason or "")

    def test_without_an_answer_nothing_is_stopped(self, account: Account, run: Run) -> None:
        job = account.running(account.submit(SLEEP))
        done = run("stop", job)
        assert done.returncode == 2
        assert done.stderr.endswith(
            "Error: this needs a confirmation, and standard input is empty: add --yes\n"
        )
        assert account.aws.job(job).status == "RUNNING"

    def test_stops_without_asking_when_told(self, account: Account, run: Run) -> None:
        jobs = [account.running(account.submit(SLEEP, first=n)) for n in (1, 2)]
        assert json.loads(run("stop", "worker-1", "--yes", "--json").stdout) == {
            "stopped": jobs[:1]
        }
        assert run("stop", "--all", "--older-than", "1h", "-y").stdout.startswith("Nothing")
        assert run("stop", "--all", "-y").stdout == f"stopped cloudexec-{ANN}-2\n"
        for job in jobs:
            account.until(job, "FAILED")

    def test_fails_if_something_was_refused(self, account: Account, run: Run) -> None:
        job = account.running(account.submit(SLEEP))
        account.aws.faults.deny("TerminateJob")
        result = run("stop", job, "--yes")
        assert result.returncode == 3
        assert "1 of 1 jobs could not be stopped" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "say what to stop"),
            (["--all", "worker-1"], "--all stops everything"),
            (["--older-than", "soon"], "--older-than must be like"),
            (["", "--yes"], "is empty"),
            (["--executor", "", "--yes"], "is empty"),
        ],
    )
    def test_a_command_line_that_is_unclear_is_refused(
        self, account: Account, run: Run, arguments: list[str], message: str
    ) -> None:
        result = run("stop", *arguments)
        assert result.returncode == 2
        assert message in result.stderr


class TestCost:
    def test_shows_cost_and_where_prices_are_from(self, account: Account, run: Run) -> None:
        account.until(account.submit("pass", size=2), "SUCCEEDED")
        account.until(account.submit("pass", executor=BERT), "SUCCEEDED")
        result = run("cost")
        bert, ann, total = rows(result)
        assert (bert[0], bert[-1]) == (BERT, "$0.0008")
        assert (ann[0], ann[-1]) == (ANN, "$0.0016")
        assert (total[0], total[-1]) == ("total", "$0.0025")
        assert "note: us-east-1 list prices of" in result.stderr
        data = json.loads(run("cost", "--json", "--executor", ANN, "--refresh").stdout)
        assert data["cost_usd"] == pytest.approx(2 * 60 * (0.04048 + 2 * 0.004445) / 3600)
        assert data["prices_source"] == "AWS Price List API"


class TestDefinitions:
    def test_are_listed_described_and_removed(self, account: Account, run: Run) -> None:
        account.define("cloudexec-0123456789abcdef", image="worker:2")
        account.define("cloudexec-fedcba9876543210", image="worker:3")
        account.define("nightly-report", image="report:1")
        names = [row[0] for row in rows(run("definitions", "list"))]
        assert names == [
            "cloudexec-0123456789abcdef:1",
            "cloudexec-0123456789abcdef:2",
            "cloudexec-fedcba9876543210:1",
        ]
        data = json.loads(run("definitions", "describe", "cloudexec-0123456789abcdef").stdout)
        assert data["containerProperties"]["image"] == "worker:2"
        older = run("definitions", "describe", "cloudexec-0123456789abcdef:1")
        assert json.loads(older.stdout)["containerProperties"]["image"] == "worker:1"

        no = run("definitions", "deregister", "--all", stdin="n\n")
        assert "Remove 3 job definitions?" in no.stderr
        assert (no.returncode, no.stdout) == (1, "")
        assert no.stderr.endswith("Nothing was removed.\n")
        one = run("definitions", "deregister", "cloudexec-0123456789abcdef:1", "--yes")
        assert one.stdout == "deregistered cloudexec-0123456789abcdef:1\n"
        rest = run("definitions", "deregister", "--all", "--yes", "--json")
        assert json.loads(rest.stdout) == {"deregistered": names[1:]}
        assert run("definitions", "list").stdout == "No job definitions of cloudexec's.\n"
        assert len(json.loads(run("definitions", "list", "--all", "--json").stdout)) == 3

    def test_that_are_not_ours_are_not_removed(self, account: Account, run: Run) -> None:
        account.define("nightly-report", image="report:1")
        for verb in (("describe",), ("deregister", "--yes")):
            result = run("definitions", *verb, "nightly-report")
            assert result.returncode == 2
            assert "there is no job definition nightly-report of cloudexec's" in result.stderr

    def test_a_refusal_is_reported(self, account: Account, run: Run) -> None:
        account.aws.faults.deny("DeregisterJobDefinition")
        result = run("definitions", "deregister", "--all", "--yes")
        assert result.returncode == 3
        assert "Error: cloudexec-0123456789abcdef:1: " in result.stderr

    def test_are_registered_once_for_the_same_content(self, account: Account, run: Run) -> None:
        arguments = (
            *("definitions", "register", "--image", "worker:9", "--vcpus", "2"),
            *("--memory", "4GiB", "--arch", "arm64", "--no-public-ip"),
            *("--execution-role", account.setup.execution_role),
        )
        first = run(*arguments)
        assert first.returncode == 0, first.stderr
        again = json.loads(run(*arguments, "--json").stdout)
        assert again["arn"] == first.stdout.strip()
        data = json.loads(run("definitions", "describe", again["definition"]).stdout)
        container = data["containerProperties"]
        assert container["image"] == "worker:9"
        assert container["runtimePlatform"]["cpuArchitecture"] == "ARM64"
        assert {each["type"]: each["value"] for each in container["resourceRequirements"]} == {
            "VCPU": "2",
            "MEMORY": "4096",
        }
        assert container["networkConfiguration"] == {"assignPublicIp": "DISABLED"}

    def test_sizes_that_fargate_lacks_are_refused(self, account: Account, run: Run) -> None:
        result = run("definitions", "register", "--image", "worker:9", "--memory", "99GiB")
        assert result.returncode == 2
        assert "Fargate has no size of 1 vCPU with 99 GiB" in result.stderr
        assert run("definitions", "register").returncode == 2

    def test_sizes_that_ec2_lacks_are_refused(self, account: Account, run: Run) -> None:
        command = ("definitions", "register", "--image", "worker:9", "--compute", "ec2")
        result = run(*command, "--vcpus", "0.5")
        assert result.returncode == 2
        assert "the nearest: 1 vCPU with 2 GiB" in result.stderr
        result = run(*command, "--ephemeral", "50")
        assert (result.returncode, "for --compute fargate" in result.stderr) == (2, True)


class TestWhereToLook:
    def test_a_profile_says_which_region_and_queues(self, account: Account, run: Run) -> None:
        other = account.aws.set_up("other")
        Profile(name="mine", region="us-east-1", queues={"fargate": other.queue}).save()
        account.running(account.submit(SLEEP))
        assert len(json.loads(run("ps", "--json").stdout)) == 1
        assert json.loads(run("ps", "--json", "--profile", "mine").stdout) == []
        assert json.loads(run("ps", "--json", "--region", "eu-west-1").stdout) == []

    def test_one_that_does_not_exist_is_refused(self, account: Account, run: Run) -> None:
        for verb in (["ps"], ["jobs"], ["cost"], ["stop", "--all"], ["definitions", "list"]):
            result = run(*verb, "--profile", "nope")
            assert result.returncode == 2
            assert "there is no profile 'nope'" in result.stderr

    def test_the_profile_of_this_machine_is_none(
        self, account: Account, environment: dict[str, str], run: Run
    ) -> None:
        """``CLOUDEXEC_PROFILE=local`` brings scripts home; commands then look everywhere."""
        environment["CLOUDEXEC_PROFILE"] = "local"
        account.running(account.submit(SLEEP))
        result = run("ps", "--json")
        assert (result.returncode, len(json.loads(result.stdout))) == (0, 1), result.stderr
        assert "there is no profile 'default'" in run("doctor", "--dry").stdout

    def test_a_region_that_does_not_exist_is_refused(self, account: Account, run: Run) -> None:
        result = run("ps", "--region", "mars-1")
        assert result.returncode == 2
        assert result.stderr.startswith("Error: there is no AWS region 'mars-1'")
        misspelt = run("ps", "--region", "us-mars-1")
        assert misspelt.returncode == 3
        assert "there is no AWS region 'us-mars-1'" in misspelt.stderr

    def test_what_aws_refuses_is_one_line(self, account: Account, run: Run) -> None:
        account.aws.faults.deny("ListJobs")
        for verb in (["ps"], ["jobs"], ["cost"], ["stop", "--all"], ["logs", "worker-1"]):
            result = run(*verb)
            assert result.returncode == 3
            assert result.stderr.startswith("Error: batch:ListJobs failed")
            assert "cloudexec policy" in result.stderr


def commands(group: click.Group, *names: str) -> Iterator[tuple[str, ...]]:
    for name, each in sorted(group.commands.items()):
        if isinstance(each, click.Group):
            yield from commands(each, *names, name)
        else:
            yield (*names, name)


@pytest.mark.parametrize("command", list(commands(_group)), ids=" ".join)
def test_each_command_lists_its_exit_codes(command: tuple[str, ...]) -> None:
    """A code means the same in all of them."""
    result = CliRunner().invoke(_group, [*command, "--help"])
    found = dict(re.findall(r"^ +(\d+) +(\S.*)$", result.output.partition("Exit codes:")[2], re.M))
    assert {"0", "2", "3", "130"} <= found.keys()
    of_programs = {"122", "125"} if command[0] in ("attach", "run") else set()
    assert found.keys() <= {"0", "1", "2", "3", "130", "141"} | of_programs
    assert found["2"].startswith("the command line")
    assert found["130"].startswith("Ctrl-C interrupted")
