"""Tasks that need more than the usual worker has, on an emulated AWS Batch with real workers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import pytest
from launcher_helpers import eventually, unfinished
from launcher_tasks import size_of_worker, square, take_memory

from cloudexec import Batch, BatchExecutor, ConfigError, LaunchError, WorkerLostError, run, stage
from cloudexec._aws.prices import PriceTable

Make = Callable[..., Batch]
pytestmark = pytest.mark.timeout(120)


def submitted(aws: Any) -> list[tuple[str, str, int]]:
    """Return vCPUs, MiB and workers of each job that was submitted, in order."""
    found = []
    for request in aws.requests:
        if request.operation == "SubmitJob" and request.status == 200:
            needs = {
                each["type"]: each["value"]
                for each in request.parameters["containerOverrides"]["resourceRequirements"]
            }
            workers = request.parameters.get("arrayProperties", {}).get("size", 1)
            found.append((needs["VCPU"], needs["MEMORY"], workers))
    return found


@pytest.mark.parametrize(
    ("settings", "needs", "words"),
    [
        ({}, {"cpus": 64}, "32 vCPU with 244 GiB"),
        ({}, {"memory": "1TiB"}, "32 vCPU with 244 GiB"),
        ({}, {"gpus": 1}, "Fargate, which has no GPUs: Batch(compute='ec2') has them"),
        ({"compute": "ec2"}, {"cpus": 5000}, "1920 vCPUs"),
        ({"compute": "ec2"}, {"gpus": 17}, "16 GPUs"),
    ],
)
def test_what_no_worker_has_is_refused_with_the_nearest(
    settings: dict[str, Any], needs: dict[str, Any], words: str
) -> None:
    executor = BatchExecutor(1, launcher=Batch(queue="q", **settings))
    with pytest.raises(ConfigError) as caught:
        executor.with_options(**needs)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "needs", "size"),
    [
        ({}, {"cpus": 1}, "1 vCPU with 2 GiB"),
        ({}, {"cpus": 0.25}, "1 vCPU with 2 GiB"),
        ({}, {"cpus": 2}, "2 vCPU with 4 GiB"),
        ({}, {"cpus": 3}, "4 vCPU with 8 GiB"),
        ({}, {"memory": "3GiB"}, "1 vCPU with 3 GiB"),
        ({}, {"memory": "9GiB"}, "2 vCPU with 9 GiB"),
        ({}, {"cpus": 1, "memory": "100GiB"}, "16 vCPU with 104 GiB"),
        ({"memory": ("4GiB", "8GiB")}, {"memory": "6GiB"}, "1 vCPU with 8 GiB"),
        ({"vcpus": 4, "memory": "16GiB"}, {"cpus": 3}, "4 vCPU with 16 GiB"),
        ({"compute": "ec2"}, {"cpus": 2.5, "memory": "3GiB"}, "3 vCPU with 3 GiB"),
        (
            {"compute": "ec2", "memory": "4GiB"},
            {"gpus": 2},
            "1 vCPU with 4 GiB and 2 GPUs",
        ),
    ],
)
def test_a_task_goes_to_the_smallest_size_that_will_do(
    settings: dict[str, Any], needs: dict[str, Any], size: str
) -> None:
    batch = Batch(queue="q", **settings)
    view = BatchExecutor(4, launcher=batch).with_options(**needs)
    assert view._requirements is not None
    assert batch.size_name(view._requirements.requests[0].size) == size


def test_sizes_are_found_in_many_threads_at_once() -> None:
    """And each is there once."""
    batch = Batch(queue="q")
    executor = BatchExecutor(1, launcher=batch)
    found: list[tuple[float, int]] = []

    def ask() -> None:
        for cpus in (2, 4, 8, 16):
            view = executor.with_options(cpus=cpus)
            assert view._requirements is not None
            found.append((cpus, view._requirements.requests[0].size))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 4
    assert {batch.size_of(size).vcpus for _, size in found} == {2, 4, 8, 16}


def test_workers_are_launched_in_the_sizes_that_the_queue_needs(aws: Any, launcher: Make) -> None:
    with BatchExecutor(4, launcher=launcher()) as executor:
        large = executor.with_options(cpus=2, memory="5GiB")
        futures = [large.submit(square, n) for n in range(4)]
        futures += [executor.submit(square, n) for n in range(4)]
        assert [future.result(60) for future in futures] == [0, 1, 4, 9] * 2
        names = {size.size for size in executor.stats().sizes}
        assert "2 vCPU with 5 GiB" in names
    sizes = {(vcpus, memory) for vcpus, memory, _ in submitted(aws)}
    assert ("2", "5120") in sizes
    eventually(lambda: not unfinished(aws))


def test_large_tasks_pack_into_large_workers(aws: Any, launcher: Make) -> None:
    """Two to a worker of four vCPUs, where each needs one and a half."""
    batch = launcher(vcpus=4, memory="8GiB", slots_per_worker=4)
    with BatchExecutor(4, launcher=batch) as executor:
        packed = executor.with_options(cpus=1.5, memory="1GiB")
        futures = [packed.submit(take_memory, 1, 1.0) for _ in range(4)]
        eventually(lambda: executor.stats().tasks.running == 4)
        busy = [size for size in executor.stats().sizes if size.running]
        assert [(size.size, size.connected) for size in busy] == [("4 vCPU with 8 GiB", 2)]
        for future in futures:
            future.result(60)


def test_small_tasks_pack_into_usual_workers(aws: Any, launcher: Make) -> None:
    """As many as fit, where nobody said how many slots a worker is to have."""
    with BatchExecutor(8, launcher=launcher()) as executor:
        packed = executor.with_options(cpus=0.25, memory="512MiB")
        futures = [packed.submit(take_memory, 1, 1.0) for _ in range(8)]
        eventually(lambda: executor.stats().tasks.running == 8)
        assert executor.stats().workers.busy == 2
        plain = executor.submit(square, 3)  # has a usual slot's share, which is all of a worker
        assert plain.result(60) == 9
        for future in futures:
            future.result(60)
    assert submitted(aws)[0] == ("1", "2048", 2)


def test_each_size_costs_what_it_costs(aws: Any, launcher: Make) -> None:
    prices = PriceTable.built_in()
    small = prices.worker(vcpus=1, memory_mib=2048, public_ip=True)
    large = prices.worker(vcpus=4, memory_mib=8192, public_ip=True)
    executor = BatchExecutor(2, launcher=launcher())
    with executor:
        executor.submit(square, 2).result(60)
        executor.with_options(cpus=4).submit(square, 2).result(60)
        rate = executor.cost().per_hour_usd
        assert any(
            rate == pytest.approx(each)
            for each in (large.per_hour, large.per_hour + small.per_hour)
        )
    least = large.cost(60) + small.cost(60)
    assert executor.cost().accrued_usd == pytest.approx(least, rel=0.3)


def test_the_ceiling_counts_the_size_that_is_launched(aws: Any, launcher: Make) -> None:
    """A minute of the usual size would be within it, one of the large size is not."""
    small = PriceTable.built_in().worker(vcpus=1, memory_mib=2048, public_ip=True)
    ceiling = small.cost(60) * 3
    with BatchExecutor(1, launcher=launcher(), max_cost_usd=ceiling) as executor:
        future = executor.with_options(cpus=8).submit(square, 2)
        assert isinstance(future.exception(60), LaunchError)
    assert submitted(aws) == []


def test_a_large_task_is_not_starved_by_small_ones(aws: Any, launcher: Make) -> None:
    """All workers are of the usual size and at work: one of them makes way."""
    with BatchExecutor(2, launcher=launcher()) as executor:
        small = [executor.submit(take_memory, 1, 0.2) for _ in range(6)]
        eventually(lambda: executor.stats().tasks.running == 2)
        large = executor.with_options(cpus=2).submit(square, 3)
        later = [executor.submit(take_memory, 1, 0.2) for _ in range(200)]
        assert large.result(90) == 9
        assert not all(future.done() for future in later)
        for future in (*small, *later):
            future.cancel()


def test_the_ladder_goes_on_from_what_a_task_asked_for(aws: Any, launcher: Make) -> None:
    """Past it, the task has a whole worker of the next size; no attempt is counted."""
    batch = launcher(vcpus=0.25, memory=("512MiB", "1GiB"))
    with BatchExecutor(1, launcher=batch) as executor:
        asking = executor.with_options(memory="150MiB", retries=1)
        assert asking.submit(take_memory, 300, 0.5).result(90) == 300 * 2**20
    assert [memory for _, memory, _ in submitted(aws)] == ["512", "1024"]


def test_without_a_ladder_it_fails(aws: Any, launcher: Make) -> None:
    with BatchExecutor(1, launcher=launcher(vcpus=0.25, memory="1GiB")) as executor:
        future = executor.with_options(memory="100MiB").submit(take_memory, 300)
        error = future.exception(60)
        assert isinstance(error, WorkerLostError)
        assert error.out_of_memory
        assert "of 100 MiB" in str(error)
        assert executor.submit(square, 2).result(60) == 4


def test_a_task_with_needs_climbs_when_its_worker_is_full(aws: Any, launcher: Make) -> None:
    """It asked for processors only: the container is the limit."""
    batch = launcher(vcpus=0.25, memory=("512MiB", "2GiB"))
    with BatchExecutor(1, launcher=batch) as executor:
        view = executor.with_options(cpus=0.5)
        assert view.submit(take_memory, 1200, 0.5).result(90) == 1200 * 2**20
    assert submitted(aws) == [("0.5", "1024", 1), ("0.5", "2048", 1)]


def test_gpus_are_asked_for(aws: Any, launcher: Make) -> None:
    batch = launcher(kinds=("EC2",), compute="ec2", vcpus=1, memory="1GiB")
    with BatchExecutor(1, launcher=batch) as executor:
        future = executor.with_options(gpus=1).submit(size_of_worker)
        assert future.result(60) == "0"
        rate = executor.cost().per_hour_usd
    (request,) = [r for r in aws.requests if r.operation == "SubmitJob"]
    needs = request.parameters["containerOverrides"]["resourceRequirements"]
    assert {"type": "GPU", "value": "1"} in needs
    assert rate > 0.4, "a whole instance, which has one GPU"


def test_a_large_task_that_waits_for_its_worker_is_cancelled(aws: Any, launcher: Make) -> None:
    with BatchExecutor(2, launcher=launcher(max_vcpus=1), idle_timeout=0.5) as executor:
        large = executor.with_options(cpus=8).submit(square, 2)
        eventually(lambda: submitted(aws))
        assert large.cancel()
        with pytest.raises(CancelledError):
            large.result(0)
        eventually(lambda: not unfinished(aws))
        assert executor.submit(square, 2).result(60) == 4


def test_a_stages_share_of_the_cost(aws: Any, launcher: Make) -> None:
    from cloudexec import Graph

    wide = stage(name="wide", cpus=2)(square)
    usual = stage(name="usual")(square)
    with BatchExecutor(2, launcher=launcher()) as executor:
        graph = Graph([wide(2), usual(3)])
        assert graph.run(executor) == [4, 9]
        assert run(usual(2), executor) == 4
    assert sum(each.cost_usd for each in graph.report) > 0
    assert all(each.tasks == 1 for each in graph.report)
