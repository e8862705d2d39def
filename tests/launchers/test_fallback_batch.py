"""``Fallback`` over AWS Batch: two regions of an emulated account, and this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from launcher_helpers import eventually, unfinished
from launcher_tasks import queue_of_worker

from cloudexec import Batch, BatchExecutor, Fallback, LaunchError, Local
from cloudexec._launchers.batch import platform as batch_platform
from cloudexec.testing import FakeAWS

HOME, ABROAD = "us-east-1", "eu-west-1"


@pytest.fixture
def aws() -> Iterator[Any]:
    with FakeAWS(grace=2.0, calls_per_second=1000) as fake:
        yield fake


def batch(aws: Any, region: str, **settings: Any) -> Batch:
    """A launcher with a queue of its own in a region."""
    spot = bool(settings.get("spot"))
    aws.region, before = region, aws.region
    try:
        made = aws.set_up("spot" if spot else "plain", spot=spot, max_vcpus=4)
    finally:
        aws.region = before
    return Batch(
        queue=made.queue,
        job_role=made.job_role,
        execution_role=made.execution_role,
        image="example.com/worker:1",
        region=region,
        **settings,
    )


def regions(aws: Any, launcher: Fallback, workers: int = 2) -> list[str]:
    """Have workers and run tasks, and return the region of each submission that AWS took."""
    with BatchExecutor(workers, launcher=launcher, min_workers=workers) as executor:
        assert len(list(executor.map(queue_of_worker, range(workers), timeout=100))) == workers
        eventually(lambda: executor.stats().workers.slots == workers)
    eventually(lambda: not unfinished(aws))
    return [
        request.parameters["jobQueue"].split(":")[3]
        for request in aws.requests
        if request.operation == "SubmitJob" and request.status == 200
    ]


def both(aws: Any, **settings: Any) -> tuple[Batch, Batch]:
    return batch(aws, HOME, **settings), batch(aws, ABROAD)


def test_the_first_region_is_used_while_it_has_capacity(aws: Any) -> None:
    assert set(regions(aws, Fallback(both(aws)))) == {HOME}


@pytest.mark.parametrize("spot", [False, True])
def test_no_capacity_in_one_region_moves_workers_to_another_one(aws: Any, spot: bool) -> None:
    """On demand, or as Spot runs dry."""
    home, abroad = both(aws, spot=spot)
    aws.faults.no_capacity(home.queue)
    fallback = Fallback({"home": home, "abroad": abroad})
    assert regions(aws, fallback) == [HOME, ABROAD]
    counts = {each.launcher: each for each in fallback.counts()}
    assert "CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY" in counts["home"].why
    assert (counts["home"].passed_on, counts["abroad"].connected) == (2, 2)
    assert counts["abroad"].cost_usd > counts["home"].cost_usd == 0.0


def test_capacity_of_which_aws_says_nothing_is_waited_for_only_a_while(
    aws: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_platform, "_FARGATE_SPOT_PATIENCE", 2.0)
    home, abroad = both(aws)
    aws.faults.no_capacity(home.queue, silent=True)
    assert regions(aws, Fallback([home, abroad])) == [HOME, ABROAD]


def test_what_the_account_may_not_run_in_one_region_runs_in_another_one(aws: Any) -> None:
    """The queue allows 4 vCPUs; the other two workers do not wait for them."""
    home, abroad = both(aws)
    with BatchExecutor(6, launcher=Fallback([home, abroad]), min_workers=6) as executor:
        eventually(lambda: executor.stats().workers.slots == 6)
        assert [each.active for each in executor.stats().launchers] == [4, 2]
        assert "4 vCPUs in all" in executor.stats().launchers[0].why
    eventually(lambda: not unfinished(aws))


@pytest.mark.parametrize("fault", ["denied", "throttled"])
def test_an_api_that_fails_moves_workers_to_another_launcher(aws: Any, fault: str) -> None:
    """Here to this machine, as all regions share the fault."""
    home = batch(aws, HOME)
    if fault == "denied":
        aws.faults.deny("SubmitJob")
    else:
        aws.faults.throttle("SubmitJob", 1000)
    with BatchExecutor(2, launcher=Fallback([home, Local()])) as executor:
        assert list(executor.map(abs, [-1, -2], timeout=90)) == [1, 2]
        aws_counts, local_counts = executor.stats().launchers
        assert aws_counts.why
        assert local_counts.connected
        aws.faults.clear()
    eventually(lambda: not unfinished(aws))


def test_a_region_that_cannot_be_used_is_left_out(aws: Any) -> None:
    """And if none can, one error names each cause."""
    home, abroad = both(aws)
    missing = Batch(profile="there-is-none")
    assert set(regions(aws, Fallback([missing, abroad]))) == {ABROAD}
    with pytest.raises(
        LaunchError, match=r"no launcher can be used: .*there-is-none.*; .*nor-this"
    ):
        BatchExecutor(1, launcher=Fallback([missing, Batch(profile="nor-this")])).submit(abs, -1)
    assert home.region == HOME
