"""Asking Amazon ECS for workers: again, at the same time, never twice, and not after the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import boto3
import pytest
from launcher_helpers import eventually, unfinished

from cloudexec import AwsError, Fargate
from cloudexec._launchers.aws import asking
from cloudexec.launchers import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    Phase,
    Platform,
    Target,
    WaitingJob,
)

Make = Callable[..., Fargate]

EXECUTOR = ExecutorInfo(id="0123456789abcdef", launch_timeout=60.0)
NO_CAPACITY = "Capacity is unavailable at this time"
# Workers that wait for a client to dial.
VARIABLES = {
    "CLOUDEXEC_TARGET": "127.0.0.1:1",
    "CLOUDEXEC_EXECUTOR_ID": EXECUTOR.id,
    "CLOUDEXEC_KEY": "00" * 32,
    "CLOUDEXEC_SLOTS": "1",
    "CLOUDEXEC_LAUNCH": "1",
    "CLOUDEXEC_CERTIFICATE_SHA256": "00" * 32,
}


def request(number: int, **given: Any) -> JobRequest:
    name = f"cloudexec-{EXECUTOR.id}-{number}"
    return JobRequest(name=name, workers=1, environment=VARIABLES, **given)


@asynccontextmanager
async def connected(launcher: Fargate) -> AsyncIterator[Platform]:
    async with launcher.connect(EXECUTOR) as site:
        await site.platform.prepare()
        yield site.platform


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(60):
        while True:
            if found := condition():
                return found
            await asyncio.sleep(0.02)


async def reaches(platform: Platform, name: str, *phases: Phase) -> Phase:
    async with asyncio.timeout(60):
        while True:
            if (phase := await phase_of(platform, name)) in phases:
                return phase
            await asyncio.sleep(0.02)


async def phase_of(platform: Platform, name: str) -> Phase:
    async with asyncio.timeout(60):
        return (await platform.describe([Inspection(job_id=name)]))[name].workers[0].phase


def calls(aws: Any, operation: str = "RunTask") -> list[dict[str, Any]]:
    return [each.parameters for each in aws.requests if each.operation == operation]


# Errors that may pass.


def test_an_error_that_may_pass_ends_no_worker_that_waits(aws: Any, fargate: Make) -> None:
    """It says nothing of the worker: what AWS said of it before, and says after, counts."""
    aws.faults.no_capacity()
    launcher = fargate()

    async def run() -> None:
        async with connected(launcher) as platform:
            taken = await platform.submit(request(1))
            waiting = [WaitingJob(job_id=taken.job_id, counts={Phase.WAITING: 1})]
            aws.faults.throttle("RunTask", 10_000)
            said: list[Any] = []
            async with asyncio.timeout(60):
                while not said or "Rate exceeded" not in str(said[-1]):
                    reason = await platform.explain(waiting, ())
                    said += [reason] if reason is not None else []
                    await asyncio.sleep(0.05)
            assert not any(each.fatal for each in said)
            assert "cannot be asked for workers now" in str(said[-1])
            assert "cloudexec up" not in str(said[-1])
            aws.faults.clear()
            await until(aws.jobs)
            assert await phase_of(platform, taken.job_id) is not Phase.ENDED
            await platform.terminate([Target(job_id=taken.job_id)], "enough")

    asyncio.run(run())
    eventually(lambda: not unfinished(aws))


def test_a_refusal_ends_a_worker_that_waits(aws: Any, fargate: Make) -> None:
    aws.faults.no_capacity()

    async def run() -> None:
        async with connected(fargate()) as platform:
            taken = await platform.submit(request(1))
            aws.faults.deny("RunTask")
            await reaches(platform, taken.job_id, Phase.ENDED)
            status = (await platform.describe([Inspection(job_id=taken.job_id)]))[taken.job_id]
            assert status.workers[0].ends[0].reason.fatal

    asyncio.run(run())


def test_no_room_is_told_apart(aws: Any, fargate: Make) -> None:
    """Where there is a launcher elsewhere, workers without room are started there."""

    async def run() -> None:
        async with connected(fargate()) as platform:

            async def no_room(reason: str) -> bool:
                job = WaitingJob(job_id="x", counts={Phase.WAITING: 1}, reason=reason)
                found = await platform.explain([job], ())
                assert found is not None
                return found.no_room

            assert await no_room(NO_CAPACITY)
            assert await no_room("You've reached the limit on the number of vCPUs")
            assert await no_room("RESOURCE:ENI")
            assert not await no_room("AGENT")

    asyncio.run(run())


# Answers that go back.


def test_a_task_that_is_missing_for_a_moment_is_not_started_again(aws: Any, fargate: Make) -> None:
    """Answers of Amazon ECS may be older than ones that it gave before."""
    aws.faults.slow_start(60.0)

    async def run() -> None:
        async with connected(fargate()) as platform:
            taken = await platform.submit(request(1))
            before = await reaches(platform, taken.job_id, Phase.WAITING, Phase.STARTING)
            aws.faults.ecs.tasks_go_missing(3)
            for _ in range(3):
                assert await phase_of(platform, taken.job_id) is before
            await platform.terminate([Target(job_id=taken.job_id)], "enough")

    asyncio.run(run())
    eventually(lambda: not unfinished(aws))


def test_a_task_that_stays_missing_is_given_up_and_stopped(
    aws: Any, fargate: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "MISSING", 0.0)
    aws.faults.slow_start(60.0)

    async def run() -> None:
        async with connected(fargate()) as platform:
            taken = await platform.submit(request(1))
            await reaches(platform, taken.job_id, Phase.WAITING, Phase.STARTING)
            aws.faults.ecs.tasks_go_missing()
            assert await phase_of(platform, taken.job_id) is Phase.ENDED
            await until(lambda: not unfinished(aws))

    asyncio.run(run())


def test_a_task_after_one_without_capacity_may_be_unknown_at_first(aws: Any, fargate: Make) -> None:
    """The end of the earlier task says nothing of it."""
    aws.faults.ecs.tasks_stop_without_capacity = True
    aws.faults.no_capacity()
    aws.faults.slow_start(60.0)

    async def run() -> None:
        async with connected(fargate()) as platform:
            taken = await platform.submit(request(1))
            await until(lambda: unfinished(aws) or aws.jobs())
            async with asyncio.timeout(60):
                while not platform._workers[taken.job_id].waits:  # type: ignore[attr-defined]
                    await phase_of(platform, taken.job_id)
            aws.faults.ecs.tasks_go_missing()
            aws.faults.capacity_returns()
            await until(lambda: platform._workers[taken.job_id].arn)  # type: ignore[attr-defined]
            assert await phase_of(platform, taken.job_id) is not Phase.ENDED
            await platform.terminate([Target(job_id=taken.job_id)], "enough")

    asyncio.run(run())
    eventually(lambda: not unfinished(aws))


@pytest.mark.parametrize("is_over", [False, True])
def test_a_task_that_stops_and_is_missing_for_a_moment_says_why_it_ended(
    aws: Any, fargate: Make, is_over: bool
) -> None:
    """Whether its end had been seen before or not."""
    aws.faults.ecs.deprovisioning = 1.0

    async def run() -> Any:
        async with connected(fargate()) as platform:
            taken = await platform.submit(request(1))
            await reaches(platform, taken.job_id, Phase.RUNNING)
            boto3.client("ecs", region_name=aws.region).stop_task(
                cluster=fargate().cluster, task=taken.worker_ids[0], reason="by hand"
            )
            await phase_of(platform, taken.job_id)
            if is_over:
                await reaches(platform, taken.job_id, Phase.ENDED)
            aws.faults.ecs.tasks_go_missing(1)
            asked = [Inspection(job_id=taken.job_id)]
            async with asyncio.timeout(60):
                while True:
                    status = (await platform.describe(asked))[taken.job_id].workers[0]
                    if status.phase is Phase.ENDED:
                        return status

    assert "by hand" in str(asyncio.run(run()).ends[0].reason)


# The end.


def test_a_worker_that_was_ended_while_it_was_asked_for_leaves_no_task(
    aws: Any, fargate: Make
) -> None:
    """Whoever ended it does not wait for the answer as long as that takes."""

    async def run() -> None:
        async with connected(fargate()) as platform:
            aws.faults.no_capacity()
            taken = await platform.submit(request(1))
            aws.faults.slow_response("RunTask", 2.0)
            aws.faults.capacity_returns()
            await until(lambda: asking_now(platform))
            ending = asyncio.create_task(
                platform.terminate([Target(job_id=taken.job_id)], "enough")
            )
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            ending.cancel()
            await until(lambda: not asking_now(platform))
            assert len(aws.jobs()) == 1

    asyncio.run(run())
    eventually(lambda: not unfinished(aws))


def test_a_lost_answer_is_looked_for_also_where_the_next_try_was_throttled(
    aws: Any, fargate: Make
) -> None:
    """The call as a whole was refused as one too many, and has started a task."""

    async def run() -> None:
        async with connected(fargate()) as platform:
            aws.faults.lose_response("RunTask")
            submitting = asyncio.create_task(platform.submit(request(1)))
            await until(aws.jobs)
            aws.faults.throttle("RunTask", 1000)
            with suppress(AwsError):
                await submitting
            aws.faults.clear()
            await platform.terminate([Target(job_id=request(1).name)], "enough")

    asyncio.run(run())
    assert len(aws.jobs()) == 1
    eventually(lambda: not unfinished(aws), timeout=4.0)


def asking_now(platform: Any) -> bool:
    return any(each.asking is not None for each in platform._workers.values())


def test_nothing_is_asked_for_that_has_been_ended(aws: Any, fargate: Make) -> None:
    aws.faults.no_capacity()

    async def run() -> None:
        async with connected(fargate()) as platform:
            taken = [await platform.submit(request(number)) for number in range(3)]
            await platform.terminate([Target(job_id=each.job_id) for each in taken], "enough")
            made = len(calls(aws))
            other = await platform.submit(request(9))
            aws.faults.capacity_returns()
            # This one is asked for again, by what would ask for the others.
            await until(lambda: platform._workers[other.job_id].arn)  # type: ignore[attr-defined]
            assert {each["startedBy"] for each in calls(aws)[made:]} == {other.job_id}
            await platform.terminate([Target(job_id=other.job_id)], "enough")

    asyncio.run(run())
    eventually(lambda: not unfinished(aws))


def test_a_call_that_outlasts_its_executor_leaves_no_task(aws: Any, fargate: Make) -> None:
    aws.faults.slow_response("RunTask", 1.5)

    async def run() -> None:
        async with connected(fargate()) as platform:
            submitting = asyncio.create_task(platform.submit(request(1)))
            await until(lambda: asking_now(platform))
            submitting.cancel()

    asyncio.run(run())
    assert len(aws.jobs()) == 1
    eventually(lambda: not unfinished(aws), timeout=4.0)


def test_a_call_that_is_never_answered_does_not_hold_up_the_end(
    aws: Any, fargate: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(asking, "_CLOSE_PATIENCE", 0.5)

    async def run() -> None:
        async with asyncio.timeout(40), connected(fargate()) as platform:
            aws.faults.slow_response("RunTask", 50.0)
            submitting = asyncio.create_task(platform.submit(request(7)))
            await until(lambda: asking_now(platform))
            submitting.cancel()

    try:
        asyncio.run(run())
    finally:
        aws.faults.clear()
    assert f"may have started tasks for cloudexec-{EXECUTOR.id}-7" in caplog.text


# At the same time.


def test_looking_does_not_wait_for_calls_that_hang(aws: Any, fargate: Make) -> None:
    """Those that wait are asked for in the background, and all at the same time."""
    aws.faults.no_capacity()

    async def run() -> None:
        async with connected(fargate()) as platform:
            taken = [await platform.submit(request(number)) for number in range(4)]
            aws.faults.capacity_returns()
            aws.faults.slow_response("RunTask", 50.0)
            await until(lambda: asking_now(platform))
            async with asyncio.timeout(40):
                for each in taken:
                    assert await phase_of(platform, each.job_id) is Phase.WAITING
            aws.faults.clear()
            await until(lambda: len(aws.jobs()) == 4)
            await platform.terminate([Target(job_id=each.job_id) for each in taken], "enough")

    asyncio.run(run())
    eventually(lambda: not unfinished(aws))


def test_a_size_that_finds_no_place_keeps_no_other_from_being_asked_for(
    aws: Any, fargate: Make
) -> None:
    aws.faults.no_capacity()

    async def run() -> None:
        async with connected(fargate(memory=("2GiB", "4GiB"))) as platform:
            large = await platform.submit(request(1, size=1))
            small = await platform.submit(request(2, size=0))
            aws.faults.ecs.largest_mib = 2048
            aws.faults.capacity_returns()
            (job,) = await until(aws.jobs)
            assert (job.name, job.memory_mib) == (small.job_id, 2048)
            assert await phase_of(platform, large.job_id) is Phase.WAITING
            targets = [Target(job_id=each.job_id) for each in (large, small)]
            await platform.terminate(targets, "enough")

    asyncio.run(run())
    eventually(lambda: not unfinished(aws))


# Calls that may have started a task.


@pytest.mark.parametrize("lag", [0.0, 1000.0])
def test_another_definition_does_not_start_a_second_task(
    aws: Any, fargate: Make, lag: float
) -> None:
    """The first call started it, its answer was lost, and then the definition was removed."""
    aws.faults.slow_start(30.0)

    async def run() -> None:
        async with connected(fargate()) as platform:
            aws.faults.lose_response("RunTask", 6)
            with pytest.raises(AwsError):
                await platform.submit(request(1))
            if lag:
                aws.faults.list_lag(lag)
            (definition,) = {each["taskDefinition"] for each in calls(aws)}
            boto3.client("ecs", region_name=aws.region).deregister_task_definition(
                taskDefinition=definition
            )
            taken = await platform.submit(request(1))
            assert len(aws.jobs()) == 1
            assert taken.worker_ids[0].endswith(aws.jobs()[0].job_id)
            await platform.terminate([Target(job_id=taken.job_id)], "enough")

    asyncio.run(run())
    eventually(lambda: not unfinished(aws))


# Quotas and Spot.


def test_spot_is_kept_where_the_executor_s_own_workers_use_up_the_quota(
    aws: Any, fargate: Make
) -> None:
    async def run() -> None:
        async with connected(fargate(spot="prefer")) as platform:
            aws.faults.vcpu_quota(1.0, spot=True)
            first, second = [
                await platform.submit(request(number, spot=True)) for number in range(2)
            ]
            status = (await platform.describe([Inspection(job_id=second.job_id)]))[second.job_id]
            waits = WaitingJob(
                job_id=second.job_id, spot=True, counts=status.counts, reason=status.reason
            )
            runs = WaitingJob(job_id=first.job_id, spot=True, counts={Phase.RUNNING: 1})
            other = WaitingJob(job_id="x", spot=True, counts={Phase.WAITING: 1}, reason=NO_CAPACITY)
            assert await platform.is_full([runs, waits])
            assert not await platform.is_full([waits])
            assert not await platform.is_full([runs, waits, other])
            targets = [Target(job_id=each.job_id) for each in (first, second)]
            await platform.terminate(targets, "enough")

    asyncio.run(run())
    eventually(lambda: not unfinished(aws))


# What Amazon ECS tells of ends.


@contextmanager
def slow_deprovisioning(aws: Any) -> Iterator[None]:
    aws.faults.ecs.deprovisioning = 1000.0
    yield
    aws.faults.ecs.deprovisioning = 0.0


def test_an_end_is_told_before_the_network_interface_is_removed(aws: Any, fargate: Make) -> None:
    async def run() -> None:
        async with connected(fargate(max_runtime=1.0)) as platform:
            taken = await platform.submit(request(1))
            await until(lambda: aws.jobs() and not unfinished(aws))
            client = boto3.client("ecs", region_name=aws.region)
            cluster = fargate().cluster
            (task,) = client.describe_tasks(cluster=cluster, tasks=list(taken.worker_ids))["tasks"]
            assert task["lastStatus"] == "DEPROVISIONING"
            looked = (await platform.describe([Inspection(job_id=taken.job_id)]))[taken.job_id]
            (end,) = looked.workers[0].ends
            assert looked.workers[0].phase is Phase.ENDED
            assert end.began_at is not None
            assert end.ended_at is not None

    with slow_deprovisioning(aws):
        asyncio.run(run())


def test_a_take_over_learns_what_stopped_workers_cost(aws: Any, fargate: Make) -> None:
    async def before() -> str:
        async with connected(fargate(max_runtime=1.0)) as platform:
            taken = await platform.submit(request(1))
            await until(lambda: aws.jobs() and not unfinished(aws))
            return taken.job_id

    async def after(name: str) -> None:
        async with connected(fargate()) as platform:
            found = await platform.describe([Inspection(job_id=name, survey=True)])
            (end,) = found[name].workers[0].ends
            assert end.began_at is not None
            assert end.ended_at is not None
            assert end.ended_at >= end.began_at

    asyncio.run(after(asyncio.run(before())))
