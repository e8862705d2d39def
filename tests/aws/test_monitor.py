"""What the monitor sees, says and stops, on a fake AWS that runs the jobs."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import boto3
import pytest

from cloudexec import AwsError, ConfigError
from cloudexec._aws.account import AsyncMonitor
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.monitor import Monitor
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec.testing import FakeAWS

T = TypeVar("T")

ANN = "0f3a7c9912ab44de"
BERT = "b0b0b0b0b0b0b0b0"
EXPIRES = "2099-01-01T00:00:00+00:00"
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
MINUTE = PriceTable.built_in().worker(vcpus=1, memory_mib=2048).cost(60)


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

    def define(self, **container: Any) -> str:
        """Register a definition of 1 vCPU with 2 GiB."""
        answer = self.batch.register_job_definition(
            jobDefinitionName="cloudexec-0123456789abcdef",
            type="container",
            platformCapabilities=["FARGATE"],
            containerProperties={
                "image": "worker:1",
                "executionRoleArn": self.setup.execution_role,
                "resourceRequirements": [
                    {"type": "VCPU", "value": "1"},
                    {"type": "MEMORY", "value": "2048"},
                ],
                **container,
            },
        )
        return str(answer["jobDefinitionArn"])

    def submit(
        self,
        code: str,
        *,
        executor: str = ANN,
        first: int = 1,
        size: int = 1,
        attempts: int = 1,
        queue: str = "",
        definition: str = "",
        name: str = "",
        tags: dict[str, str] | None = None,
    ) -> str:
        """Submit a job of ours that runs Python code, and return its id."""
        extra: dict[str, Any] = {"arrayProperties": {"size": size}} if size > 1 else {}
        if tags is None:
            tags = {
                "cloudexec:executor": executor,
                "cloudexec:user": "ann" if executor == ANN else "bert",
                "cloudexec:project": "sweep",
                "cloudexec:expires": EXPIRES,
            }
        if tags:
            extra["tags"] = tags
        answer = self.batch.submit_job(
            jobName=name or f"cloudexec-{executor}-{first}",
            jobQueue=queue or self.setup.queue,
            jobDefinition=definition or self.define(),
            containerOverrides={"command": [sys.executable, "-c", code]},
            retryStrategy={"attempts": attempts},
            **extra,
        )
        return str(answer["jobId"])

    def until(self, job_id: str, *states: str) -> None:
        """Wait until a job is in one of the states."""
        eventually(lambda: self.aws.job(job_id).status in states)

    def until_logged(self, job_id: str, lines: int = 1) -> None:
        """Wait until a job has written so many lines."""
        eventually(lambda: len(self.aws.logs(job_id)) >= lines)


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """An account with one queue, no profile and no prices but those we know."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
    with FakeAWS(grace=2.0, calls_per_second=1000.0) as aws:
        yield Account(aws)


@pytest.fixture
def monitor(account: Account) -> Iterator[Monitor]:
    """A monitor of all the account's queues."""
    with Monitor() as found:
        yield found


class TestExecutors:
    def test_an_account_without_jobs_has_none(self, monitor: Monitor) -> None:
        assert monitor.executors(active=None) == []
        assert monitor.jobs() == []
        assert monitor.cost().executors == ()
        assert monitor.stop(everything=True) == []

    def test_jobs_are_added_up_by_executor(self, account: Account, monitor: Monitor) -> None:
        array = account.submit(SLEEP, size=3)
        single = account.submit(SLEEP, first=4)
        other = account.submit(SLEEP, executor=BERT)
        for job in (f"{array}:0", f"{array}:1", f"{array}:2", single, other):
            account.until(job, "RUNNING")
        bert, ann = monitor.executors()
        assert (ann.id, ann.user, ann.project, ann.jobs) == (ANN, "ann", "sweep", 2)
        assert dict(ann.workers) == {"RUNNING": 4}
        assert (ann.vcpus, ann.memory_mib) == (4, 8192)
        assert ann.cost_usd == pytest.approx(4 * MINUTE)
        assert ann.per_hour_usd == pytest.approx(4 * 60 * MINUTE)
        assert not ann.is_estimate
        assert 0 < ann.age_seconds < 60
        assert ann.expires_at is not None
        assert ann.expires_at.isoformat() == EXPIRES
        assert ann.queues == ("work",)
        assert (bert.id, bert.user, dict(bert.workers)) == (BERT, "bert", {"RUNNING": 1})
        assert [each.id for each in monitor.executors(executor=BERT)] == [BERT]

    def test_those_whose_jobs_have_ended_are_shown_on_request(
        self, account: Account, monitor: Monitor
    ) -> None:
        job = account.submit("pass")
        account.until(job, "SUCCEEDED")
        assert monitor.executors() == []
        for active in (None, False):
            (executor,) = monitor.executors(active=active)
            assert not executor.is_active
            assert dict(executor.workers) == {"SUCCEEDED": 1}
            assert executor.cost_usd == pytest.approx(MINUTE)
            assert executor.per_hour_usd == 0

    def test_jobs_that_are_not_ours_are_neither_seen_nor_stopped(
        self, account: Account, monitor: Monitor
    ) -> None:
        untagged = account.submit(SLEEP, name="cloudexec-lookalike-1", tags={})
        misnamed = account.submit(SLEEP, name="nightly-report")
        account.until(untagged, "RUNNING")
        account.until(misnamed, "RUNNING")
        assert monitor.jobs() == []
        assert monitor.stop(everything=True) == []
        with pytest.raises(AwsError, match="not one of cloudexec's") as caught:
            monitor.stop(job=untagged)
        assert caught.value.code == "NotOurs"
        assert account.aws.job(untagged).status == "RUNNING"

    def test_ten_thousand_waiting_workers_take_few_calls(
        self, account: Account, monitor: Monitor
    ) -> None:
        account.aws.faults.no_capacity()
        job = account.submit(SLEEP, size=10_000)
        account.until(job, "PENDING")
        account.aws.clear_requests()
        (executor,) = eventually(
            lambda: [
                each for each in monitor.executors() if dict(each.workers) == {"RUNNABLE": 10_000}
            ]
        )
        assert executor.cost_usd == 0
        assert len(account.aws.requests) < 30

    def test_all_queues_of_the_region_are_looked_at(
        self, account: Account, monitor: Monitor
    ) -> None:
        spot = account.aws.set_up("cheap", spot=True)
        job = account.submit(SLEEP, queue=spot.queue)
        account.until(job, "RUNNING")
        (executor,) = monitor.executors()
        assert executor.queues == ("cheap",)
        assert executor.is_estimate
        assert executor.cost_usd == pytest.approx(0.3 * MINUTE)


class TestProfile:
    def test_only_its_queues_are_looked_at(self, account: Account) -> None:
        spot = account.aws.set_up("cheap", spot=True)
        Profile(name="mine", region="us-east-1", queues={"fargate_spot": spot.queue}).save()
        there = account.submit(SLEEP, queue=spot.queue)
        elsewhere = account.submit(SLEEP, first=2)
        account.until(there, "RUNNING")
        account.until(elsewhere, "RUNNING")
        account.aws.clear_requests()
        with Monitor("mine") as monitor:
            (job,) = monitor.jobs()
        assert (job.id, job.compute, job.spot) == (there, "fargate", True)
        assert {each.operation for each in account.aws.requests} == {"ListJobs", "DescribeJobs"}

    def test_one_that_does_not_exist_is_refused(self, account: Account) -> None:
        with pytest.raises(ConfigError, match="there is no profile 'nope'"):
            Monitor("nope")

    def test_another_region_than_its_own_is_refused(self, account: Account) -> None:
        Profile(name="mine", region="us-east-1").save()
        with pytest.raises(ConfigError, match="us-east-1, not in eu-west-1"):
            Monitor("mine", "eu-west-1")


class TestJobs:
    def test_an_ended_job_says_how(self, account: Account, monitor: Monitor) -> None:
        job_id = account.submit("raise SystemExit(7)")
        account.until(job_id, "FAILED")
        (job,) = monitor.jobs()
        assert (job.id, job.name, job.state) == (job_id, f"cloudexec-{ANN}-1", "FAILED")
        assert (job.exit_code, job.reason) == (7, "Essential container in task exited")
        assert (job.executor, job.user, job.project) == (ANN, "ann", "sweep")
        assert (job.queue, job.definition) == ("work", "cloudexec-0123456789abcdef:1")
        assert (job.vcpus, job.memory_mib, job.arch, job.compute) == (1, 2048, "x86_64", "fargate")
        assert (job.size, job.index, job.first_worker) == (1, None, 1)
        assert job.started_at is not None
        assert job.stopped_at is not None
        assert job.created_at <= job.started_at <= job.stopped_at
        assert not job.is_active
        (attempt,) = job.attempts
        assert (attempt.number, attempt.exit_code) == (1, 7)
        assert job.log_stream == attempt.log_stream != ""

    def test_an_image_that_cannot_be_pulled_is_named_as_the_reason(
        self, account: Account, monitor: Monitor
    ) -> None:
        account.aws.faults.image_pull_fails()
        job_id = account.submit("pass")
        account.until(job_id, "FAILED")
        (job,) = monitor.jobs()
        assert "CannotPullContainerError" in job.reason
        assert job.cost_usd == 0
        assert job.log_stream == ""

    def test_an_array_says_what_became_of_most_of_its_failed_workers(
        self, account: Account, monitor: Monitor
    ) -> None:
        job_id = account.submit(
            "import os; raise SystemExit(int(os.environ['AWS_BATCH_JOB_ARRAY_INDEX']) % 2)", size=4
        )
        account.until(job_id, "FAILED")
        (job,) = monitor.jobs()
        assert dict(job.workers) == {"SUCCEEDED": 2, "FAILED": 2}
        assert job.reason == "2 failed: Essential container in task exited"
        assert job.cost_usd == pytest.approx(4 * MINUTE)

    def test_what_waits_says_why(self, account: Account, monitor: Monitor) -> None:
        account.aws.faults.no_capacity()
        array = account.submit(SLEEP, size=3)
        account.until(f"{array}:2", "RUNNABLE")
        (job,) = eventually(lambda: [each for each in monitor.jobs() if each.reason])
        assert job.reason.startswith("waiting: CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY")

    def test_workers_of_an_array_can_be_listed(self, account: Account, monitor: Monitor) -> None:
        job_id = account.submit(
            "import os; raise SystemExit(int(os.environ['AWS_BATCH_JOB_ARRAY_INDEX']))", size=3
        )
        account.until(job_id, "FAILED")
        workers = monitor.jobs(each_worker=True)
        assert [each.id for each in workers] == [f"{job_id}:{i}" for i in range(3)]
        assert [each.index for each in workers] == [0, 1, 2]
        assert [each.first_worker for each in workers] == [1, 2, 3]
        assert [each.exit_code for each in workers] == [0, 1, 2]
        assert {each.executor for each in workers} == {ANN}
        assert [each.index for each in monitor.jobs("FAILED", each_worker=True)] == [1, 2]
        assert len(monitor.jobs(each_worker=True, limit=2)) == 2

    def test_they_are_chosen_by_state_activity_and_executor(
        self, account: Account, monitor: Monitor
    ) -> None:
        good = account.submit("pass")
        bad = account.submit("raise SystemExit(1)", first=2)
        array = account.submit(SLEEP, first=3, size=2)
        other = account.submit(SLEEP, executor=BERT)
        account.until(good, "SUCCEEDED")
        account.until(bad, "FAILED")
        for job in (f"{array}:0", f"{array}:1", other):
            account.until(job, "RUNNING")

        def ids(*args: Any, **kwargs: Any) -> list[str]:
            return [job.id for job in monitor.jobs(*args, **kwargs)]

        assert ids() == [other, array, bad, good]
        assert ids(limit=2) == [other, array]
        assert ids("failed") == [bad]
        assert ids(("SUCCEEDED", "FAILED")) == [bad, good]
        assert ids("RUNNING") == [other, array], "an array counts by its workers"
        assert ids(active=True) == [other, array]
        assert ids(active=False) == [bad, good]
        assert ids(executor=ANN, active=True) == [array]
        with pytest.raises(ConfigError, match="SLEEPING"):
            ids("SLEEPING")

    def test_every_attempt_is_shown_and_paid_for(self, account: Account, monitor: Monitor) -> None:
        code = "import os; raise SystemExit(os.environ['AWS_BATCH_JOB_ATTEMPT'] == '1')"
        single = account.submit(code, attempts=2)
        array = account.submit(code, attempts=2, first=2, size=2)
        account.until(single, "SUCCEEDED")
        account.until(array, "SUCCEEDED")
        of_array, of_single = monitor.jobs()
        assert [each.exit_code for each in of_single.attempts] == [1, 0]
        assert of_single.cost_usd == pytest.approx(2 * MINUTE)
        assert of_array.cost_usd == pytest.approx(4 * MINUTE)

    def test_architecture_storage_and_address_are_priced(
        self, account: Account, monitor: Monitor
    ) -> None:
        definition = account.define(
            runtimePlatform={"operatingSystemFamily": "LINUX", "cpuArchitecture": "ARM64"},
            ephemeralStorage={"sizeInGiB": 50},
            networkConfiguration={"assignPublicIp": "ENABLED"},
        )
        job_id = account.submit("pass", definition=definition)
        account.until(job_id, "SUCCEEDED")
        (job,) = monitor.jobs()
        price = PriceTable.built_in().worker(
            vcpus=1, memory_mib=2048, arch="arm64", ephemeral_gib=50, public_ip=True
        )
        assert job.arch == "arm64"
        assert job.cost_usd == pytest.approx(price.cost(60))

    def test_everything_can_be_written_as_json(self, account: Account, monitor: Monitor) -> None:
        account.until(account.submit("print('hello')", size=2), "SUCCEEDED")
        (job,) = monitor.jobs()
        (executor,) = monitor.executors(active=None)
        (report,) = [monitor.cost()]
        line, *_ = monitor.logs(f"{job.id}:0")
        for record in (job, executor, report, line):
            data = record.to_dict()
            assert json.loads(json.dumps(data)) == data
        assert job.to_dict()["created_at"].endswith("+00:00")
        assert job.to_dict()["workers"] == {"SUCCEEDED": 2}
        assert report.to_dict()["executors"][0]["executor"] == ANN


class TestCost:
    def test_it_is_reported_by_executor(self, account: Account, monitor: Monitor) -> None:
        account.until(account.submit("pass", size=2), "SUCCEEDED")
        running = account.submit(SLEEP, executor=BERT)
        account.until(running, "RUNNING")
        report = monitor.cost()
        bert, ann = report.executors
        assert (ann.executor, ann.runs, ann.is_active) == (ANN, 2, False)
        assert ann.cost_usd == pytest.approx(2 * MINUTE)
        assert ann.run_seconds > 0
        assert ann.vcpu_hours == pytest.approx(ann.run_seconds / 3600)
        assert ann.gib_hours == pytest.approx(2 * ann.run_seconds / 3600)
        assert (bert.executor, bert.is_active) == (BERT, True)
        assert report.cost_usd == pytest.approx(3 * MINUTE)
        assert report.per_hour_usd == bert.per_hour_usd == pytest.approx(60 * MINUTE)
        assert report.notes == ()
        assert [each.executor for each in monitor.cost(BERT).executors] == [BERT]

    def test_prices_are_refreshed_on_request(self, account: Account, monitor: Monitor) -> None:
        account.until(account.submit("pass"), "SUCCEEDED")
        report = monitor.cost(refresh=True)
        assert report.prices_source == "AWS Price List API"
        assert report.cost_usd == pytest.approx(MINUTE)
        account.aws.faults.deny("GetProducts")
        (note,) = monitor.cost(refresh=True).notes
        assert note.startswith("prices could not be refreshed: pricing:GetProducts failed")

    def test_another_regions_prices_are_called_that(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
        with FakeAWS(region="eu-west-1") as aws:
            account = Account(aws)
            account.until(account.submit("pass"), "SUCCEEDED")
            with Monitor() as monitor:
                report = monitor.cost()
        assert report.is_estimate
        assert "us-east-1 list prices" in report.notes[0]

    def test_arrays_too_many_to_look_through_are_estimated(self, account: Account) -> None:
        async def reports() -> list[tuple[int, float, bool]]:
            async with AwsClients() as clients:
                return [
                    (row.runs, row.cost_usd, row.is_estimate)
                    for calls in (0, 200)
                    for row in (await AsyncMonitor(clients, child_calls=calls).cost()).executors
                ]

        account.until(account.submit("pass", size=3), "SUCCEEDED")
        cautious, exact = asyncio.run(reports())
        assert exact == (3, pytest.approx(3 * MINUTE), False)
        assert cautious == (3, pytest.approx(3 * MINUTE), True)


class TestLogs:
    def test_of_a_job_by_id_name_and_arn(self, account: Account, monitor: Monitor) -> None:
        job_id = account.submit("for i in range(3): print('line', i)")
        account.until(job_id, "SUCCEEDED")
        account.until_logged(job_id, 3)
        arn = f"arn:aws:batch:us-east-1:123456789012:job/{job_id}"
        for name in (job_id, f"cloudexec-{ANN}-1", arn):
            lines = list(monitor.logs(name))
            assert [line.message for line in lines] == ["line 0", "line 1", "line 2"]
        assert {(line.job_id, line.attempt) for line in lines} == {(job_id, 1)}
        assert lines[0].time <= lines[2].time

    def test_of_a_worker_as_errors_name_it(self, account: Account, monitor: Monitor) -> None:
        code = "import os; print(os.environ['AWS_BATCH_JOB_ID'])"
        jobs = [account.submit(code, first=5, size=3, executor=each) for each in (ANN, BERT)]
        lone = account.submit(code, first=8, executor=BERT)
        for job in (*jobs, lone):
            account.until(job, "SUCCEEDED")
        account.until_logged(lone)

        def written(name: str) -> list[str]:
            return [line.message for line in monitor.logs(name)]

        assert written(f"{jobs[0]}:1") == [f"{jobs[0]}:1"]
        assert written(f"cloudexec-{ANN}-5:1") == [f"{jobs[0]}:1"]
        assert written(f"{ANN}/worker-7") == [f"{jobs[0]}:2"]
        assert written(f"{BERT}/worker-5") == [f"{jobs[1]}:0"]
        assert written("worker-8") == [lone]
        with pytest.raises(ConfigError, match=f"several executors.*{ANN}/worker-6"):
            written("worker-6")
        with pytest.raises(AwsError, match="no job worker-99") as caught:
            written("worker-99")
        assert caught.value.code == "NotFound"

    def test_of_an_array_worker_by_worker(self, account: Account, monitor: Monitor) -> None:
        code = "import os; print(os.environ['AWS_BATCH_JOB_ARRAY_INDEX'])"
        job_id = account.submit(code, size=3)
        account.until(job_id, "SUCCEEDED")
        lines = list(monitor.logs(job_id))
        assert [line.message for line in lines] == ["0", "1", "2"]
        assert [line.job_id for line in lines] == [f"{job_id}:{i}" for i in range(3)]
        with pytest.raises(ConfigError, match=f"{job_id}:0 to {job_id}:2"):
            list(monitor.logs(job_id, follow=True))

    def test_of_several_attempts_in_order(self, account: Account, monitor: Monitor) -> None:
        job_id = account.submit(
            "import os; n = os.environ['AWS_BATCH_JOB_ATTEMPT']; print('attempt', n);"
            "raise SystemExit(n != '3')",
            attempts=3,
        )
        account.until(job_id, "SUCCEEDED")
        lines = list(monitor.logs(job_id))
        assert [line.message for line in lines] == ["attempt 1", "attempt 2", "attempt 3"]
        assert [line.attempt for line in lines] == [1, 2, 3]
        assert [line.message for line in monitor.logs(job_id, tail=10)] == ["attempt 3"]

    def test_of_the_last_lines(self, account: Account, monitor: Monitor) -> None:
        job_id = account.submit("for i in range(100): print(i)")
        account.until(job_id, "SUCCEEDED")
        account.until_logged(job_id, 100)
        assert [line.message for line in monitor.logs(job_id, tail=3)] == ["97", "98", "99"]
        assert list(monitor.logs(job_id, tail=0)) == []
        with pytest.raises(ConfigError, match="tail must be 0 to 10,000"):
            list(monitor.logs(job_id, tail=10_001))

    def test_longer_than_a_page(self, account: Account, monitor: Monitor) -> None:
        job_id = account.submit("for i in range(12_345): print(i)")
        account.until(job_id, "SUCCEEDED")
        eventually(lambda: len(account.aws.logs(job_id)) == 12_345)
        messages = [line.message for line in monitor.logs(job_id)]
        assert messages == [str(i) for i in range(12_345)]

    def test_are_followed_until_the_job_ends(
        self, account: Account, monitor: Monitor, tmp_path: Path
    ) -> None:
        gate = tmp_path / "gate"
        job_id = account.submit(
            f"import os, time\nprint('first', flush=True)\n"
            f"while not os.path.exists({str(gate)!r}): time.sleep(0.05)\nprint('last')"
        )
        lines = monitor.logs(job_id, follow=True)
        assert next(lines).message == "first", "it waits for a job that has not started"
        gate.touch()
        assert [line.message for line in lines] == ["last"]
        assert account.aws.job(job_id).status == "SUCCEEDED"

    def test_are_followed_into_the_next_attempt(self, account: Account, monitor: Monitor) -> None:
        job_id = account.submit(
            "import os, time\nn = os.environ['AWS_BATCH_JOB_ATTEMPT']\nprint('attempt', n)\n"
            "time.sleep(0.5)\nraise SystemExit(n == '1')",
            attempts=2,
        )
        lines = list(monitor.logs(job_id, follow=True, tail=100))
        assert [line.message for line in lines] == ["attempt 1", "attempt 2"]

    def test_that_are_not_there_yet_say_what_to_do(
        self, account: Account, monitor: Monitor
    ) -> None:
        account.aws.faults.no_capacity()
        job_id = account.submit("pass")
        account.until(job_id, "RUNNABLE")
        with pytest.raises(AwsError, match=r"is RUNNABLE and has no log yet.*logs -f") as caught:
            list(monitor.logs(job_id))
        assert caught.value.code == "NoLog"

    def test_that_never_were_say_why(self, account: Account, monitor: Monitor) -> None:
        account.aws.faults.image_pull_fails()
        job_id = account.submit("pass")
        account.until(job_id, "FAILED")
        for follow in (False, True):
            with pytest.raises(AwsError, match=r"has FAILED without a log: .*CannotPull"):
                list(monitor.logs(job_id, follow=follow))

    def test_of_what_does_not_exist(self, account: Account, monitor: Monitor) -> None:
        job_id = account.submit("pass", size=2)
        unknown = "00000000-0000-0000-0000-000000000000"
        for name in ("nope", unknown, f"{unknown}:1", f"{job_id}:9", f"cloudexec-{ANN}-1:x"):
            with pytest.raises(AwsError, match="there is no job") as caught:
                list(monitor.logs(name))
            assert caught.value.code == "NotFound"

    def test_of_nothing_in_particular_are_refused(self, account: Account, monitor: Monitor) -> None:
        """A variable of a script that is empty must not mean the newest job."""
        account.until(account.submit("pass"), "SUCCEEDED")
        with pytest.raises(ConfigError, match="is empty"):
            list(monitor.logs(""))
        for pattern in ("*", "cloudexec-*", f"cloudexec-{ANN}-*", ":0"):
            with pytest.raises(AwsError, match="there is no job"):
                list(monitor.logs(pattern))


class TestStop:
    @pytest.mark.parametrize("what", [{"job": ""}, {"job": [" "]}, {"executor": ""}])
    def test_nothing_is_not_the_newest_job(
        self, account: Account, monitor: Monitor, what: dict[str, Any]
    ) -> None:
        job_id = account.submit(SLEEP)
        account.until(job_id, "RUNNING")
        with pytest.raises(ConfigError, match="is empty"):
            monitor.stop(**what)
        with pytest.raises(AwsError, match="there is no job"):
            monitor.stop(job="cloudexec-*")
        with pytest.raises(ConfigError, match="older_than"):
            monitor.stop(everything=True, older_than=-1)
        with pytest.raises(ConfigError, match="limit"):
            monitor.jobs(limit=-1)
        assert account.aws.job(job_id).status == "RUNNING"

    def test_an_executor_is_stopped_with_all_its_workers(
        self, account: Account, monitor: Monitor
    ) -> None:
        array = account.submit(SLEEP, size=2)
        single = account.submit(SLEEP, first=3)
        other = account.submit(SLEEP, executor=BERT)
        for job in (f"{array}:0", f"{array}:1", single, other):
            account.until(job, "RUNNING")
        assert sorted(monitor.stop(executor=ANN)) == sorted([array, single])
        account.until(array, "FAILED")
        account.until(single, "FAILED")
        assert account.aws.job(single).status_reason == "stopped through cloudexec"
        assert account.aws.job(other).status == "RUNNING"
        assert monitor.stop(executor=ANN) == []

    def test_one_worker_of_an_array_is_stopped(self, account: Account, monitor: Monitor) -> None:
        array = account.submit(SLEEP, size=2)
        account.until(f"{array}:0", "RUNNING")
        account.until(f"{array}:1", "RUNNING")
        assert monitor.stop(job="worker-2") == [f"{array}:1"]
        account.until(f"{array}:1", "FAILED")
        assert account.aws.job(f"{array}:0").status == "RUNNING"

    def test_everything_is_stopped_also_what_waits(
        self, account: Account, monitor: Monitor
    ) -> None:
        running = account.submit(SLEEP)
        account.until(running, "RUNNING")
        account.aws.faults.no_capacity()
        waiting = account.submit(SLEEP, executor=BERT, size=3)
        account.until(waiting, "PENDING")
        assert {each.id for each in monitor.stoppable(everything=True)} == {running, waiting}
        assert set(monitor.stop(everything=True)) == {running, waiting}
        account.until(running, "FAILED")
        account.until(waiting, "FAILED")

    def test_only_what_is_old_enough_is_stopped(self, account: Account, monitor: Monitor) -> None:
        job = account.submit(SLEEP)
        account.until(job, "RUNNING")
        assert monitor.stop(older_than=3600) == []
        assert monitor.stop(executor=ANN, older_than=3600) == []
        assert monitor.stop(older_than=0) == [job]

    def test_several_jobs_are_stopped_by_name(self, account: Account, monitor: Monitor) -> None:
        jobs = [account.submit(SLEEP, first=n) for n in (1, 2, 3)]
        for job in jobs:
            account.until(job, "RUNNING")
        stopped = monitor.stop(job=[f"cloudexec-{ANN}-1", jobs[1], jobs[1]])
        assert sorted(stopped) == sorted(jobs[:2])

    def test_a_refusal_is_reported_and_the_others_are_stopped(
        self, account: Account, monitor: Monitor
    ) -> None:
        jobs = [account.submit(SLEEP, first=n) for n in (1, 2, 3)]
        for job in jobs:
            account.until(job, "RUNNING")
        account.aws.faults.deny("TerminateJob", count=1)
        with pytest.raises(AwsError, match=r"1 of 3 jobs could not be stopped.*not call"):
            monitor.stop(everything=True)
        eventually(
            lambda: (
                sorted(account.aws.job(job).status for job in jobs)
                == ["FAILED", "FAILED", "RUNNING"]
            )
        )

    def test_it_must_be_said_what(self, monitor: Monitor) -> None:
        with pytest.raises(ConfigError, match="say what to stop"):
            monitor.stop()


class TestMonitor:
    def test_it_works_where_an_event_loop_is_running(
        self, account: Account, monitor: Monitor
    ) -> None:
        job_id = account.submit("print('hello')")
        account.until(job_id, "SUCCEEDED")

        async def notebook() -> list[str]:
            return [line.message for line in monitor.logs(monitor.jobs()[0].id)]

        assert asyncio.run(notebook()) == ["hello"]

    def test_closing_leaves_no_thread_and_may_be_repeated(self, account: Account) -> None:
        before = set(threading.enumerate())
        monitor = Monitor()
        lines = monitor.logs(account.submit(SLEEP), follow=True)
        assert next(lines).message == "up"
        monitor.close()
        monitor.close()
        assert not {each for each in threading.enumerate() if "monitor" in each.name} - before
        with pytest.raises(RuntimeError, match="closed"):
            monitor.jobs()
        lines.close()

    def test_one_that_is_dropped_closes_itself(self, account: Account) -> None:
        Monitor().jobs()
        eventually(
            lambda: not any(each.name == "cloudexec-monitor" for each in threading.enumerate())
        )

    def test_expired_credentials_are_said_to_be_that(
        self, account: Account, monitor: Monitor
    ) -> None:
        account.aws.faults.expire_credentials()
        with pytest.raises(AwsError) as caught:
            monitor.jobs()
        assert caught.value.expired

    def test_throttled_calls_are_made_again(self, account: Account, monitor: Monitor) -> None:
        account.aws.faults.throttle("ListJobs", count=2)
        assert monitor.jobs() == []
