"""The Fargate launcher against an emulated Amazon ECS that runs real workers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import boto3
import pytest
from launcher_helpers import eventually, kill_when, unfinished
from launcher_tasks import fill, square

from cloudexec import (
    Batch,
    BatchExecutor,
    BudgetExceededError,
    ConfigError,
    Fallback,
    Fargate,
    LaunchError,
    WorkerLostError,
)
from cloudexec._launchers.aws import asking
from cloudexec._launchers.aws.pacer import Pacer
from cloudexec.launchers import ExecutorInfo, Inspection, JobRequest, Phase, Target

Make = Callable[..., Fargate]

NO_CAPACITY = "Capacity is unavailable at this time"


def asked(aws: Any) -> list[dict[str, Any]]:
    """Return the RunTask calls that were carried out, also those whose answers were lost."""
    return [r.parameters for r in aws.requests if r.operation == "RunTask" and r.status in (0, 200)]


def squares(executor: BatchExecutor, count: int = 100) -> None:
    assert list(executor.map(square, range(count))) == [n * n for n in range(count)]


# What is asked for.


def test_a_map_runs_on_tasks(aws: Any, fargate: Make) -> None:
    """Each worker has a call of its own, with its number, its size, and a token of its own."""
    with BatchExecutor(4, launcher=fargate(vcpus=0.5, memory="1GiB", tags={"a": "b"})) as executor:
        squares(executor, 300)
        eventually(lambda: executor.stats().workers.slots == 4)
    requests = asked(aws)
    assert len(requests) == 4
    assert len({each["clientToken"] for each in requests}) == 4
    assert len({each["startedBy"] for each in requests}) == 4
    for each in requests:
        assert each["launchType"] == "FARGATE"
        assert each["count"] == 1
        assert (each["overrides"]["cpu"], each["overrides"]["memory"]) == ("512", "1024")
        tags = {tag["key"]: tag["value"] for tag in each["tags"]}
        assert tags["a"] == "b"
        assert {"cloudexec:executor", "cloudexec:user", "cloudexec:expires"} <= tags.keys()
    eventually(lambda: not unfinished(aws))


def test_a_definition_is_registered_once_and_found_again(aws: Any, fargate: Make) -> None:
    launcher = fargate()
    for _ in range(2):
        with BatchExecutor(1, launcher=launcher) as executor:
            assert executor.submit(square, 2).result() == 4
    with BatchExecutor(1, launcher=fargate(image="example.com/worker:2")) as executor:
        assert executor.submit(square, 2).result() == 4
    definitions = [r.parameters for r in aws.requests if r.operation == "RegisterTaskDefinition"]
    assert len(definitions) == 2
    (container,) = definitions[0]["containerDefinitions"]
    assert container["stopTimeout"] == 120
    assert container["linuxParameters"] == {"initProcessEnabled": True}
    assert [r["taskDefinition"].rpartition(":")[2] for r in asked(aws)] == ["1"] * 3


def test_a_definition_that_was_removed_meanwhile_is_registered_again(
    aws: Any, fargate: Make
) -> None:
    client = boto3.client("ecs", region_name=aws.region)
    with BatchExecutor(2, launcher=fargate()) as executor:
        assert executor.submit(square, 2).result() == 4
        client.deregister_task_definition(taskDefinition=asked(aws)[0]["taskDefinition"])
        futures = [executor.submit(time.sleep, 0.3) for _ in range(4)]
        eventually(lambda: executor.stats().workers.slots == 2)
        wait(futures)
    first, second = asked(aws)
    assert (first["taskDefinition"][-2:], second["taskDefinition"][-2:]) == (":1", ":2")


def test_a_task_that_outgrows_its_worker_climbs_the_ladder(aws: Any, fargate: Make) -> None:
    launcher = fargate(vcpus=0.25, memory=("512MiB", "1GiB"))
    with BatchExecutor(1, launcher=launcher) as executor:
        assert executor.submit(fill, 700).result(timeout=90) == 700
    assert [each["overrides"]["memory"] for each in asked(aws)] == ["512", "1024"]


def test_an_environment_that_is_too_long_is_refused_before_it_is_sent(
    aws: Any, fargate: Make
) -> None:
    launcher = fargate(environment={"LONG": "x" * 8000})
    with BatchExecutor(1, launcher=launcher) as executor:
        with pytest.raises(LaunchError, match=r"characters as JSON; Amazon ECS takes 8192.*'LONG'"):
            executor.submit(square, 1).result(timeout=60)
    assert not asked(aws)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vcpus": 3}, "Fargate has no size of 3 vCPU"),
        ({"spot": "yes"}, "spot must be"),
        ({"cluster": " "}, "cluster must be a string"),
        ({"subnets": ["a", ""]}, "subnets must be ids"),
        ({"packages": "here"}, "either packages or image"),
        ({"max_runtime": 0}, "max_runtime"),
        ({"memory": ("4GiB", "2GiB")}, "must grow"),
    ],
)
def test_wrong_settings_are_refused(fargate: Make, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fargate(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"subnets": ()}, "needs 1 to 16 subnets, not 0"),
        ({"subnets": ["s"] * 17}, "needs 1 to 16 subnets, not 17"),
        ({"security_groups": ["g"] * 6}, "5 security groups at most, not 6"),
        ({"execution_role": None}, "execution_role"),
        (
            {"cluster": "arn:aws:ecs:eu-west-1:123456789012:cluster/c"},
            "the cluster .* is in eu-west-1, and not in us-east-1",
        ),
    ],
)
def test_what_cannot_run_is_refused_at_the_start(fargate: Make, settings: Any, said: str) -> None:
    with pytest.raises((ConfigError, LaunchError), match=said):
        with BatchExecutor(1, launcher=fargate(**settings)) as executor:
            executor.submit(square, 1).result(timeout=60)


# Answers that are lost, late or wrong.


@pytest.mark.parametrize("conflict", [False, True])
def test_a_lost_answer_starts_nothing_twice(aws: Any, fargate: Make, conflict: bool) -> None:
    """The call is made again with its token: AWS answers as before, or names the task."""
    aws.faults.ecs.tokens_conflict = conflict
    aws.faults.lose_response("RunTask", 2)
    with BatchExecutor(3, launcher=fargate()) as executor:
        squares(executor)
        eventually(lambda: executor.stats().workers.slots == 3)
    assert len(aws.jobs()) == 3
    eventually(lambda: not unfinished(aws))


@pytest.mark.parametrize("lag", [2.0, 1000.0])
def test_answers_that_stay_lost_start_nothing_twice(aws: Any, fargate: Make, lag: float) -> None:
    """Beyond the tries of the SDK: the task is found by what it was started by, or by its token."""
    aws.faults.lose_response("RunTask", 6)
    aws.faults.list_lag(lag)
    aws.faults.slow_start(60.0)  # it does not connect before it is known
    launcher = fargate()
    with BatchExecutor(1, launcher=launcher) as executor:
        executor.submit(square, 3)
        eventually(lambda: [each.api for each in executor.stats().launches if each.api])
        executor.shutdown(wait=False, cancel_futures=True)
    assert len(aws.jobs()) == 1
    eventually(lambda: not unfinished(aws))


def test_lost_answers_before_the_shutdown_leave_nothing(aws: Any, fargate: Make) -> None:
    aws.faults.slow_start(30.0)
    aws.faults.lose_response("RunTask", 1000)
    executor = BatchExecutor(2, launcher=fargate(), min_workers=2)
    executor.submit(square, 1)
    eventually(lambda: len(aws.jobs()) == 2)
    executor.shutdown(wait=True, cancel_futures=True)
    eventually(lambda: not unfinished(aws))


def test_a_throttled_call_is_made_again(aws: Any, fargate: Make) -> None:
    launcher = fargate()
    aws.faults.throttle("RunTask", 8)
    with BatchExecutor(2, launcher=launcher) as executor:
        squares(executor)
    assert len(aws.jobs()) <= 2


def test_tasks_that_are_not_seen_yet_are_waited_for(aws: Any, fargate: Make) -> None:
    """A fresh task is MISSING in what Amazon ECS tells, for a moment."""
    aws.faults.list_lag(1000.0)
    aws.faults.slow_start(3.0)
    with BatchExecutor(2, launcher=fargate()) as executor:
        squares(executor)
    assert len(aws.jobs()) == 2


def test_nothing_runs_after_shutdown_even_what_never_started(aws: Any, fargate: Make) -> None:
    aws.faults.no_capacity()
    with BatchExecutor(3, launcher=fargate(), min_workers=3) as executor:
        executor.submit(square, 1)
        eventually(lambda: asked(aws))
        executor.shutdown(wait=False, cancel_futures=True)
    aws.faults.capacity_returns()
    assert aws.jobs() == []


# Capacity.


@pytest.mark.parametrize("stops", [False, True])
def test_workers_wait_for_capacity_and_say_so(
    aws: Any, fargate: Make, stops: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whether RunTask has failures, or tasks stop: it is asked for again, until there is some."""
    aws.faults.ecs.tasks_stop_without_capacity = stops
    aws.faults.no_capacity()
    caplog.set_level(logging.WARNING, logger="cloudexec")
    launcher = fargate()
    with BatchExecutor(2, launcher=launcher) as executor:
        futures = [executor.submit(square, n) for n in range(10)]
        eventually(lambda: NO_CAPACITY in launcher.explain())
        assert "another size or more subnets, or wait" in launcher.explain()
        aws.faults.capacity_returns()
        assert [future.result(timeout=60) for future in futures] == [n * n for n in range(10)]
    tokens = [each["clientToken"] for each in asked(aws)]
    assert len(tokens) == len(set(tokens)), "a call that was answered is another one"


def test_few_calls_are_made_while_there_is_no_capacity(aws: Any, fargate: Make) -> None:
    """One worker of many finds out for all of them."""
    aws.faults.no_capacity()
    launcher = fargate()
    with BatchExecutor(50, launcher=launcher, min_workers=50) as executor:
        executor.submit(square, 1)
        eventually(lambda: NO_CAPACITY in launcher.explain())
        assert len(asked(aws)) < 25
        executor.shutdown(wait=False, cancel_futures=True)


def test_capacity_that_never_comes_is_an_error_with_the_reason(aws: Any, fargate: Make) -> None:
    aws.faults.no_capacity()
    with BatchExecutor(1, launcher=fargate(), launch_timeout=4.0) as executor:
        with pytest.raises(LaunchError, match=NO_CAPACITY):
            executor.submit(square, 1).result(timeout=60)


@pytest.mark.parametrize("stops", [False, True])
def test_spot_is_left_where_there_is_none(aws: Any, fargate: Make, stops: bool) -> None:
    aws.faults.ecs.tasks_stop_without_capacity = stops
    aws.faults.no_capacity("FARGATE_SPOT")
    began = time.monotonic()
    with BatchExecutor(2, launcher=fargate(spot="prefer")) as executor:
        squares(executor)
    assert time.monotonic() - began < 30
    assert {job.spot for job in aws.jobs() if job.started_at} == {False}
    eventually(lambda: not unfinished(aws))


@pytest.mark.parametrize("stops", [False, True])
def test_a_fallback_moves_on_where_there_is_no_capacity(
    aws: Any, fargate: Make, stops: bool
) -> None:
    """From Spot to on demand, as two launchers: within seconds, and without a lost task."""
    aws.faults.ecs.tasks_stop_without_capacity = stops
    aws.faults.no_capacity("FARGATE_SPOT")
    began = time.monotonic()
    with BatchExecutor(2, launcher=Fallback([fargate(spot=True), fargate()])) as executor:
        squares(executor)
    assert time.monotonic() - began < 40
    assert {job.spot for job in aws.jobs() if job.started_at} == {False}
    eventually(lambda: not unfinished(aws))


@pytest.mark.parametrize("is_error", [False, True])
def test_a_quota_is_waited_for_and_named(aws: Any, fargate: Make, is_error: bool) -> None:
    aws.faults.ecs.quota_is_an_error = is_error
    aws.faults.vcpu_quota(1.0)
    launcher = fargate()
    with BatchExecutor(2, launcher=launcher, min_workers=2) as executor:
        assert executor.submit(square, 3).result(timeout=60) == 9
        eventually(lambda: "vCPU quota is used up" in launcher.explain())
        aws.faults.vcpu_quota(2.0)
        eventually(lambda: executor.stats().workers.slots == 2)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("RESOURCE:ENI", "no network interface"),
        ("RESOURCE:MEMORY", "could not start the worker now"),
        ("AGENT", "could not start the worker now"),
        ("Rate exceeded", "could not start the worker now"),
    ],
)
def test_failures_that_may_pass_are_tried_again(
    aws: Any, fargate: Make, reason: str, said: str
) -> None:
    aws.faults.ecs.run_task_fails(reason)
    launcher = fargate()
    with BatchExecutor(1, launcher=launcher) as executor:
        future = executor.submit(square, 3)
        eventually(lambda: said in launcher.explain())
        aws.faults.clear()
        assert future.result(timeout=60) == 9


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Rate exceeded", "could not start the worker now"),
        ("Request limit exceeded.", "could not start the worker now"),
        (f"{NO_CAPACITY}. Please try again later", "no capacity of this kind"),
        ("You've reached the limit on the number of tasks you can run concurrently", "quota"),
    ],
)
def test_errors_that_may_pass_are_tried_again(
    aws: Any, fargate: Make, message: str, said: str
) -> None:
    """Their code is that of a wrong request, so that only the words tell."""
    aws.faults.ecs.run_task_fails(message, code="InvalidParameterException")
    launcher = fargate()
    with BatchExecutor(1, launcher=launcher) as executor:
        future = executor.submit(square, 3)
        eventually(lambda: said in launcher.explain())
        aws.faults.clear()
        assert future.result(timeout=60) == 9


def test_a_failure_that_stays_is_an_error_at_once(aws: Any, fargate: Make) -> None:
    aws.faults.ecs.run_task_fails("MISSING")
    with BatchExecutor(1, launcher=fargate()) as executor:
        with pytest.raises(
            LaunchError, match=r"does not start the worker: MISSING.*up --with farg"
        ):
            executor.submit(square, 1).result(timeout=60)


def test_a_cluster_without_fargate_spot_is_an_error_with_aws_s_words(
    aws: Any, fargate: Make
) -> None:
    boto3.client("ecs", region_name=aws.region).create_cluster(clusterName="plain")
    with BatchExecutor(1, launcher=fargate(cluster="plain", spot=True)) as executor:
        with pytest.raises(LaunchError, match="not associated with the cluster"):
            executor.submit(square, 1).result(timeout=60)


def test_a_refusal_is_an_error_with_the_remedy(aws: Any, fargate: Make) -> None:
    aws.faults.deny("RunTask")
    with BatchExecutor(1, launcher=fargate()) as executor:
        with pytest.raises(LaunchError, match="cloudexec policy"):
            executor.submit(square, 1).result(timeout=60)


# Ends.


@pytest.mark.parametrize("code", ["SpotInterruption", "TerminationNotice"])
def test_reclaimed_workers_cost_no_task_an_attempt(aws: Any, fargate: Make, code: Any) -> None:
    aws.faults.ecs.spot_stop_code = code
    with BatchExecutor(3, launcher=fargate(spot=True)) as executor:
        futures = [executor.submit(time.sleep, 0.4) for _ in range(30)]
        eventually(lambda: executor.stats().workers.slots == 3)
        assert aws.faults.reclaim_fraction(0.6)
        wait(futures)
        assert all(future.exception() is None for future in futures)
        assert executor.stats().tasks.failed == 0
    for each in asked(aws):
        assert each["capacityProviderStrategy"] == [
            {"capacityProvider": "FARGATE_SPOT", "weight": 1}
        ]
        variables = {
            v["name"]: v["value"] for v in each["overrides"]["containerOverrides"][0]["environment"]
        }
        assert variables["CLOUDEXEC_DRAIN_GRACE"] == "100"


def test_a_worker_whose_machine_dies_costs_no_task(aws: Any, fargate: Make) -> None:
    with BatchExecutor(1, launcher=fargate()) as executor:
        future = executor.submit(time.sleep, 2.0)
        eventually(lambda: executor.stats().tasks.running == 1)
        (job,) = aws.jobs()
        aws.faults.kill_instance(job.job_id)
        future.result(timeout=60)
    assert len(aws.jobs()) == 2


def test_a_worker_that_runs_out_of_memory_is_told_apart(aws: Any, fargate: Make) -> None:
    with BatchExecutor(1, launcher=fargate(), retries=0) as executor:
        future = executor.submit(time.sleep, 60)
        eventually(lambda: executor.stats().tasks.running == 1)
        aws.faults.out_of_memory(aws.jobs()[0].job_id)
        with pytest.raises(WorkerLostError, match="memory"):
            future.result(timeout=60)


def test_an_image_that_cannot_be_pulled_fails_the_tasks_with_the_remedy(
    aws: Any, fargate: Make
) -> None:
    aws.faults.image_pull_fails()
    with BatchExecutor(1, launcher=fargate()) as executor:
        with pytest.raises(LaunchError, match=r"CannotPullContainerError.*cloudexec image push"):
            executor.submit(square, 1).result(timeout=60)


def test_stopped_tasks_that_aws_forgets_end_their_workers(
    aws: Any, fargate: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "MISSING", 1.0)
    with BatchExecutor(1, launcher=fargate()) as executor:
        future = executor.submit(time.sleep, 1.0)
        eventually(lambda: executor.stats().tasks.running == 1)
        (job,) = aws.jobs()
        os.killpg(job.pid, signal.SIGKILL)
        eventually(lambda: aws.job(job.job_id).status == "FAILED")
        aws.faults.forget_ended()
        future.result(timeout=60)


def test_the_budget_counts_the_two_minutes_until_a_worker_is_killed(
    aws: Any, fargate: Make
) -> None:
    launcher = fargate()
    minute = launcher.estimate(1, 60).accrued_usd
    with BatchExecutor(5, launcher=launcher, max_cost_usd=5 * minute) as executor:
        squares(executor)
        eventually(lambda: executor.stats().workers.slots == 2)
        cost = executor.cost()
    assert len(aws.jobs()) == 2
    # A minute of each is owed; until Amazon ECS kills them, another one would be.
    assert 2 * minute <= cost.accrued_usd <= cost.accrued_usd + cost.committed_usd <= 5 * minute
    assert cost.committed_usd >= minute
    with BatchExecutor(1, launcher=launcher, max_cost_usd=1.5 * minute) as executor:
        with pytest.raises(BudgetExceededError):
            executor.submit(square, 1).result(timeout=60)


def test_spot_is_priced_as_spot(fargate: Make) -> None:
    on_demand = fargate(assign_public_ip=False).estimate(1, 3600).accrued_usd
    spot = fargate(assign_public_ip=False, spot=True).estimate(1, 3600).accrued_usd
    assert on_demand == pytest.approx(0.04048 + 2 * 0.004445)
    assert spot == pytest.approx(0.3 * on_demand)


# Clients that are killed.


def script_of(launcher: Fargate, *lines: str, **options: Any) -> str:
    """Return a program with three workers, which sleep until it ends."""
    given = {
        name: getattr(launcher, name)
        for name in (
            "cluster",
            "subnets",
            "security_groups",
            "job_role",
            "execution_role",
            "region",
        )
    }
    return textwrap.dedent(
        f"""
        import time
        from cloudexec import BatchExecutor, Fargate
        if __name__ == "__main__":
            launcher = Fargate(image="x", **{given!r})
            executor = BatchExecutor(3, launcher=launcher, min_workers=3, **{options!r})
            futures = [executor.submit(time.sleep, 300) for _ in range(3)]
            {"; ".join(lines) or "time.sleep(300)"}
        """
    )


def all_lost(aws: Any, path: Path) -> bool:
    return sum(r.operation == "RunTask" and r.status == 0 for r in aws.requests) >= 3


def all_starting(aws: Any, path: Path) -> bool:
    return [job.status for job in aws.jobs()] == ["STARTING"] * 3


ALL_RUN = "exec('while executor.stats().tasks.running < 3: time.sleep(0.05)')"
PHASES: dict[str, tuple[Callable[[Any], object], Callable[[Any, Path], object], Sequence[str]]] = {
    "before the answer": (lambda aws: aws.faults.lose_response("RunTask", 1000), all_lost, ()),
    "pending": (lambda aws: aws.faults.slow_start(4.0), all_starting, ()),
    "running": (
        lambda aws: None,
        lambda aws, path: path.with_suffix(".running").exists(),
        (ALL_RUN, "open(__file__[:-3] + '.running', 'w').close()", "time.sleep(300)"),
    ),
    # Workers that have ended before the client asks for it need no request.
    "ending": (
        lambda aws: aws.faults.deny("StopTask"),
        lambda aws, path: (
            path.with_suffix(".ended").exists()
            or any(r.operation == "StopTask" for r in aws.requests)
        ),
        (
            ALL_RUN,
            "executor.shutdown(wait=False, cancel_futures=True)",
            "executor.kill_workers()",
            "open(__file__[:-3] + '.ended', 'w').close()",
            "time.sleep(300)",
        ),
    ),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_is_killed_leaves_nothing_running(
    aws: Any, fargate: Make, tmp_path: Path, phase: str
) -> None:
    """Whatever Amazon ECS was told last: workers that find no client end by themselves."""
    prepare, reached, lines = PHASES[phase]
    prepare(aws)
    path = tmp_path / "client.py"
    kill_when(
        path,
        script_of(fargate(), *lines, launch_timeout=20.0, orphan_timeout=6.0),
        lambda: reached(aws, path),
    )
    aws.faults.clear()
    eventually(lambda: aws.jobs() and not unfinished(aws), timeout=80.0)
    assert len(aws.jobs()) == 3


def test_a_later_process_finds_the_workers_of_an_earlier_one(aws: Any, fargate: Make) -> None:
    """It has their names alone, and ends them all, or knows which have ended."""
    launcher = fargate()
    executor = ExecutorInfo(id="0123456789abcdef", launch_timeout=60.0)
    # They wait for a client to dial.
    variables = {"CLOUDEXEC_TARGET": "127.0.0.1:1", "CLOUDEXEC_EXECUTOR_ID": executor.id}
    variables |= {"CLOUDEXEC_KEY": "00" * 32, "CLOUDEXEC_SLOTS": "1", "CLOUDEXEC_LAUNCH": "1"}
    variables |= {"CLOUDEXEC_CERTIFICATE_SHA256": "00" * 32}
    jobs = [f"cloudexec-{executor.id}-{number}" for number in range(3)]

    async def before() -> None:
        async with launcher.connect(executor) as site:
            for name in jobs[:2]:
                await site.platform.prepare()
                request = JobRequest(name=name, workers=1, environment=variables)
                taken = await site.platform.submit(request)
                assert taken.job_id == name
                assert taken.worker_ids[0].startswith("arn:aws:ecs:")

    async def after() -> dict[str, Phase]:
        async with fargate().connect(executor) as site:
            looks = [Inspection(job_id=name, survey=True) for name in jobs]
            found = await site.platform.describe(looks)
            again = await site.platform.find(jobs[0], spot=False)
            assert again is not None
            await site.platform.terminate([Target(job_id=name) for name in jobs], "enough")
            return {name: status.workers[0].phase for name, status in found.items()}

    asyncio.run(before())
    assert asyncio.run(after()).keys() == set(jobs[:2])
    eventually(lambda: not unfinished(aws))
    assert {job.status_reason for job in aws.jobs()} == {"enough"}


# Time limits and rates.


def test_a_worker_ends_at_its_time_limit(aws: Any, fargate: Make) -> None:
    """Amazon ECS has none: the worker hands its task back, and ends."""
    with BatchExecutor(1, launcher=fargate(max_runtime=3.0), retries=0) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
        (first,) = aws.jobs()
        eventually(lambda: aws.job(first.job_id).exit_code == 143)
        assert executor.submit(square, 3).result(timeout=60) == 9


def test_a_worker_that_hangs_is_ended_by_the_kernel() -> None:
    script = (
        "import signal, time; from cloudexec.worker import __main__ as m;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); m._LAST_SECONDS = 0.3;"
        "m._end_after(0.2, 0.2); time.sleep(60)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], timeout=30)
    assert done.returncode == -signal.SIGALRM
    assert time.monotonic() - began < 20


def test_the_kernel_leaves_spot_workers_their_time_to_finish() -> None:
    """They have 100 seconds on Spot, and then have to hand back what is left."""
    script = (
        "import signal; from cloudexec.worker import __main__ as m;"
        "m._end_after(1000.0, 100.0); print(signal.getitimer(signal.ITIMER_REAL)[0])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 1100.0 < float(done.stdout) <= 1120.0


def test_a_time_limit_below_a_second_is_one(aws: Any, fargate: Make) -> None:
    with BatchExecutor(1, launcher=fargate(max_runtime=0.4), min_workers=1) as executor:
        executor.submit(time.sleep, 3)
        (first, *_) = eventually(aws.jobs)
        eventually(lambda: aws.job(first.job_id).exit_code == 143)
        executor.shutdown(wait=False, cancel_futures=True)
    assert first.environment["CLOUDEXEC_LIFETIME"] == "1"


def test_a_worker_without_any_time_ends_at_once() -> None:
    """0 is a time limit, too, and not none."""
    bootstrap = {"slots": 1, "lifetime": 0.0}
    script = (
        "import signal; from cloudexec.worker import __main__ as m;"
        "m._end_after = lambda *given: print('limited', given, flush=True) or exit(9);"
        f"m.main({bootstrap!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "limited (0.0, 20.0)" in done.stdout


class VirtualTime:
    """A clock that goes on when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        woken = asyncio.Event()
        self._sleepers.append((until, woken))
        await woken.wait()

    async def run(self, tasks: list[asyncio.Task[None]]) -> None:
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            if self._sleepers:
                first = min(self._sleepers, key=lambda each: each[0])
                self._sleepers.remove(first)
                self.now = max(self.now, first[0])
                first[1].set()


def test_a_thousand_workers_are_asked_for_at_the_published_rate() -> None:
    """20 calls at once and 20 a second, of which each starts a task: below both of AWS's rates."""

    async def times() -> list[float]:
        clock = VirtualTime()
        pacer = Pacer(20, 20, clock=clock.time, sleep=clock.sleep)
        found: list[float] = []

        async def one() -> None:
            await pacer.wait()
            found.append(clock.now)

        await clock.run([asyncio.ensure_future(one()) for _ in range(1000)])
        return found

    found = asyncio.run(times())
    assert found == sorted(found)
    assert found.count(0.0) == 20
    assert found[-1] == pytest.approx(49.0)
    tokens = {"calls": (20, 20.0), "launches": (100, 20.0)}
    for burst, rate in tokens.values():
        for index, at in enumerate(found):
            assert index + 1 <= burst + rate * at + 1e-6


def test_many_workers_are_never_throttled(aws: Any, fargate: Make) -> None:
    """The emulated AWS refuses what is beyond the rate, and has nothing to refuse."""
    aws.faults.slow_start(300.0)  # only the calls count
    with BatchExecutor(60, launcher=fargate(vcpus=0.25, memory=512), min_workers=60) as executor:
        executor.submit(square, 1)
        eventually(lambda: len(asked(aws)) >= 60)
        executor.shutdown(wait=False, cancel_futures=True)
    errors = Counter(r.error for r in aws.requests if r.operation == "RunTask")
    assert set(errors) == {None}
    eventually(lambda: not unfinished(aws))


# Sizes.


def test_sizes_that_amazon_ecs_refuses_are_refused_at_once() -> None:
    """AWS Batch takes 32 vCPUs, Amazon ECS 16: as a setting, and for a task that needs them."""
    with pytest.raises(ConfigError, match=r"up to 16 vCPU.* 16 vCPU with 120 GiB.*Batch\(") as one:
        Fargate(vcpus=32, memory="120GiB", profile="default")
    assert "32 vCPU with 120 GiB; the nearest" in str(one.value)
    launcher = Fargate(vcpus=16, memory="120GiB", profile="default")
    assert launcher.capacity_for(16, 120 << 30, 0).cpus == 16
    for cpus, gib in ((17, 1), (1, 121)):
        with pytest.raises(ConfigError, match="its largest, is 16 vCPU with 120 GiB"):
            launcher.capacity_for(cpus, gib << 30, 0)
        assert Batch(profile="default").capacity_for(cpus, gib << 30, 0).cpus == 32
    assert "Batch(compute='ec2', memory='240GiB')" in launcher.more_memory(0)
    assert "vcpus=32" in Batch(vcpus=16, memory="120GiB", profile="default").more_memory(0)
