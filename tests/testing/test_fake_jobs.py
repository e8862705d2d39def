"""What a job goes through: its environment, its states, its ends."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest
from fake_helpers import Account, eventually

from cloudexec.testing import FakeAWS

ESSENTIAL = "Essential container in task exited"


def test_plain_job_runs_its_command_and_succeeds(account: Account) -> None:
    """A job that exits 0 ends SUCCEEDED with AWS's texts, times and one attempt."""
    job_id = account.submit("echo hello")
    assert account.ended(job_id).status == "SUCCEEDED"
    shown = account.detail(job_id)
    assert shown["statusReason"] == ESSENTIAL
    assert shown["container"]["exitCode"] == 0
    assert len(shown["attempts"]) == 1
    assert shown["createdAt"] <= shown["startedAt"] <= shown["stoppedAt"]
    assert account.aws.logs(job_id) == ["hello"]


def test_exit_code_of_a_failing_job_is_shown(account: Account) -> None:
    job_id = account.submit("exit 7")
    assert account.ended(job_id).exit_code == 7
    shown = account.detail(job_id)
    assert shown["status"] == "FAILED"
    assert shown["statusReason"] == ESSENTIAL
    assert shown["attempts"][0]["container"]["exitCode"] == 7


def test_job_sees_exactly_what_aws_sets(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch's variables and the definition's are there, the client's are not."""
    monkeypatch.setenv("CLIENT_SECRET", "x")
    definition = account.define(
        "env; pwd", environment=[{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
    )
    job_id = account.submit(
        jobDefinition=definition,
        containerOverrides={"environment": [{"name": "B", "value": "3"}]},
    )
    account.ended(job_id)
    found = dict(line.split("=", 1) for line in account.aws.logs(job_id) if "=" in line)
    assert found["A"] == "1"
    assert found["B"] == "3"
    assert found["AWS_BATCH_JOB_ID"] == job_id
    assert found["AWS_BATCH_JOB_ATTEMPT"] == "1"
    assert found["AWS_BATCH_CE_NAME"] == "test-1"
    assert found["AWS_BATCH_JQ_NAME"] == "test"
    assert found["ECS_CONTAINER_METADATA_URI_V4"].startswith("http://127.0.0.1:")
    foreign = {
        "CLIENT_SECRET",
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_BATCH_JOB_ARRAY_INDEX",
    }
    assert not foreign & set(found)


def test_job_finds_itself_at_the_metadata_endpoint(account: Account) -> None:
    script = (
        "python -c 'import json,os,urllib.request as u; "
        'print(json.load(u.urlopen(os.environ["ECS_CONTAINER_METADATA_URI_V4"]+"/task"))'
        '["TaskARN"])\''
    )
    job_id = account.submit(script)
    account.ended(job_id)
    shown = account.detail(job_id)
    assert account.aws.logs(job_id) == [shown["attempts"][0]["container"]["taskArn"]]


def test_parameters_are_substituted_in_the_command(account: Account) -> None:
    definition = account.define(command=["echo", "Ref::what", "Ref::other"])
    job_id = account.submit(jobDefinition=definition, parameters={"what": "yes"})
    account.ended(job_id)
    assert account.aws.logs(job_id) == ["yes Ref::other"]


def test_job_without_command_runs_the_worker(account: Account) -> None:
    """The image's entry point is the worker, which says what it misses."""
    job_id = account.submit()
    assert account.ended(job_id).exit_code != 0
    assert any("CLOUDEXEC_TARGET" in line for line in account.aws.logs(job_id))


def test_children_of_an_array_job_know_their_place(account: Account) -> None:
    """Each child has its own index; the parent waits PENDING and sums up."""
    job_id = account.submit(
        "echo $AWS_BATCH_JOB_ARRAY_INDEX of $AWS_BATCH_JOB_ARRAY_SIZE; sleep 0.1",
        arrayProperties={"size": 3},
    )
    seen = set()

    def parent_ended() -> bool:
        seen.add(account.aws.job(job_id).status)
        return bool({"SUCCEEDED", "FAILED"} & seen)

    eventually(parent_ended)
    assert seen <= {"SUBMITTED", "PENDING", "SUCCEEDED"}
    for index in range(3):
        child = account.detail(f"{job_id}:{index}")
        assert child["arrayProperties"]["index"] == index
        assert account.aws.logs(f"{job_id}:{index}") == [f"{index} of 3"]
    summary = account.detail(job_id)["arrayProperties"]
    assert summary["size"] == 3
    assert summary["statusSummary"]["SUCCEEDED"] == 3


def test_array_job_fails_when_its_last_child_has_ended_and_any_failed(account: Account) -> None:
    job_id = account.submit(
        "if [ $AWS_BATCH_JOB_ARRAY_INDEX = 0 ]; then exit 1; fi; sleep 0.3",
        arrayProperties={"size": 2},
    )
    account.reach(f"{job_id}:0", "FAILED")
    assert account.aws.job(job_id).status == "PENDING"
    parent = account.ended(job_id)
    assert parent.status == "FAILED"
    assert parent.status_reason == "Array Child Job failed"
    assert account.aws.job(f"{job_id}:1").status == "SUCCEEDED"


def test_output_can_be_read_while_the_job_runs(account: Account) -> None:
    """The stream is named from RUNNING on, has no colon, and fills line by line."""
    job_id = account.submit("echo first; sleep 30", arrayProperties={"size": 2}) + ":1"
    account.prints(job_id, "first")
    assert account.aws.job(job_id).status == "RUNNING"
    stream = account.detail(job_id)["container"]["logStreamName"]
    assert ":" not in stream
    assert stream.startswith("definition-1/default/")
    events = account.logs.get_log_events(
        logGroupName="/aws/batch/job", logStreamName=stream, startFromHead=True
    )["events"]
    assert [event["message"] for event in events] == ["first"]


def test_output_goes_to_the_group_of_the_definition(account: Account) -> None:
    account.logs.create_log_group(logGroupName="/mine")
    options = {"awslogs-group": "/mine", "awslogs-stream-prefix": "worker"}
    job_id = account.submit(
        jobDefinition=account.define(
            "echo hello", logConfiguration={"logDriver": "awslogs", "options": options}
        )
    )
    account.ended(job_id)
    stream = account.detail(job_id)["container"]["logStreamName"]
    assert stream.startswith("worker/default/")
    found = account.logs.get_log_events(logGroupName="/mine", logStreamName=stream)
    assert found["events"][0]["message"] == "hello"


def test_a_line_that_is_too_long_for_an_event_becomes_several(account: Account) -> None:
    line = """python3 -c 'print("x" + "ä" * 150_000)'"""
    job_id = account.submit(line)
    account.ended(job_id)
    stream = account.detail(job_id)["container"]["logStreamName"]
    events = account.logs.get_log_events(
        logGroupName="/aws/batch/job", logStreamName=stream, startFromHead=True
    )["events"]
    assert len(events) == 2
    assert "".join(event["message"] for event in events) == "x" + "ä" * 150_000


def test_job_with_a_missing_log_group_does_not_start(account: Account) -> None:
    job_id = account.submit(
        jobDefinition=account.define(
            "echo hello",
            logConfiguration={"logDriver": "awslogs", "options": {"awslogs-group": "/none"}},
        )
    )
    assert account.ended(job_id).status_reason.startswith(  # type: ignore[union-attr]
        "ResourceInitializationError: failed to validate logger args"
    )


# Stopping.


def test_terminated_job_gets_sigterm_first(account: Account) -> None:
    """SIGTERM, time to end, and the caller's reason whatever the exit code."""
    job_id = account.submit(
        "trap 'echo stopping; exit 0' TERM; echo up; while :; do sleep 0.05; done"
    )
    account.prints(job_id, "up")
    account.batch.terminate_job(jobId=job_id, reason="enough")
    job = account.ended(job_id)
    assert job.status == "FAILED"
    assert job.status_reason == "enough"
    assert job.exit_code == 0
    assert "stopping" in account.aws.logs(job_id)
    assert account.detail(job_id)["isTerminated"]


def test_job_that_ignores_sigterm_is_killed_after_the_grace(account: Account) -> None:
    job_id = account.submit("trap '' TERM; echo up; while :; do sleep 0.05; done")
    account.prints(job_id, "up")
    started = time.monotonic()
    account.batch.terminate_job(jobId=job_id, reason="enough")
    assert account.ended(job_id).exit_code == 137
    assert time.monotonic() - started >= 0.9


def test_job_without_a_handler_ends_by_the_signal(account: Account) -> None:
    job_id = account.submit("echo up; exec sleep 60")
    account.prints(job_id, "up")
    account.batch.terminate_job(jobId=job_id, reason="enough")
    assert account.ended(job_id).exit_code == 143


def test_children_are_stopped_with_their_parent(account: Account) -> None:
    """Terminating a parent ends all children, those that wait too."""
    job_id = account.submit("exec sleep 60", arrayProperties={"size": 20})
    eventually(lambda: account.detail(job_id)["arrayProperties"]["statusSummary"]["RUNNING"] == 16)
    account.batch.terminate_job(jobId=job_id, reason="enough")
    parent = account.ended(job_id)
    assert parent.status_reason == "enough"
    children = [job for job in account.aws.jobs() if job.parent == job_id]
    assert {(job.status, job.status_reason) for job in children} == {("FAILED", "enough")}


def test_nothing_of_a_job_outlives_its_main_process(account: Account) -> None:
    """A container ends with its main process, and so do processes that left its session."""
    job_id = account.submit("setsid sleep 61 & echo $!; sleep 0.5; exit 0")
    account.ended(job_id)
    pid = int(account.aws.logs(job_id)[0])

    def gone() -> bool:
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().split()[2] == "Z"
        except FileNotFoundError:
            return True

    eventually(gone)


def test_cancel_stops_a_waiting_job_and_leaves_a_running_one(account: Account) -> None:
    account.aws.faults.no_capacity()
    waiting = account.submit("exit 0")
    account.reach(waiting, "RUNNABLE")
    account.batch.cancel_job(jobId=waiting, reason="not needed")
    assert account.ended(waiting).status_reason == "not needed"
    assert account.detail(waiting)["isCancelled"]
    account.aws.faults.clear()
    running = account.submit("echo up; sleep 0.2")
    account.prints(running, "up")
    account.batch.cancel_job(jobId=running, reason="not needed")
    assert account.ended(running).status == "SUCCEEDED"


def test_bulk_calls_take_fifty_ids_and_count_unknown_ones_as_done(account: Account) -> None:
    jobs = [account.submit("exec sleep 60"), "unknown"]
    answer = account.batch.terminate_jobs(jobs=jobs, reason="enough")
    assert answer["successful"] == jobs
    assert answer["errors"] == []
    assert account.ended(jobs[0]).status_reason == "enough"
    with pytest.raises(account.batch.exceptions.ClientException):
        account.batch.terminate_jobs(jobs=["x"] * 51, reason="enough")


def test_attempt_that_takes_too_long_is_stopped() -> None:
    """The timeout counts from the attempt's start; ``speed`` makes AWS's minute a short one."""
    with FakeAWS(step=0.005, speed=200.0, grace=1.0) as aws:
        account = Account(aws)
        job_id = account.submit("exec sleep 60", timeout={"attemptDurationSeconds": 60})
        job = account.ended(job_id)
        account.close()
    assert job.status_reason == "Job attempt duration exceeded timeout"


# Retries.


def test_failed_attempt_is_retried_with_the_same_id(account: Account) -> None:
    job_id = account.submit(
        "echo attempt $AWS_BATCH_JOB_ATTEMPT; [ $AWS_BATCH_JOB_ATTEMPT = 3 ]",
        retryStrategy={"attempts": 5},
    )
    job = account.ended(job_id)
    assert job.status == "SUCCEEDED"
    assert [attempt.exit_code for attempt in job.attempts] == [1, 1, 0]
    assert account.aws.logs(job_id) == ["attempt 1", "attempt 2", "attempt 3"]


@pytest.mark.parametrize(
    ("rules", "attempts"),
    [
        ([{"onExitCode": "3", "action": "RETRY"}, {"onReason": "*", "action": "EXIT"}], 3),
        ([{"onExitCode": "4", "action": "RETRY"}, {"onReason": "*", "action": "EXIT"}], 1),
        ([{"onExitCode": "3*", "onStatusReason": "Host EC2*", "action": "EXIT"}], 3),
        ([{"onStatusReason": "Essential*", "action": "EXIT"}], 1),
        ([{"onStatusReason": "Essential", "action": "EXIT"}], 3),
    ],
    ids=["fits", "falls-through", "all-conditions", "star", "exact"],
)
def test_rules_decide_over_a_retry(account: Account, rules: Any, attempts: int) -> None:
    """The first rule of which all conditions fit decides; without one the job is retried."""
    job_id = account.submit("exit 3", retryStrategy={"attempts": 3, "evaluateOnExit": rules})
    assert len(account.ended(job_id).attempts) == attempts


def test_terminated_job_is_not_retried(account: Account) -> None:
    job_id = account.submit("echo up; exec sleep 60", retryStrategy={"attempts": 3})
    account.prints(job_id, "up")
    account.batch.terminate_job(jobId=job_id, reason="enough")
    assert len(account.ended(job_id).attempts) == 1


# Waiting.


def test_jobs_wait_for_capacity_in_order(aws: FakeAWS) -> None:
    """No more run than maxvCpus allows, and the first that waits goes first."""
    account = Account(aws, max_vcpus=2)
    definition = account.define("sleep 0.1; echo done")
    jobs = [account.submit(jobDefinition=definition) for _ in range(6)]
    most = 0

    def all_ended() -> bool:
        nonlocal most
        states = [aws.job(job_id).status for job_id in jobs]
        most = max(most, sum(state in ("STARTING", "RUNNING") for state in states))
        return all(state == "SUCCEEDED" for state in states)

    eventually(all_ended)
    account.close()
    assert most == 2
    starts = [aws.job(job_id).started_at or 0.0 for job_id in jobs]
    assert all(early < late for early, late in zip(starts, starts[2:], strict=False))


def test_job_at_the_head_blocks_those_behind_it(aws: FakeAWS) -> None:
    """A queue is first in, first out, even where a later job would fit."""
    account = Account(aws, max_vcpus=2)
    first = account.submit("echo up; exec sleep 60")
    account.prints(first, "up")
    large = account.submit(
        "exit 0",
        containerOverrides={
            "resourceRequirements": [
                {"type": "VCPU", "value": "2"},
                {"type": "MEMORY", "value": "4096"},
            ]
        },
    )
    small = account.submit("exit 0")
    account.reach(small, "RUNNABLE")
    front = account.batch.get_job_queue_snapshot(jobQueue=account.setup.queue)
    arns = [job["jobArn"] for job in front["frontOfQueue"]["jobs"]]
    assert [arn.rpartition("/")[2] for arn in arns] == [large, small]
    account.batch.terminate_job(jobId=first, reason="room")
    account.ended(small)
    account.close()
    assert (aws.job(large).started_at or 0) <= (aws.job(small).started_at or 0)


def test_second_environment_takes_what_the_first_has_no_room_for(aws: FakeAWS) -> None:
    account = Account(aws, kinds=("FARGATE_SPOT", "FARGATE"), max_vcpus=1)
    jobs = [account.submit("echo up; exec sleep 60") for _ in range(2)]
    for job_id in jobs:
        account.prints(job_id, "up")
    account.close()
    assert [aws.job(job_id).spot for job_id in jobs] == [True, False]


def test_job_waits_for_those_that_it_depends_on(account: Account, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    first = account.submit(f"until [ -e {gate} ]; do sleep 0.02; done")
    second = account.submit("exit 0", dependsOn=[{"jobId": first}])
    account.reach(second, "PENDING")
    gate.touch()
    assert account.ended(second).status == "SUCCEEDED"
    assert account.aws.job(first).status == "SUCCEEDED"
    failed = account.submit("exit 1")
    after = account.submit("exit 0", dependsOn=[{"jobId": failed}])
    assert account.ended(after).status == "FAILED"


def test_children_wait_for_their_like_or_for_the_one_before(account: Account) -> None:
    """N_TO_N pairs children by index, SEQUENTIAL runs them one after another."""
    first = account.submit(
        "[ $AWS_BATCH_JOB_ARRAY_INDEX = 0 ] || exec sleep 60", arrayProperties={"size": 2}
    )
    second = account.submit(
        "exit 0",
        arrayProperties={"size": 2},
        dependsOn=[{"jobId": first, "type": "N_TO_N"}],
    )
    assert account.ended(f"{second}:0").status == "SUCCEEDED"
    assert account.aws.job(f"{second}:1").status == "PENDING"
    account.batch.terminate_job(jobId=first, reason="enough")
    assert account.ended(second).status == "FAILED"
    third = account.submit(
        "exit 0", arrayProperties={"size": 3}, dependsOn=[{"type": "SEQUENTIAL"}]
    )
    assert account.ended(third).status == "SUCCEEDED"
    times = [account.aws.job(f"{third}:{index}") for index in range(3)]
    for before, after in itertools.pairwise(times):
        assert (before.stopped_at or 0) <= (after.started_at or 0)


def test_ten_thousand_children_start_only_as_capacity_allows(account: Account) -> None:
    """The largest array is taken, listed and stopped in seconds, with 16 processes at a time."""
    started = time.monotonic()
    job_id = account.submit("exec sleep 60", arrayProperties={"size": 10_000})
    eventually(lambda: account.detail(job_id)["arrayProperties"]["statusSummary"]["RUNNING"] == 16)
    children = [job for job in account.aws.jobs() if job.parent == job_id]
    assert sum(job.pid is not None for job in children) == 16
    pages = list(
        account.batch.get_paginator("list_jobs").paginate(arrayJobId=job_id, jobStatus="RUNNABLE")
    )
    assert len(pages) == 10
    assert sum(len(page["jobSummaryList"]) for page in pages) == 9984
    account.batch.terminate_job(jobId=job_id, reason="enough")
    account.ended(job_id)
    assert time.monotonic() - started < 20


def test_leaving_kills_what_runs(tmp_path: Any) -> None:
    """No process, thread or file is left behind."""
    import threading

    before = set(threading.enumerate())
    with FakeAWS(step=0.005) as aws:
        account = Account(aws)
        job_id = account.submit("trap '' TERM; echo up; while :; do sleep 0.1; done")
        account.prints(job_id, "up")
        pid = aws.job(job_id).pid
        account.close()
    assert set(threading.enumerate()) <= before
    assert pid is not None
    assert not os.path.exists(f"/proc/{pid}")


# As slow and as small as the real one, on request.


def _waiting(account: Account, *, size: int) -> str:
    """Submit workers that do nothing for long."""
    return account.submit("exec sleep 60", arrayProperties={"size": size})


def _placed(account: Account) -> int:
    return sum(job.status in ("STARTING", "RUNNING") for job in account.aws.jobs())


def test_an_instance_boots_before_its_first_job() -> None:
    """A second job that fits on it does not wait for another."""
    with FakeAWS(step=0.005, boot=1.0) as aws:
        account = Account(aws, kinds=("EC2",))
        first = account.ended(account.submit("exit 0"))
        second = account.ended(account.submit("exit 0"))
        account.close()
    assert (first.started_at or 0) - first.created_at >= 1.0
    assert (second.started_at or 0) - second.created_at < 1.0


def test_fargate_starts_so_many_tasks_at_once() -> None:
    """The others follow at the rate; here none does within the test."""
    with FakeAWS(step=0.005, launch_rate=(2, 0.001)) as aws:
        account = Account(aws)
        _waiting(account, size=4)
        eventually(lambda: _placed(account) == 2)
        states = [job.status for job in aws.jobs() if job.index is not None]
        assert states.count("RUNNABLE") == 2
        account.close()


def test_a_new_account_runs_six_vcpus() -> None:
    """And says so when it is asked for its quotas."""
    with FakeAWS(step=0.005, new_account=True) as aws:
        account = Account(aws)
        _waiting(account, size=8)
        eventually(lambda: _placed(account) == 6)
        quotas = account.service_quotas.list_service_quotas(ServiceCode="fargate")["Quotas"]
        assert {each["Value"] for each in quotas} == {6.0}
        account.close()
