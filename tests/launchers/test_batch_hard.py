"""The Batch launcher where everything goes wrong at once: faults during faults, and the end."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import boto3
import pytest
from launcher_helpers import eventually, unfinished
from launcher_tasks import job_id_of_worker, slow_square, square

from cloudexec import Batch, BatchExecutor, ConfigError, LaunchError, WorkerLostError
from cloudexec.aws import Profile
from cloudexec.testing import FakeAWS

Make = Callable[..., Batch]


def requests(aws: Any, operation: str, status: int = 200) -> list[dict[str, Any]]:
    found = aws.requests
    return [r.parameters for r in found if r.operation == operation and r.status == status]


def test_a_second_executor_does_no_harm_to_the_first(aws: Any, launcher: Make) -> None:
    """A launcher serves one at a time: the other one is refused, and the first works on."""
    batch = launcher()
    with BatchExecutor(2, launcher=batch) as first:
        futures = [first.submit(slow_square, n, 0.1) for n in range(10)]
        eventually(lambda: first.stats().workers.slots == 2)
        with pytest.raises(LaunchError, match="make one for each"):
            BatchExecutor(2, launcher=batch).submit(square, 1)
        assert [f.result(timeout=30) for f in futures] == [n * n for n in range(10)]
        assert first.stats().workers.launched == 2
    assert not requests(aws, "TerminateJob")


@pytest.mark.alone
def test_thousands_that_wait_end_with_the_executor(launcher_factory: Callable[[Any], Make]) -> None:
    """One request ends them all, at fifty calls a second too."""
    with FakeAWS(calls_per_second=50) as aws:
        batch = launcher_factory(aws)()
        aws.faults.no_capacity()
        executor = BatchExecutor(10_000, launcher=batch)
        executor.map(square, range(10_000))
        eventually(lambda: len(aws.jobs()) == 10_001)
        (request,) = requests(aws, "SubmitJob")
        assert request["arrayProperties"] == {"size": 10_000}
        began = time.monotonic()
        executor.shutdown(cancel_futures=True)
        assert time.monotonic() - began < 5
        eventually(lambda: not unfinished(aws), timeout=5.0)
        assert len(requests(aws, "TerminateJob")) == 1


def test_twenty_thousand_workers_are_two_jobs(aws: Any, launcher: Make) -> None:
    """An array has 10,000 at most; the numbers of the second begin where the first's end."""
    batch = launcher()
    aws.faults.no_capacity()
    executor = BatchExecutor(20_000, launcher=batch)
    executor.map(square, range(20_000))
    eventually(lambda: len(requests(aws, "SubmitJob")) == 2)
    executor.shutdown(cancel_futures=True)
    submitted = requests(aws, "SubmitJob")
    assert [each["arrayProperties"]["size"] for each in submitted] == [10_000, 10_000]
    firsts = {
        variable["value"]
        for each in submitted
        for variable in each["containerOverrides"]["environment"]
        if variable["name"] == "CLOUDEXEC_LAUNCH"
    }
    assert firsts == {"1", "10001"}
    eventually(lambda: not unfinished(aws))


def test_a_job_whose_answer_was_lost_ends_with_the_executor(aws: Any, launcher: Make) -> None:
    """It is there, although nobody was told: it is looked for, and terminated."""
    batch = launcher()
    aws.faults.no_capacity()
    aws.faults.lose_response("SubmitJob")
    executor = BatchExecutor(3, launcher=batch)
    executor.map(square, range(3))
    eventually(lambda: aws.jobs())
    executor.shutdown(cancel_futures=True)
    eventually(lambda: not unfinished(aws), timeout=5.0)


@pytest.mark.parametrize(
    "operation", ["DescribeJobDefinitions", "RegisterJobDefinition", "DescribeJobs", "TerminateJob"]
)
def test_an_answer_may_be_lost_anywhere(aws: Any, launcher: Make, operation: str) -> None:
    """The work is done, by one job, and nothing is left."""
    batch = launcher(max_vcpus=1)
    aws.faults.lose_response(operation)
    with BatchExecutor(2, launcher=batch) as executor:
        assert sum(executor.map(square, range(50))) == sum(n * n for n in range(50))
    assert len(requests(aws, "SubmitJob")) == 1
    eventually(lambda: not unfinished(aws))


def test_pulls_that_fail_at_first_are_waited_for(aws: Any, launcher: Make) -> None:
    """AWS tries them again, and so nobody gives up."""
    batch = launcher()
    aws.faults.slow_start(1.5)
    aws.faults.image_pull_fails(count=3)
    with BatchExecutor(3, launcher=batch) as executor:
        assert list(executor.map(square, range(30), timeout=30)) == [n * n for n in range(30)]
        eventually(lambda: executor.stats().workers.slots == 3)
        assert executor.stats().workers.launched == 3
    eventually(lambda: not unfinished(aws))


@pytest.mark.parametrize("compute", ["fargate", "ec2"])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_registry_that_is_busy_for_longer_is_waited_for(
    aws: Any, launcher: Make, compute: str, workers: int
) -> None:
    """All attempts of AWS fail, of all workers at once: they are launched anew, and nobody fails.

    On Fargate the reason is in another field than on EC2.
    """
    kinds = ("FARGATE",) if compute == "fargate" else ("EC2",)
    batch = launcher(compute=compute, kinds=kinds)
    aws.faults.image_pull_fails(count=3 * workers, why="429 Too Many Requests")
    with BatchExecutor(workers, launcher=batch) as executor:
        futures = [executor.submit(square, n) for n in range(3 * workers)]
        assert [future.result(60) for future in futures] == [n * n for n in range(3 * workers)]
    # Without those that were ended as no task was left for them.
    failed = [job for job in aws.jobs() if job.status == "FAILED" and job.attempts]
    refused = [job for job in failed if not (job.status_reason or "").startswith("cloudexec: ")]
    assert [len(job.attempts) for job in refused] == [3] * workers
    assert len(requests(aws, "SubmitJob")) == 2
    eventually(lambda: not unfinished(aws))


@pytest.mark.parametrize(
    "text", ["context deadline exceeded", "dial tcp 10.0.0.1:443: i/o timeout"]
)
def test_one_slow_start_does_not_end_a_run_with_one_worker(
    aws: Any, launcher: Make, text: str
) -> None:
    """AWS tries it again, since the rules fit where Fargate has the reason."""
    batch = launcher()
    aws.faults.start_fails(f"ResourceInitializationError: unable to pull: {text}", count=1)
    with BatchExecutor(1, launcher=batch) as executor:
        assert executor.submit(square, 3).result(60) == 9
    eventually(lambda: not unfinished(aws))
    (job,) = aws.jobs()
    assert len(job.attempts) == 2
    assert len(requests(aws, "SubmitJob")) == 1


def test_all_workers_are_reclaimed_twice(aws: Any, launcher: Make) -> None:
    """Nothing is lost, and no attempt is counted."""
    batch = launcher(spot=True, environment={"CLOUDEXEC_DRAIN_GRACE": "0.3"})
    with BatchExecutor(3, launcher=batch, retries=1) as executor:
        futures = [executor.submit(slow_square, n) for n in range(120)]
        for wave in (1, 2):
            eventually(lambda: executor.stats().workers.slots == 3)
            aws.faults.reclaim_fraction(1.0)
            least = 3 * wave
            eventually(lambda: executor.stats().workers.reclaimed >= least)  # noqa: B023
        assert [f.result(timeout=30) for f in futures] == [n * n for n in range(120)]
        assert executor.stats().lost_attempts == 0
    assert len(requests(aws, "SubmitJob")) == 1
    eventually(lambda: not unfinished(aws))


def test_several_machines_die_at_once(aws: Any, launcher: Make) -> None:
    """Without retries only what ran there fails, and says so; the rest is done."""
    with BatchExecutor(4, launcher=launcher(), retries=0) as executor:
        assert sum(executor.map(slow_square, range(8))) == 140
        futures = [executor.submit(slow_square, n, 0.2) for n in range(20)]
        eventually(lambda: executor.stats().tasks.running == 4)
        alive = [job for job in aws.jobs() if job.status == "RUNNING" and job.parent]
        for job in alive[:3]:
            aws.faults.kill_instance(job.job_id)
        lost = [f for f in futures if f.exception(timeout=30) is not None]
        assert 1 <= len(lost) <= 3
        for future in lost:
            assert isinstance(future.exception(), WorkerLostError)
            # AWS's words, or what the worker's second start says where that is heard first.
            assert re.search("Host EC2|machine was taken back", str(future.exception()))
    eventually(lambda: not unfinished(aws))


@pytest.mark.parametrize("retries", [0, 2])
def test_a_container_that_runs_out_of_memory(aws: Any, launcher: Make, retries: int) -> None:
    """With retries the task climbs; without, it fails and the error says why."""
    batch = launcher(vcpus=0.25, memory=("512MiB", "1GiB"))
    with BatchExecutor(1, launcher=batch, retries=retries) as executor:
        assert executor.submit(square, 2).result() == 4
        future = executor.submit(slow_square, 3, 2.0)
        eventually(lambda: executor.stats().tasks.running == 1)
        (job,) = [each for each in aws.jobs() if each.status == "RUNNING"]
        aws.faults.out_of_memory(job.job_id)
        if retries:
            assert future.result(timeout=30) == 9
        else:
            with pytest.raises(WorkerLostError, match="memory") as caught:
                future.result(timeout=30)
            assert caught.value.out_of_memory
            assert "memory=('512MiB', '1GiB')" in str(caught.value)
    sizes = [
        each["containerOverrides"]["resourceRequirements"][1]["value"]
        for each in requests(aws, "SubmitJob")
    ]
    assert sizes == (["512", "1024"] if retries else ["512"])


@pytest.mark.parametrize("code", [0, 1, 3])
def test_workers_that_end_at_once(tmp_path: Path, code: int) -> None:
    """An image that is none of ours: a typed error soon, not a loop of launches."""
    image = tmp_path / "image"
    image.write_text(f"#!/bin/sh\nexit {code}\n")
    image.chmod(0o755)
    with FakeAWS(grace=1.0, calls_per_second=1000, images={"bad*": str(image)}) as aws:
        made = aws.set_up("queue", spot=False, max_vcpus=16)
        batch = Batch(
            queue=made.queue, execution_role=made.execution_role, region=aws.region, image="bad:1"
        )
        with BatchExecutor(10, launcher=batch) as executor:
            futures = [executor.submit(square, n) for n in range(20)]
            errors = [future.exception(timeout=30) for future in futures]
        assert all(isinstance(error, LaunchError) for error in errors)
        assert "(exit code 3)" in str(errors[0]) if code == 3 else f"code {code}" in str(errors[0])
        assert len(requests(aws, "SubmitJob")) <= 3
        eventually(lambda: not unfinished(aws))


def test_half_of_the_workers_do_all_of_the_work(aws: Any, launcher: Make, tmp_path: Path) -> None:
    """Those that never come are given up; what runs is not disturbed."""
    batch, gate = launcher(max_vcpus=2), tmp_path / "gate"

    def square_behind_gate(number: int) -> int:
        while not gate.exists():
            time.sleep(0.02)
        return number * number

    for patience in (2.0, 20.0):  # on a busy machine none may come in a short time
        with BatchExecutor(4, launcher=batch, launch_timeout=patience) as executor:
            futures = [executor.submit(square_behind_gate, n) for n in range(24)]
            while executor.stats().launch_failures < 2 or not executor.stats().tasks.running:
                if wait(futures[:1], 0.02).done:
                    break
            if futures[0].done():
                assert isinstance(futures[0].exception(), LaunchError)
                continue
            gate.touch()
            assert [future.result(50) for future in futures] == [n * n for n in range(24)]
            stats = executor.stats()
            break
    assert (stats.workers.lost, stats.tasks.failed) == (0, 0)
    eventually(lambda: not unfinished(aws))


def test_scale_in_and_out_again(aws: Any, launcher: Make) -> None:
    """Idle workers end, and cost nothing; the next burst has new ones."""
    with BatchExecutor(2, launcher=launcher(), idle_timeout=0.3) as executor:
        for _ in range(2):
            assert sum(executor.map(slow_square, range(6))) == 55
            eventually(lambda: executor.stats().workers.slots == 0)
            eventually(lambda: not unfinished(aws))
            assert executor.cost().per_hour_usd == 0
        launches = executor.stats().launches
    assert len(launches) == 4
    assert len({each.job_id for each in launches}) == 4


def test_spot_that_does_not_come_is_bought_on_demand(
    aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``spot="prefer"`` waits for spare capacity for a while only."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
    plain = aws.set_up("plain", spot=False, max_vcpus=8)
    spot = aws.set_up("spot", spot=True, max_vcpus=8)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    Profile(
        name="default",
        region=aws.region,
        queues={"fargate": plain.queue, "fargate_spot": spot.queue},
        execution_role=plain.execution_role,
    ).with_image(version, "linux/amd64", "example.com/worker:1").save()
    aws.faults.no_capacity(spot.compute_environments[0], silent=True)
    with BatchExecutor(3, launcher=Batch(spot="prefer"), launch_timeout=6.0) as executor:
        assert list(executor.map(square, range(6), timeout=30)) == [0, 1, 4, 9, 16, 25]
    queues = [each["jobQueue"] for each in requests(aws, "SubmitJob")]
    assert queues == [spot.queue, plain.queue]
    eventually(lambda: not unfinished(aws))


def test_a_worker_is_replaced_after_its_tasks(aws: Any, launcher: Make) -> None:
    """``max_tasks_per_worker`` holds for containers."""
    with BatchExecutor(1, launcher=launcher(), max_tasks_per_worker=5) as executor:
        pids = list(executor.map(job_id_of_worker, range(15)))
    assert len(set(pids)) == 3
    eventually(lambda: not unfinished(aws))


def test_an_existing_definition_is_used_as_it_is(aws: Any, launcher: Make) -> None:
    """Nothing is registered."""
    batch = launcher()
    boto3.client("batch").register_job_definition(
        jobDefinitionName="mine",
        type="container",
        platformCapabilities=["FARGATE"],
        containerProperties={
            "image": "example.com/worker:1",
            "executionRoleArn": batch.execution_role,
            "resourceRequirements": [
                {"type": "VCPU", "value": "1"},
                {"type": "MEMORY", "value": "2048"},
            ],
        },
    )
    aws.clear_requests()
    batch.definition = "mine"
    with BatchExecutor(2, launcher=batch) as executor:
        assert list(executor.map(square, range(5))) == [0, 1, 4, 9, 16]
    assert not requests(aws, "RegisterJobDefinition")
    (request,) = requests(aws, "SubmitJob")
    assert (
        request["jobDefinition"].startswith("mine")
        or ":job-definition/mine" in (request["jobDefinition"])
    )


def test_a_definition_that_was_removed_is_refused(aws: Any, launcher: Make) -> None:
    """Before anything is submitted with it."""
    client = boto3.client("batch", region_name=aws.region)
    arn = client.register_job_definition(
        jobDefinitionName="mine",
        type="container",
        containerProperties={
            "image": "x",
            "resourceRequirements": [
                {"type": "VCPU", "value": "1"},
                {"type": "MEMORY", "value": "1024"},
            ],
        },
    )["jobDefinitionArn"]
    client.deregister_job_definition(jobDefinition=arn)
    executor = BatchExecutor(1, launcher=launcher(definition=arn))
    with pytest.raises(ConfigError, match="has been deregistered"):
        executor.submit(square, 1)
    executor.shutdown()
    assert not requests(aws, "SubmitJob")


def test_a_definition_with_ecs_properties_is_refused(aws: Any, launcher: Make) -> None:
    """What is said when a job is submitted does not reach its containers."""
    client = boto3.client("batch", region_name=aws.region)
    arn = client.register_job_definition(
        jobDefinitionName="theirs",
        type="container",
        ecsProperties={
            "taskProperties": [
                {
                    "containers": [
                        {
                            "image": "x",
                            "resourceRequirements": [
                                {"type": "VCPU", "value": "1"},
                                {"type": "MEMORY", "value": "2048"},
                            ],
                        }
                    ]
                }
            ]
        },
    )["jobDefinitionArn"]
    executor = BatchExecutor(1, launcher=launcher(definition=arn))
    with pytest.raises(ConfigError, match=r"has ecsProperties.*leave definition= out"):
        executor.submit(square, 1)
    executor.shutdown()
    assert not requests(aws, "SubmitJob")


def test_a_queue_says_in_which_region_it_is(aws: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else does; and a contradiction is found at once."""
    made = aws.set_up("queue")
    roles = {"job_role": made.job_role, "execution_role": made.execution_role, "image": "x"}
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.delenv("AWS_REGION")
    with BatchExecutor(1, launcher=Batch(queue=made.queue, **roles)) as executor:
        assert executor.submit(square, 3).result() == 9
    executor = BatchExecutor(1, launcher=Batch(queue=made.queue, region="eu-west-1", **roles))
    with pytest.raises(ConfigError, match=r"is in us-east-1, and not in eu-west-1"):
        executor.submit(square, 1)
    executor.shutdown()


@pytest.mark.parametrize("spot", [False, True])
def test_workers_on_instances(aws: Any, launcher: Make, spot: bool) -> None:
    """EC2 has sizes of its own; slots follow the vCPUs."""
    kinds = ("SPOT",) if spot else ("EC2",)
    batch = launcher(kinds=kinds, compute="ec2", vcpus=2, memory="3GiB", spot=spot)
    with BatchExecutor(4, launcher=batch) as executor:
        assert list(executor.map(square, range(5))) == [0, 1, 4, 9, 16]
        eventually(lambda: executor.stats().workers.slots == 4)
    (definition,) = requests(aws, "RegisterJobDefinition")
    assert definition["platformCapabilities"] == ["EC2"]
    assert "networkConfiguration" not in definition["containerProperties"]
    (request,) = requests(aws, "SubmitJob")
    assert request["arrayProperties"] == {"size": 2}


def test_the_stacks_key_is_in_no_request_process_list_or_repr(
    aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes from the secret to the worker, past everything that can be read."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("CLOUDEXEC_PROFILE", "default")
    key = os.urandom(32).hex()
    made = aws.set_up("queue", spot=False, max_vcpus=4)
    secret = boto3.client("secretsmanager").create_secret(Name="key", SecretString=key)["ARN"]
    profile = Profile(
        name="default",
        region=aws.region,
        queues={"fargate": made.queue},
        job_role=made.job_role,
        execution_role=made.execution_role,
        key_secret=secret,
        project="Größe* <x>\n",
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    profile.with_image(version, "linux/amd64", "example.com/worker:1").save()
    aws.clear_requests()
    with BatchExecutor(2) as executor:
        assert list(executor.map(square, range(20))) == [n * n for n in range(20)]
        lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if alive(path)]
        texts = [repr(executor), repr(executor._launcher), str(executor.stats())]
    assert not [line for line in lines if key.encode() in line]
    texts += [json.dumps(r.parameters, default=str) for r in aws.requests]
    texts += [line for job in aws.jobs() for line in aws.logs(job.job_id)]
    assert not [text for text in texts if key in text]
    (request,) = requests(aws, "SubmitJob")
    names = [each["name"] for each in request["containerOverrides"]["environment"]]
    assert "CLOUDEXEC_KEY" not in names
    assert request["tags"]["cloudexec:project"] == "Größe_ _x__"


def alive(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


def test_nothing_is_left_of_several_executors(aws: Any, launcher: Make) -> None:
    """Sockets, threads, jobs: one executor after the other on the same launcher."""
    batch = launcher()

    def run() -> None:
        with BatchExecutor(2, launcher=batch) as executor:
            assert sum(executor.map(square, range(20))) == 2470

    run()  # what is kept for good is made now
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(2):
        run()
    eventually(lambda: not unfinished(aws))
    eventually(
        lambda: (len(os.listdir("/proc/self/fd")), threading.active_count()) <= before, timeout=5.0
    )
