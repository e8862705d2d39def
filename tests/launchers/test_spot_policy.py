"""``spot="prefer"``: when workers that wait for spare capacity run on demand instead."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launcher_helpers import eventually, unfinished
from launcher_tasks import queue_of_worker, slow_queue_of_worker

from cloudexec import Batch, BatchExecutor, ConfigError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.prices import PriceTable
from cloudexec._enrolment import python_version
from cloudexec._launchers import spot as spot_module
from cloudexec._launchers.batch import platform as batch_platform
from cloudexec._launchers.batch.platform import BatchPlatform
from cloudexec._launchers.ledger import Job, Ledger, Member
from cloudexec._launchers.spot import SpotPolicy
from cloudexec._pricing import WorkerPrice
from cloudexec.aws import Profile
from cloudexec.launchers import ExecutorInfo, Phase
from cloudexec.testing import FakeAWS

DRY = (
    "CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY - All compute environments have insufficient capacity "
    "to service the job."
)


def policy(compute: str, ledger: Ledger, launch_timeout: float) -> SpotPolicy:
    executor = ExecutorInfo(id="0123456789abcdef", launch_timeout=launch_timeout)
    profile = Profile(name="", region="us-east-1")
    platform = BatchPlatform(
        Batch(profile="default", compute=compute, spot="prefer"),
        executor,
        AwsClients("us-east-1"),
        profile,
        PriceTable.built_in(),
    )
    return SpotPolicy(ledger, platform, "prefer", launch_timeout)


def job_of(workers: int, placed: int = 0, reason: str = "") -> Job:
    """A Spot job that was asked for at the time 0, and of which some workers have a place."""
    return Job(
        first=1,
        name="job",
        spot=True,
        size=0,
        price=WorkerPrice(per_second=0.0),
        members={str(1 + n): Member(n, lambda *_: None) for n in range(workers)},
        asked_at=0.0,
        id="job",
        counts={Phase.WAITING: workers - placed, Phase.STARTING: placed},
        reason=reason,
    )


@pytest.mark.parametrize(
    ("compute", "workers", "launch_timeout", "patience"),
    [
        ("fargate", 1, 300.0, 60.0),
        ("fargate", 100, 300.0, 60.0),
        ("fargate", 2100, 300.0, 160.0),
        ("fargate", 10_000, 300.0, 200.0),
        ("fargate", 1, 30.0, 20.0),
        ("ec2", 1, 900.0, 300.0),
        ("ec2", 1, 300.0, 200.0),
    ],
)
def test_how_long_spare_capacity_is_waited_for(
    compute: str, workers: int, launch_timeout: float, patience: float
) -> None:
    """Instances boot for minutes, and Fargate starts 100 tasks and then 20 a second."""
    ledger = Ledger()
    job = job_of(workers)
    ledger.add(job)
    spot = policy(compute, ledger, launch_timeout)
    assert not spot.waits_in_vain(job, patience - 1.0)
    assert spot.waits_in_vain(job, patience + 1.0)
    assert spot.is_on
    spot.leave(job, patience + 1.0)
    assert not spot.waits_in_vain(job, patience + 2.0), "said once"


def test_a_job_behind_another_one_waits_its_turn() -> None:
    """Fargate's rate is one for all jobs."""
    ledger = Ledger()
    ledger.add(job_of(2000, placed=1500))
    behind = job_of(10)
    behind.first = 2001
    ledger.add(behind)
    spot = policy("fargate", ledger, 300.0)
    assert not spot.waits_in_vain(behind, 150.0)
    assert spot.waits_in_vain(behind, 160.0)


@pytest.mark.parametrize("compute", ["fargate", "ec2"])
def test_what_aws_says_counts_at_once(compute: str) -> None:
    """AWS Batch documents the reason; others are no evidence."""
    ledger = Ledger()
    spot = policy(compute, ledger, 900.0)
    job = job_of(3, reason=DRY)
    ledger.add(job)
    assert spot.waits_in_vain(job, 1.0)
    job.reason = "MISCONFIGURATION:JOB_RESOURCE_REQUIREMENT - x"
    assert not spot.waits_in_vain(job, 1.0)
    job.reason, job.counts = DRY, {Phase.STARTING: 3}
    assert not spot.waits_in_vain(job, 1.0), "nobody waits"


@pytest.mark.parametrize(("workers", "reclaims"), [(1, 3), (9, 3), (10, 4), (300, 100)])
def test_reclaims_in_a_row_end_spot_for_an_hour(
    monkeypatch: pytest.MonkeyPatch, workers: int, reclaims: int
) -> None:
    """A quarter of all, or three: over days, a few of them are usual."""
    now = 1000.0
    monkeypatch.setattr(spot_module, "time", SimpleNamespace(monotonic=lambda: now))
    ledger = Ledger()
    job = job_of(workers)
    ledger.add(job)
    spot = policy("fargate", ledger, 300.0)
    for _ in range(reclaims - 1):
        spot.note_reclaim(job)
        now += 1.0
        assert spot.is_on
    spot.note_reclaim(job)
    assert not spot.is_on
    now = 1000.0 + 3600.5
    assert spot.is_on, "the first one does not count any more"


# With workers.


def save_profile(aws: Any, *, compute: str = "fargate", spot_vcpus: int = 8) -> Profile:
    """A profile with an on-demand queue and a Spot queue of one kind of compute environment."""
    kinds = (("FARGATE",), ("FARGATE_SPOT",)) if compute == "fargate" else (("EC2",), ("SPOT",))
    plain = aws.set_up("plain", kinds=kinds[0], max_vcpus=8)
    spot = aws.set_up("spot", kinds=kinds[1], max_vcpus=spot_vcpus)
    profile = Profile(
        name="default",
        region=aws.region,
        queues={compute: plain.queue, f"{compute}_spot": spot.queue},
        job_role=plain.job_role,
        execution_role=plain.execution_role,
    ).with_image(python_version(), "linux/amd64", "example.com/worker:1")
    profile.save()
    return profile


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))


def queues(aws: Any) -> list[str]:
    """The queues of all submissions, in order."""
    return [
        request.parameters["jobQueue"].rpartition("/")[2]
        for request in aws.requests
        if request.operation == "SubmitJob" and request.status == 200
    ]


def test_an_instance_that_boots_is_waited_for(configured: None) -> None:
    """A job that waits for it is no evidence that there is no Spot capacity."""
    with FakeAWS(grace=2.0, calls_per_second=1000, boot=6.0) as aws:
        save_profile(aws, compute="ec2")
        batch = Batch(compute="ec2", spot="prefer")
        with BatchExecutor(2, launcher=batch, launch_timeout=15.0) as executor:
            assert executor.submit(queue_of_worker).result(60) == "spot"
        assert set(queues(aws)) == {"spot"}
        eventually(lambda: not unfinished(aws))


def test_capacity_that_aws_says_it_lacks_is_bought_on_demand(aws: Any, configured: None) -> None:
    """Without waiting as long as for capacity of which AWS says nothing."""
    profile = save_profile(aws)
    aws.faults.no_capacity(profile.queues["fargate_spot"])
    with BatchExecutor(3, launcher=Batch(spot="prefer"), launch_timeout=600.0) as executor:
        assert list(executor.map(queue_of_worker, range(3), timeout=30)) == ["plain"] * 3
    assert queues(aws) == ["spot", "plain"]
    eventually(lambda: not unfinished(aws))


def test_workers_that_have_a_place_keep_it(
    configured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While their image is pulled, they are paid for: only the others run on demand."""
    monkeypatch.setattr(batch_platform, "_FARGATE_SPOT_PATIENCE", 2.0)
    with FakeAWS(grace=2.0, calls_per_second=1000, launch_rate=(2, 0.001)) as aws:
        save_profile(aws)
        aws.faults.slow_start(6.0)
        with BatchExecutor(4, launcher=Batch(spot="prefer"), min_workers=4) as executor:
            eventually(lambda: executor.stats().workers.slots == 4)
        eventually(lambda: not unfinished(aws))
        workers = [job for job in aws.jobs() if not job.size]
    assert sorted((job.queue, job.status) for job in workers) == [
        ("plain", "SUCCEEDED"),
        ("plain", "SUCCEEDED"),
        ("spot", "FAILED"),
        ("spot", "FAILED"),
        ("spot", "SUCCEEDED"),
        ("spot", "SUCCEEDED"),
    ]


def test_workers_wait_on_while_others_of_theirs_use_what_is_allowed(
    aws: Any, configured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is Spot capacity: ``--max-vcpus`` limits how much of it is used."""
    monkeypatch.setattr(batch_platform, "_FARGATE_SPOT_PATIENCE", 1.0)
    save_profile(aws, spot_vcpus=2)
    with BatchExecutor(4, launcher=Batch(spot="prefer")) as executor:
        found = list(executor.map(slow_queue_of_worker, [1.0] * 12))
    assert found == ["spot"] * 12
    assert queues(aws) == ["spot"]
    eventually(lambda: not unfinished(aws))


def test_a_size_that_finds_no_room_beside_smaller_workers_runs_on_demand(
    aws: Any, configured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of that size cannot run on the workers that use what is allowed."""
    monkeypatch.setattr(batch_platform, "_FARGATE_SPOT_PATIENCE", 1.0)
    save_profile(aws, spot_vcpus=1)
    sizes = Batch(spot="prefer", memory=("2GiB", "4GiB"))
    with BatchExecutor(2, launcher=sizes, launch_timeout=20) as executor:
        small = executor.submit(slow_queue_of_worker, 15.0)
        eventually(lambda: executor.stats().workers.slots == 1)
        large = executor.with_options(memory="3GiB").submit(queue_of_worker)
        assert large.result(60) == "plain"
        assert not small.done()
        small.cancel(running=True)
    eventually(lambda: not unfinished(aws))


def test_preferring_spot_needs_two_queues() -> None:
    """One queue of one's own would be left for itself."""
    with pytest.raises(ConfigError, match=r"spot='prefer' needs two queues.*profile="):
        Batch(queue="mine", spot="prefer")
