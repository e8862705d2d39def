"""The Batch launcher against an emulated AWS that runs real workers."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import boto3
import pytest
from launcher_helpers import eventually, kill_a_client, unfinished
from launcher_tasks import fill, slow_square, square, wait_for_file_or_die

from cloudexec import (
    Batch,
    BatchExecutor,
    BudgetExceededError,
    ConfigError,
    LaunchError,
    WorkerLostError,
)
from cloudexec.aws import Monitor

Make = Callable[..., Batch]


def submits(aws: Any) -> list[dict[str, Any]]:
    return [r.parameters for r in aws.requests if r.operation == "SubmitJob" and r.status == 200]


def test_a_map_runs_on_one_array_job(aws: Any, launcher: Make) -> None:
    """All workers of a round come from one job, whose children find their own number."""
    with BatchExecutor(6, launcher=launcher()) as executor:
        assert list(executor.map(square, range(500))) == [n * n for n in range(500)]
        eventually(lambda: executor.stats().workers.slots == 6)
    (request,) = submits(aws)
    assert request["arrayProperties"] == {"size": 6}
    assert request["timeout"]["attemptDurationSeconds"] == 86400
    assert {"cloudexec:executor", "cloudexec:user", "cloudexec:expires"} <= request["tags"].keys()
    eventually(lambda: not unfinished(aws))


def test_a_single_worker_is_a_plain_job(aws: Any, launcher: Make) -> None:
    """An array of one is not allowed."""
    with BatchExecutor(1, launcher=launcher()) as executor:
        assert executor.submit(square, 7).result() == 49
    (request,) = submits(aws)
    assert "arrayProperties" not in request
    eventually(lambda: not unfinished(aws))
    (job,) = aws.jobs()
    assert (job.status, job.exit_code) == ("SUCCEEDED", 0)


def test_a_definition_is_registered_once(aws: Any, launcher: Make) -> None:
    """Executors with the same image and roles share a definition, pinned by its revision."""
    batch = launcher()
    for _ in range(2):
        with BatchExecutor(1, launcher=batch) as executor:
            assert executor.submit(square, 2).result() == 4
    registered = [r for r in aws.requests if r.operation == "RegisterJobDefinition"]
    assert len(registered) == 1
    first, second = submits(aws)
    assert first["jobDefinition"] == second["jobDefinition"]
    assert first["jobDefinition"].endswith(":1")


def test_a_definition_that_was_removed_meanwhile_is_registered_again(
    aws: Any, launcher: Make
) -> None:
    """As `cloudexec definitions deregister` promises, while an executor lives."""
    client = boto3.client("batch", region_name=aws.region)
    with BatchExecutor(2, launcher=launcher()) as executor:
        assert executor.submit(square, 2).result() == 4
        client.deregister_job_definition(jobDefinition=submits(aws)[0]["jobDefinition"])
        futures = [executor.submit(time.sleep, 0.3) for _ in range(4)]
        eventually(lambda: executor.stats().workers.slots == 2)
        wait(futures)
    first, second = submits(aws)
    assert (first["jobDefinition"][-2:], second["jobDefinition"][-2:]) == (":1", ":2")


def test_where_the_time_of_a_start_went_is_told(aws: Any, launcher: Make) -> None:
    """Every part of a cold start is there, and they add up."""
    with BatchExecutor(1, launcher=launcher()) as executor:
        executor.submit(square, 2).result()
        (times,) = executor.stats().launches
    parts = [times.api, times.place, times.boot, times.dial_in, times.first_task]
    assert all(part is not None and part >= 0 for part in parts)
    assert times.total == pytest.approx(sum(parts) + (times.pull or 0.0), abs=0.05)
    assert times.job_id == aws.jobs()[0].job_id


def test_the_time_that_an_image_took_is_told_apart(aws: Any, launcher: Make) -> None:
    """As the platform tells the worker; it counts as paid for, and not as waiting for a place."""
    aws.faults.slow_start(0.8)
    with BatchExecutor(1, launcher=launcher()) as executor:
        executor.submit(square, 2).result()
        (times,) = executor.stats().launches
    assert times.pull == pytest.approx(0.8, abs=0.1)
    assert times.place is not None
    assert times.place < 0.8


def test_a_lost_answer_does_not_launch_twice(aws: Any, launcher: Make) -> None:
    """A submission whose response got lost is found again by its name."""
    aws.faults.lose_response("SubmitJob")
    with BatchExecutor(3, launcher=launcher()) as executor:
        assert sum(executor.map(square, range(100))) == sum(n * n for n in range(100))
    parents = [job for job in aws.jobs() if job.parent is None]
    assert len(parents) == 1


def test_a_lost_answer_does_not_launch_twice_where_lists_lag(aws: Any, launcher: Make) -> None:
    """ListJobs shows a job only some time after it was submitted."""
    batch = launcher()
    aws.faults.list_lag(2.5)
    aws.faults.lose_response("SubmitJob")
    with BatchExecutor(3, launcher=batch) as executor:
        assert sum(executor.map(square, range(100))) == sum(n * n for n in range(100))
    assert len([job for job in aws.jobs() if job.parent is None]) == 1


def test_a_lost_answer_before_the_shutdown_leaves_no_job_where_lists_lag(
    aws: Any, launcher: Make
) -> None:
    batch = launcher()
    aws.faults.no_capacity()
    aws.faults.list_lag(2.5)
    aws.faults.lose_response("SubmitJob")
    executor = BatchExecutor(3, launcher=batch)
    executor.submit(square, 1)
    eventually(aws.jobs)
    executor.shutdown(wait=True, cancel_futures=True)
    assert not unfinished(aws)


def test_a_throttled_submission_is_tried_again(aws: Any, launcher: Make) -> None:
    """Too many requests is not an error of the user's."""
    aws.faults.throttle("SubmitJob", 3)
    with BatchExecutor(1, launcher=launcher()) as executor:
        assert executor.submit(square, 3).result() == 9
    assert len(submits(aws)) == 1


def test_nothing_runs_after_shutdown_even_what_never_started(aws: Any, launcher: Make) -> None:
    """Jobs that wait for capacity are terminated with the executor."""
    with BatchExecutor(40, launcher=launcher(max_vcpus=2)) as executor:
        assert sum(executor.map(square, range(200))) == sum(n * n for n in range(200))
    eventually(lambda: not unfinished(aws), timeout=5.0)


def test_the_key_is_not_in_the_environment_of_tasks(aws: Any, launcher: Make) -> None:
    """What a task starts inherits nothing that would let it pose as a worker."""
    with BatchExecutor(1, launcher=launcher()) as executor:
        names = executor.submit(lambda: list(os.environ)).result()
        block = executor.submit(lambda: Path("/proc/self/environ").read_bytes()).result()
    assert [name for name in names if name.startswith("CLOUDEXEC_")] == ["CLOUDEXEC_DEPTH"]
    (request,) = submits(aws)
    given = {e["name"]: e["value"] for e in request["containerOverrides"]["environment"]}
    assert given["CLOUDEXEC_KEY"].encode() not in block


def test_all_workers_hash_alike(aws: Any, launcher: Make) -> None:
    """And what tasks start is seeded as it would be anywhere else."""
    with BatchExecutor(1, launcher=launcher(), max_tasks_per_worker=1) as executor:
        one, other = (
            executor.submit(lambda: (os.getpid(), hash("text"), os.environ.get("PYTHONHASHSEED")))
            for _ in range(2)
        )
        (one_pid, *one_seen), (other_pid, *other_seen) = one.result(60), other.result(60)
    assert one_pid != other_pid
    assert one_seen == other_seen == [one_seen[0], None]


def test_a_worker_whose_machine_dies_costs_no_task(aws: Any, launcher: Make) -> None:
    """Without a notice, AWS says afterwards what it was: the task runs again, unblamed."""
    batch = launcher(compute="ec2", kinds=("EC2",))
    with BatchExecutor(1, launcher=batch, retries=1) as executor:
        future = executor.submit(wait_for_file_or_die, "")
        job = eventually(lambda: [j for j in aws.jobs() if j.status == "RUNNING"])[0]
        eventually(lambda: executor.stats().tasks.running == 1)
        aws.faults.kill_instance(job.job_id)
        assert future.result(timeout=60) == "second"
        stats = executor.stats()
    assert stats.lost_attempts == 0
    assert stats.workers.reclaimed == 1


def test_a_spot_notice_hands_tasks_back_within_the_grace(
    aws: Any, launcher: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not finish in time runs again on the worker that AWS starts in its place."""
    batch = launcher(spot=True, environment={"CLOUDEXEC_DRAIN_GRACE": "0.5"})
    with BatchExecutor(1, launcher=batch, retries=1) as executor:
        future = executor.submit(wait_for_file_or_die, "")
        job = eventually(lambda: [j for j in aws.jobs() if j.status == "RUNNING"])[0]
        eventually(lambda: executor.stats().tasks.running == 1)
        aws.faults.reclaim(job.job_id)
        assert future.result(timeout=60) == "second"
        stats = executor.stats()
    assert stats.lost_attempts == 0
    assert len(submits(aws)) == 1, "AWS starts it again by itself"


def test_a_third_of_the_workers_is_reclaimed_in_mid_run(aws: Any, launcher: Make) -> None:
    """Nothing is lost, nothing fails, and no attempt is counted against a task."""
    batch = launcher(spot=True, environment={"CLOUDEXEC_DRAIN_GRACE": "0.5"})
    with BatchExecutor(6, launcher=batch) as executor:
        futures = [executor.submit(slow_square, n) for n in range(300)]
        eventually(lambda: executor.stats().workers.slots == 6)
        aws.faults.reclaim_fraction(1 / 3)
        assert [f.result(timeout=60) for f in futures] == [n * n for n in range(300)]
        stats = executor.stats()
    assert stats.lost_attempts == 0
    assert stats.tasks.failed == 0


def test_a_task_that_outgrows_its_worker_climbs_the_ladder(aws: Any, launcher: Make) -> None:
    """It is run on the next larger size, and what was enough is remembered."""
    batch = launcher(vcpus=0.25, memory=("512MiB", "1GiB"))
    with BatchExecutor(1, launcher=batch) as executor:
        assert executor.submit(fill, 700).result(timeout=60) == 700
        assert executor.submit(fill, 700).result(timeout=60) == 700
        lost = executor.stats().lost_attempts
    assert lost == 1
    memories = [r["containerOverrides"]["resourceRequirements"][1]["value"] for r in submits(aws)]
    assert memories == ["512", "1024"]


def test_a_task_too_large_for_every_size_says_so(aws: Any, launcher: Make) -> None:
    """The error tells memory from other deaths, with the peak."""
    batch = launcher(vcpus=0.25, memory="512MiB")
    with BatchExecutor(1, launcher=batch, retries=0) as executor:
        with pytest.raises(WorkerLostError, match="ran out of memory") as caught:
            executor.submit(fill, 700).result(timeout=60)
    assert caught.value.out_of_memory
    assert (caught.value.peak_memory_bytes or 0) > 300 * 2**20
    assert "memory=('512MiB', '1GiB')" in str(caught.value)


def test_an_image_that_cannot_be_pulled_fails_the_tasks_with_the_remedy(
    aws: Any, launcher: Make
) -> None:
    """The user reads AWS's words and what to do."""
    aws.faults.image_pull_fails()
    with BatchExecutor(2, launcher=launcher()) as executor:
        future = executor.submit(square, 1)
        with pytest.raises(
            LaunchError, match=r"CannotPullContainer.*cloudexec image push"
        ) as error:
            future.result(timeout=60)
    assert str(error.value).count("CannotPullContainer") == 1


def test_waiting_for_capacity_is_explained_first_and_an_error_later(
    aws: Any, launcher: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning while it lasts, then a LaunchError with the same reason."""
    batch = launcher()
    aws.faults.no_capacity()
    with caplog.at_level(logging.WARNING, logger="cloudexec"):
        with BatchExecutor(1, launcher=batch, launch_timeout=9.0) as executor:
            future = executor.submit(square, 1)
            eventually(lambda: "has no capacity of this kind" in caplog.text)
            aws.faults.capacity_returns()
            assert future.result(timeout=60) == 1


def test_capacity_that_never_comes_is_a_launch_error_with_the_reason(
    aws: Any, launcher: Make
) -> None:
    """Bounded in time, and it says what AWS said and what to do."""
    batch = launcher()
    aws.faults.no_capacity()
    for patience in (4.0, 10.0):  # on a busy machine AWS may not have said it in a short time
        with BatchExecutor(1, launcher=batch, launch_timeout=patience) as executor:
            with pytest.raises(LaunchError) as caught:
                executor.submit(square, 1).result(timeout=120)
        if "CAPACITY" in str(caught.value):
            break
    assert re.search(r"capacity.*CAPACITY.*another size", str(caught.value))
    assert caught.value.reason
    eventually(lambda: not unfinished(aws))


def test_the_budget_is_a_ceiling(aws: Any, launcher: Make) -> None:
    """Workers that cannot be paid for are not launched; when nobody can be, tasks fail."""
    with BatchExecutor(4, launcher=launcher(), max_cost_usd=0.0000001) as executor:
        with pytest.raises(BudgetExceededError, match="max_cost_usd"):
            executor.submit(square, 1).result(timeout=30)
    assert not submits(aws)


def test_no_more_workers_than_the_budget_allows(aws: Any, launcher: Make) -> None:
    """The first minute of each is what it costs at least."""
    # A worker of 1 vCPU with 2 GiB and a public address: about 0.0543 USD an hour.
    with BatchExecutor(8, launcher=launcher(), max_cost_usd=0.004) as executor:
        assert sum(executor.map(square, range(100))) == sum(n * n for n in range(100))
        cost = executor.cost()
    assert 0 < cost.accrued_usd <= 0.004
    (request,) = submits(aws)
    assert request["arrayProperties"]["size"] == 4


def test_credentials_that_expire_in_mid_run_stop_no_work(aws: Any, launcher: Make) -> None:
    """Workers that are there go on; launching waits for fresh ones."""
    with BatchExecutor(2, launcher=launcher()) as executor:
        assert executor.submit(square, 3).result() == 9
        aws.faults.expire_credentials()
        assert sum(executor.map(square, range(50))) == sum(n * n for n in range(50))
        aws.faults.renew_credentials(same=True)
    eventually(lambda: not unfinished(aws))


def test_an_unreachable_api_stops_no_work(aws: Any, launcher: Make) -> None:
    """Workers need AWS's API only to be born."""
    with BatchExecutor(2, launcher=launcher()) as executor:
        assert executor.submit(square, 3).result() == 9
        aws.faults.unreachable(2.0)
        assert sum(executor.map(square, range(50))) == sum(n * n for n in range(50))
    eventually(lambda: not unfinished(aws))


def test_a_client_that_is_killed_leaves_nothing_running(
    aws: Any, launcher: Make, tmp_path: Path
) -> None:
    """Workers notice by themselves, long before they would give up a network that is gone."""
    kill_a_client(launcher(), tmp_path / "client.py", 3)
    eventually(lambda: not unfinished(aws), timeout=30.0)


def test_ctrl_c_leaves_nothing_running(aws: Any, launcher: Make) -> None:
    """Leaving the with-block with KeyboardInterrupt ends every job."""

    def interrupted() -> None:
        with BatchExecutor(3, launcher=launcher(max_vcpus=2)) as executor:
            futures = [executor.submit(time.sleep, 60) for _ in range(3)]
            eventually(lambda: executor.stats().tasks.running == 2)
            assert not wait(futures, timeout=0).done
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 30
    eventually(lambda: not unfinished(aws), timeout=10.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vcpus": 3}, "nearest: 4 vCPU with 8 GiB"),
        ({"vcpus": 1, "memory": "9GiB"}, "1 vCPU with 8 GiB, or 2 vCPU with 9 GiB"),
        ({"vcpus": 1, "memory": "lots"}, "'2GiB'"),
        ({"memory": ("8GiB", "4GiB")}, "must grow"),
        ({"spot": "maybe"}, "'prefer'"),
        ({"arch": "mips"}, "arm64"),
        ({"compute": "lambda"}, "ec2"),
        ({"ephemeral_gib": 5}, "must be 21 or more"),
        ({"environment": {"A": 1}}, "strings"),
        ({"environment": "A=1"}, "strings"),
        ({"tags": []}, "strings"),
        ({"image": 5}, "image must be a string"),
        ({"profile": ""}, "profile must be a string"),
        ({"assign_public_ip": "no"}, "True or False"),
        ({"modules": 5}, "names of modules"),
        ({"max_runtime": 10**400}, "max_runtime"),
        ({"max_runtime": float("inf")}, "max_runtime"),
        ({"memory": 10**400}, "no worker has more"),
        ({"memory": 2.5}, "whole number of MiB"),
        ({"memory": b"2GiB"}, "whole number of MiB"),
        ({"memory": {"2GiB": 1}}, "whole number of MiB"),
        ({"compute": "ec2", "vcpus": 0.5}, "nearest: 1 vCPU with 1 GiB"),
        ({"compute": "ec2", "ephemeral_gib": 50}, "for Fargate"),
        ({"environment": {"AWS_BATCH_X": "1"}}, "AWS_BATCH"),
        ({"environment": {"CLOUDEXEC_KEY": "1"}}, "cloudexec's own"),
        ({"environment": {"A": "\0"}}, "NUL"),
        ({"tags": {"a#b": "c"}}, "'#'"),
        ({"share_identifier": "a-b"}, "letters and digits"),
        ({"scheduling_priority": 10_000}, "9999 or less"),
        ({"spot": 1.0}, "'prefer'"),
    ],
)
def test_wrong_settings_are_refused_with_the_right_ones_named(
    settings: dict[str, Any], words: str
) -> None:
    """Before anything is sent to AWS."""
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        Batch(**{"queue": "q", **settings})


def test_a_launcher_that_is_in_use_is_refused_without_harm(aws: Any, launcher: Make) -> None:
    """The second executor says so, and the first one's workers go on."""
    batch = launcher()
    with BatchExecutor(2, launcher=batch) as first:
        futures = [first.submit(slow_square, n) for n in range(40)]
        second = BatchExecutor(1, launcher=batch)
        with pytest.raises(LaunchError, match="serves an executor already"):
            second.submit(square, 1)
        second.shutdown()
        assert [f.result(timeout=60) for f in futures] == [n * n for n in range(40)]
    with BatchExecutor(1, launcher=batch) as third:
        assert third.submit(square, 4).result() == 16


def test_thousands_of_waiting_workers_end_with_one_request(aws: Any, launcher: Make) -> None:
    """Children of an array are ended through their parent."""
    batch = launcher()
    aws.faults.no_capacity()
    with BatchExecutor(3000, launcher=batch) as executor:
        futures = list(map(executor.submit, [square] * 3000, range(3000)))
        eventually(lambda: len(aws.jobs()) == 3001)
        executor.shutdown(wait=True, cancel_futures=True)
        assert all(future.cancelled() for future in futures)
    assert not unfinished(aws)
    ends = [r for r in aws.requests if r.operation in ("TerminateJob", "TerminateJobs")]
    assert len(ends) <= 2


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_that_were_told_to_end_have_not_failed(
    aws: Any, launcher: Make, workers: int
) -> None:
    """AWS Batch calls each job failed that was terminated; for us it has done what it was for."""
    batch = launcher()
    aws.faults.no_capacity()
    executor = BatchExecutor(workers, launcher=batch)
    for number in range(workers):
        executor.submit(square, number)
    eventually(aws.jobs)
    executor.shutdown(cancel_futures=True)
    eventually(lambda: not unfinished(aws))
    with Monitor(region=aws.region) as monitor:
        (job,) = monitor.jobs()
        assert dict(job.workers) == {"ENDED": workers}
        assert "failed" not in job.reason
        (found,) = monitor.executors(active=None)
        assert dict(found.workers) == {"ENDED": workers}


def test_a_lost_answer_before_the_shutdown_leaves_no_job(aws: Any, launcher: Make) -> None:
    """What may be there is looked for and ended."""
    batch = launcher()
    aws.faults.no_capacity()
    aws.faults.lose_response("SubmitJob")
    executor = BatchExecutor(3, launcher=batch)
    executor.submit(square, 1)
    eventually(aws.jobs)
    executor.shutdown(wait=True, cancel_futures=True)
    assert not unfinished(aws)


def test_fresh_credentials_are_read_in_mid_run(aws: Any, launcher: Make) -> None:
    """What launching waits for: the environment or the file has new ones, and it goes on."""
    batch = launcher()
    with BatchExecutor(1, launcher=batch) as executor:
        executor.submit(square, 1).result(timeout=30)
    aws.faults.expire_credentials()
    with BatchExecutor(1, launcher=batch) as executor:
        future = executor.submit(square, 3)
        eventually(lambda: "expired" in batch.explain())
        aws.faults.renew_credentials(same=False)
        assert future.result(timeout=30) == 9
    eventually(lambda: not unfinished(aws))


@pytest.mark.alone
def test_what_cannot_be_ended_is_said(
    aws: Any, launcher: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With credentials that expired, the shutdown is bounded, and names the jobs and the remedy."""
    monkeypatch.setattr("cloudexec._launchers.ending.PATIENCE", 2.0)
    batch = launcher()
    aws.faults.no_capacity()
    executor = BatchExecutor(2, launcher=batch)
    executor.submit(square, 1)
    (job,) = eventually(aws.jobs)
    aws.faults.expire_credentials()
    began = time.monotonic()
    executor.shutdown(wait=True, cancel_futures=True)
    assert time.monotonic() - began < 10
    assert f"{job.job_id}" in caplog.text
    assert "cloudexec stop --executor" in caplog.text


def test_a_definition_of_ones_own_is_used_as_it_is(aws: Any, launcher: Make) -> None:
    """By name or ARN; one that is not there is refused with where to look."""
    with BatchExecutor(1, launcher=launcher()) as executor:
        executor.submit(square, 1).result(timeout=30)
    name = submits(aws)[0]["jobDefinition"].rpartition("/")[2]
    queue = submits(aws)[0]["jobQueue"]
    for definition in (name, name.partition(":")[0]):
        batch = Batch(queue=queue, definition=definition, region=aws.region)
        with BatchExecutor(1, launcher=batch) as executor:
            assert executor.submit(square, 5).result(timeout=30) == 25
    batch = Batch(queue=queue, definition="nowhere", region=aws.region)
    executor = BatchExecutor(1, launcher=batch)
    with pytest.raises(ConfigError, match=r"no job definition 'nowhere'.*cloudexec definitions"):
        executor.submit(square, 1)
    executor.shutdown()


def test_workers_asked_for_one_by_one_share_a_job(aws: Any, launcher: Make) -> None:
    """A loop of submits that takes a while is one round, not many."""
    batch = launcher(max_vcpus=4)
    with BatchExecutor(2000, launcher=batch) as executor:
        for number in range(2000):
            executor.submit(square, number)
            if number % 100 == 0:
                executor.stats()
        (request,) = eventually(lambda: submits(aws))
        executor.shutdown(wait=True, cancel_futures=True)
    assert request["arrayProperties"]["size"] == 2000
    assert len(submits(aws)) == 1


@pytest.mark.parametrize("launcher", [Batch, b"batch", 5, False])
def test_what_is_no_launcher_is_refused(launcher: Any) -> None:
    """The class instead of an object of it is an easy mistake."""
    with pytest.raises(TypeError, match=r"launcher must be one such as Local\(\) or Batch\(\)"):
        BatchExecutor(1, launcher=launcher)
