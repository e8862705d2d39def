"""The Lambda launcher against an emulated AWS Lambda that runs real workers."""

from __future__ import annotations

import asyncio
import bisect
import json
import multiprocessing
import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from launcher_helpers import eventually, kill_when
from launcher_tasks import fill, square

from cloudexec import (
    BatchExecutor,
    BudgetExceededError,
    ConfigError,
    Fallback,
    Lambda,
    LaunchError,
    Local,
    TaskTimeoutError,
    WorkerLostError,
)
from cloudexec._aws.prices import PriceTable
from cloudexec._launchers.aws.pacer import Pacer
from cloudexec._launchers.lambda_ import asking
from cloudexec.launchers import ExecutorInfo, Inspection, JobRequest
from cloudexec.testing import FakeAWS
from cloudexec.testing._aws.function_environments import isolates

Make = Callable[..., Lambda]


def squares(executor: BatchExecutor, count: int = 100) -> None:
    assert list(executor.map(square, range(count))) == [n * n for n in range(count)]


def running(aws: Any) -> list[Any]:
    return [each for each in aws.invocations() if each.status in ("queued", "running")]


def events(aws: Any) -> list[dict[str, Any]]:
    return [json.loads(each.payload) for each in aws.invocations()]


def calls(aws: Any, operation: str) -> list[dict[str, Any]]:
    return [each.parameters for each in aws.requests if each.operation == operation]


# What is asked for.


def test_a_map_runs_in_a_function_that_is_made_once(aws: Any, function: Make) -> None:
    """Each invocation is one worker; an environment that is there is used again, from the start."""
    launcher = function(memory="3538MiB", disk="1GiB", tags={"a": "b"})
    for _ in range(2):
        with BatchExecutor(4, launcher=launcher, min_workers=4) as executor:
            squares(executor, 300)
            eventually(lambda: executor.stats().workers.slots == 4)
        eventually(lambda: not running(aws))
    assert [each.status for each in aws.invocations()] == ["succeeded"] * 4
    assert [each.left_running for each in aws.invocations()] == [0] * 4
    assert len({each.environment for each in aws.invocations()}) == 2
    names = [each["session"]["name"] for each in events(aws)]
    assert len(set(names)) == 4
    (made,) = calls(aws, "CreateFunction")
    assert (made["MemorySize"], made["EphemeralStorage"]["Size"]) == (3538, 1024)
    assert (made["Timeout"], made["PackageType"]) == (900, "Image")
    assert {"a", "cloudexec:user"} <= made["Tags"].keys()
    assert "VpcConfig" not in made
    (first, *_) = calls(aws, "PutFunctionEventInvokeConfig")
    assert (first["MaximumRetryAttempts"], first["MaximumEventAgeInSeconds"]) == (0, 60)


def test_the_key_is_in_no_place_that_can_be_read(aws: Any, function: Make) -> None:
    """Neither in the function nor in the log: in the event alone, and another one in each."""
    with BatchExecutor(2, launcher=function(), min_workers=2) as executor:
        assert "CLOUDEXEC_KEY" not in executor.submit(lambda: dict(os.environ)).result(timeout=60)
        eventually(lambda: executor.stats().workers.slots == 2)
    keys = {each["environment"]["CLOUDEXEC_KEY"] for each in events(aws)}
    assert len(keys) == 2
    eventually(lambda: not running(aws))
    (made,) = calls(aws, "CreateFunction")
    shown = json.dumps(made) + "".join(lines(aws))
    assert not any(key in shown for key in keys)


def lines(aws: Any) -> list[str]:
    """Return what stands in all logs of functions."""
    logs = boto3.client("logs", region_name=aws.region)
    groups = [each["logGroupName"] for each in logs.describe_log_groups()["logGroups"]]
    return [
        each["message"]
        for group in groups
        if group.startswith("/aws/lambda/")
        for each in logs.filter_log_events(logGroupName=group)["events"]
    ]


def surroundings() -> dict[str, Any]:
    found: dict[str, Any] = {"shm": os.path.exists("/dev/shm"), "tmp": os.environ["TMPDIR"]}
    for name, action in (
        ("root", lambda: Path("/written").write_text("x")),
        ("lock", multiprocessing.Lock),
    ):
        try:
            action()
        except OSError as exc:
            found[name] = exc.errno
    Path(os.environ["TMPDIR"], "mine").write_text("x")
    Path("/tmp/mine").write_text("x")
    return found


def total(values: Any) -> float:
    return float(values.sum())


@pytest.mark.skipif(not isolates(), reason="this process may not make mount namespaces")
def test_workers_need_no_dev_shm_and_write_to_tmp_alone(aws: Any, function: Make) -> None:
    """Slots, large arguments, shared ones and large results do without."""
    import numpy

    values = numpy.arange(3_000_000, dtype=float)
    with BatchExecutor(2, launcher=function(memory="3538MiB")) as executor:
        found = executor.submit(surroundings).result(timeout=60)
        assert not found["shm"]
        assert found["tmp"].startswith("/tmp/cloudexec-")
        assert found["root"] > 0
        assert found["lock"] > 0
        assert set(executor.map(total, [values] * 4)) == {values.sum()}
        handle = executor.put(values)
        assert executor.submit(total, handle).result(timeout=60) == values.sum()
        assert executor.submit(numpy.ones, 3_000_000).result(timeout=60).nbytes == 24_000_000


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"memory": "20GiB"}, r"functions of 10 GiB at most.*Fargate"),
        ({"memory": 128}, "a worker needs 512 MiB or more"),
        ({"memory": ("4GiB", "2GiB")}, "must grow"),
        ({"memory": ()}, "not an empty sequence"),
        ({"memory": 1.5}, "memory must be"),
        ({"disk": "20GiB"}, r"512 MiB to 10 GiB of /tmp"),
        ({"max_runtime": 3600}, r"30 to 900 s, not 3600.*15 minutes.*Fargate"),
        ({"max_runtime": 5}, "30 to 900 s"),
        ({"arch": "sparc"}, "arch must be"),
        ({"vpc": "yes"}, "vpc must be"),
        ({"vpc": False, "subnets": ["subnet-1"]}, "vpc=False.*no use for subnet-1"),
        ({"vpc": False, "security_groups": ["sg-1"]}, "vpc=False.*no use for sg-1"),
        ({"subnets": ["a", ""]}, "subnets must be ids"),
        ({"reserved_concurrency": 0}, "reserved_concurrency"),
        ({"role": " "}, "role must be a string"),
        ({"packages": "here"}, "either packages or image"),
    ],
)
def test_wrong_settings_are_refused(function: Make, settings: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        function(**settings)


def test_memory_decides_how_many_slots_there_are(function: Make) -> None:
    assert function().slots == 1
    assert function(memory="10GiB").slots == 5
    assert function(memory="10GiB", slots_per_worker=8).slots == 8
    launcher = function(memory=("1769MiB", "4GiB"))
    assert [each.cpus for each in launcher.capacities()] == [1.0, 2.32]
    size = launcher.size_of(launcher.size_for(3, 2**30, 0))
    assert size.memory_mib == 3 * 1769
    with pytest.raises(ConfigError, match=r"no worker for a task with cpus=8.*5\.8 vCPU"):
        launcher.size_for(8, 2**30, 0)
    with pytest.raises(ConfigError, match="has no GPUs"):
        launcher.size_for(1, 2**30, 1)


def test_a_task_that_outgrows_its_worker_climbs_the_ladder(aws: Any, function: Make) -> None:
    with BatchExecutor(1, launcher=function(memory=("512MiB", "1GiB"))) as executor:
        assert executor.submit(fill, 700).result(timeout=90) == 700
    assert [each["MemorySize"] for each in calls(aws, "CreateFunction")] == [512, 1024]


def test_an_environment_that_is_too_long_is_refused_before_it_is_sent(
    aws: Any, function: Make
) -> None:
    with BatchExecutor(1, launcher=function(environment={"LONG": "x" * 300_000})) as executor:
        with pytest.raises(LaunchError, match=r"bytes as JSON; AWS Lambda takes 262144.*'LONG'"):
            executor.submit(square, 1).result(timeout=60)
    assert not aws.invocations()


# The time limit.


@pytest.fixture
def hasty() -> Iterator[FakeAWS]:
    """An account in which a session of 30 seconds lasts for 5."""
    with FakeAWS(grace=2.0, calls_per_second=1000, speed=6.0) as fake:
        yield fake


@pytest.fixture
def short(hasty: FakeAWS) -> Lambda:
    made = hasty.set_up("function")
    image = f"123456789012.dkr.ecr.us-east-1.amazonaws.com/worker@sha256:{'0' * 64}"
    return Lambda(role=made.function_role, region=hasty.region, image=image, max_runtime=30)


def test_a_session_hands_its_tasks_back_and_is_replaced(hasty: FakeAWS, short: Lambda) -> None:
    """No task counts it as a lost attempt, and nobody is killed by Lambda."""
    with BatchExecutor(1, launcher=short, retries=1) as executor:
        futures = [executor.submit(time.sleep, 0.9) for _ in range(9)]
        for future in futures:
            future.result(timeout=60)
        assert executor.stats().tasks.failed == 0
    eventually(lambda: not running(hasty))
    assert len(hasty.invocations()) >= 2
    assert {each.status for each in hasty.invocations()} == {"succeeded"}
    assert {each.answer["exit_code"] for each in hasty.invocations()} <= {0, 143}


def test_a_task_that_needs_more_than_a_session_fails_and_says_so(
    hasty: FakeAWS, short: Lambda
) -> None:
    with BatchExecutor(1, launcher=short) as executor:
        with pytest.raises(TaskTimeoutError, match=r"15 minutes at most.*Fargate\(\.\.\.\)"):
            executor.submit(time.sleep, 60).result(timeout=60)
        assert executor.submit(square, 3).result(timeout=60) == 9
    assert {each.status for each in hasty.invocations()} <= {"succeeded", "running"}


def test_a_worker_that_hangs_is_killed_by_lambda_at_the_latest(
    hasty: FakeAWS, short: Lambda
) -> None:
    """Without notice to anybody: its tasks run again."""
    with BatchExecutor(1, launcher=short) as executor:
        future = executor.submit(time.sleep, 1.0)
        eventually(lambda: executor.stats().tasks.running == 1)
        (event,) = hasty.invocations()
        os.kill(event.pid, signal.SIGSTOP)  # the one that would see to the time
        future.result(timeout=60)
        eventually(lambda: event.status == "timed out")


# Deliveries.


def test_an_event_that_comes_twice_is_one_worker(aws: Any, function: Make) -> None:
    aws.faults.functions.deliver_twice()
    with BatchExecutor(2, launcher=function(), min_workers=2) as executor:
        squares(executor)
        eventually(lambda: executor.stats().workers.slots == 2)
        eventually(lambda: len(aws.invocations()) == 4 and len(running(aws)) == 2)
        squares(executor)
    ended = [each.answer["exit_code"] for each in aws.invocations() if each.answer]
    assert ended.count(3) == 2, "the second one was refused, and returned at once"
    assert executor.stats().lost_attempts == 0


def test_an_event_that_comes_again_after_the_end_is_refused(aws: Any, function: Make) -> None:
    aws.faults.functions.deliver_twice(1, after=2.0)
    with BatchExecutor(1, launcher=function(), idle_timeout=0.1) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
        eventually(lambda: [each.status for each in aws.invocations()] == ["succeeded"] * 2)
        assert executor.submit(square, 3).result(timeout=60) == 9


def test_an_event_that_comes_after_a_minute_does_nothing(
    aws: Any, function: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudexec._launchers.lambda_.platform.UNSEEN", 2.0)
    aws.faults.functions.deliver_late(4.0, 1)
    with BatchExecutor(1, launcher=function()) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
        late = aws.invocations()[0]
        eventually(lambda: late.answer)
    assert late.answer == {"outcome": "late"}
    assert late.billed_ms < 3000


@pytest.mark.parametrize("event", [b"[1]", b'{"environment": {"A": "1"}, "session": 3}'])
def test_events_of_others_are_refused_and_change_nothing(
    aws: Any, function: Make, event: bytes
) -> None:
    """Whoever tries the function in AWS's console, say."""
    with BatchExecutor(1, launcher=function()) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
        name = calls(aws, "CreateFunction")[0]["FunctionName"]
        client = boto3.client("lambda", region_name=aws.region)
        client.invoke(FunctionName=name, InvocationType="Event", Payload=event)
        foreign = aws.invocations()[-1]
        eventually(lambda: foreign.status == "failed")
        assert "only cloudexec.Lambda(...) invokes it" in foreign.answer["errorMessage"]
        assert executor.submit(square, 3).result(timeout=60) == 9


def test_a_lost_answer_runs_no_task_twice(aws: Any, function: Make) -> None:
    aws.faults.lose_response("Invoke", 2)
    with BatchExecutor(1, launcher=function()) as executor:
        squares(executor)
        assert executor.stats().workers.slots == 1
    assert len(aws.invocations()) == 3


def test_throttled_calls_are_made_again(aws: Any, function: Make) -> None:
    aws.faults.throttle("Invoke", 8)
    with BatchExecutor(1, launcher=function()) as executor:
        squares(executor)


# Functions.


def test_a_function_that_is_prepared_is_waited_for(aws: Any, function: Make) -> None:
    aws.faults.functions.pending = 1.5
    with BatchExecutor(1, launcher=function()) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4


def test_a_function_that_was_not_used_for_weeks_is_waited_for(aws: Any, function: Make) -> None:
    """The first invocation is refused, and makes Lambda prepare the function."""
    launcher = function()
    with BatchExecutor(1, launcher=launcher) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
    aws.faults.functions.inactive = True
    with BatchExecutor(1, launcher=launcher) as executor:
        assert executor.submit(square, 3).result(timeout=60) == 9


def test_a_function_that_was_removed_is_made_again(aws: Any, function: Make) -> None:
    with BatchExecutor(1, launcher=function(), idle_timeout=0.1) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
        eventually(lambda: not running(aws))
        name = calls(aws, "CreateFunction")[0]["FunctionName"]
        boto3.client("lambda", region_name=aws.region).delete_function(FunctionName=name)
        assert executor.submit(square, 3).result(timeout=60) == 9
    assert len(calls(aws, "CreateFunction")) == 2


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (("The image was deleted", "ImageDeleted"), r"ImageDeleted.*image push"),
        (("No addresses", "SubnetOutOfIPAddresses"), r"other subnets, or vpc=False"),
        (("Internal", "InternalError"), "cloudexec doctor"),
    ],
)
def test_a_function_that_cannot_be_prepared_is_an_error(
    aws: Any, function: Make, failure: tuple[str, str], said: str
) -> None:
    aws.faults.functions.failure = failure
    with BatchExecutor(1, launcher=function()) as executor:
        with pytest.raises(LaunchError, match=said):
            executor.submit(square, 1).result(timeout=60)
    if failure[1] == "ImageDeleted":  # and made anew when it can be
        aws.faults.clear()
        with BatchExecutor(1, launcher=function()) as executor:
            assert executor.submit(square, 3).result(timeout=60) == 9


def test_functions_that_are_old_are_removed_when_one_is_made(
    aws: Any, function: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is used after all is made again."""
    for memory in (1769, 1770):
        with BatchExecutor(1, launcher=function(memory=memory)) as executor:
            assert executor.submit(square, 2).result(timeout=60) == 4
        eventually(lambda: not running(aws))
    client = boto3.client("lambda", region_name=aws.region)
    assert len(client.list_functions()["Functions"]) == 2
    monkeypatch.setattr("cloudexec._aws.functions._OLD", -3600.0)
    with BatchExecutor(1, launcher=function(memory=1771)) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
    (left,) = client.list_functions()["Functions"]
    assert left["MemorySize"] == 1771


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        (
            "Value '4096' at 'memorySize' failed to satisfy constraint: Member must have value "
            "less than or equal to 3008",
            "ValidationException",
            r"memory='3008MiB'",
        ),
        (
            "Lambda does not have permission to access the ECR image. Check the ECR permissions.",
            "InvalidParameterValueException",
            "up --with lambda",
        ),
        (
            "The image manifest, config or layer media type for the source image x is not "
            "supported.",
            "InvalidParameterValueException",
            "image of one architecture",
        ),
    ],
)
def test_what_lambda_refuses_is_an_error_with_the_remedy(
    aws: Any, function: Make, message: str, code: str, said: str
) -> None:
    aws.faults.functions.create_fails(message, code)
    with BatchExecutor(1, launcher=function()) as executor:
        with pytest.raises(LaunchError, match=said):
            executor.submit(square, 1).result(timeout=60)


def test_a_role_that_was_just_made_is_tried_again(aws: Any, function: Make) -> None:
    said = "The role defined for the function cannot be assumed by Lambda."
    aws.faults.functions.create_fails(said, "InvalidParameterValueException", 1)
    with BatchExecutor(1, launcher=function()) as executor:
        assert executor.submit(square, 3).result(timeout=60) == 9


def test_a_refusal_is_an_error_with_the_remedy(aws: Any, function: Make) -> None:
    aws.faults.deny("CreateFunction")
    with BatchExecutor(1, launcher=function()) as executor:
        with pytest.raises(LaunchError, match="cloudexec policy"):
            executor.submit(square, 1).result(timeout=60)


def test_an_image_without_a_worker_is_an_error_with_its_last_lines(
    aws: Any, function: Make
) -> None:
    aws.faults.functions.starts_fail()
    with BatchExecutor(1, launcher=function()) as executor:
        with pytest.raises(LaunchError, match="no module named x"):
            executor.submit(square, 1).result(timeout=60)


# Concurrency.


def test_workers_beyond_the_account_s_limit_wait_and_say_so(aws: Any, function: Make) -> None:
    aws.faults.functions.concurrency = 2
    launcher = function()
    with BatchExecutor(4, launcher=launcher, min_workers=4) as executor:
        squares(executor)
        eventually(lambda: "all 2 invocations that the account may have" in launcher.explain())
        assert len(aws.invocations()) == 2
        aws.faults.functions.concurrency = None
        asking_again = executor.map(square, range(100))
        assert list(asking_again) == [n * n for n in range(100)]


def test_a_worker_that_ends_makes_room_for_one_that_waits(aws: Any, function: Make) -> None:
    aws.faults.functions.concurrency = 1
    with BatchExecutor(2, launcher=function(), min_workers=2) as executor:
        future = executor.submit(time.sleep, 0.5)
        eventually(lambda: executor.stats().tasks.running == 1)
        (event,) = aws.invocations()
        future.result(timeout=60)
        aws.faults.functions.out_of_memory(event.request_id)
        assert executor.submit(square, 3).result(timeout=60) == 9


def test_events_that_lambda_drops_are_sent_again(
    aws: Any, function: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other functions use the account up, of which Lambda tells nobody."""
    monkeypatch.setattr("cloudexec._launchers.lambda_.platform.UNSEEN", 2.0)
    aws.faults.functions.used_by_others = 1000
    launcher = function()
    with BatchExecutor(1, launcher=launcher) as executor:
        future = executor.submit(square, 3)
        eventually(lambda: "other functions may use up" in launcher.explain())
        aws.faults.functions.used_by_others = 0
        assert future.result(timeout=60) == 9


def test_a_fallback_moves_on_where_all_concurrency_is_used(aws: Any, function: Make) -> None:
    aws.faults.functions.concurrency = 1
    with BatchExecutor(3, launcher=Fallback([function(), Local()])) as executor:
        futures = [executor.submit(time.sleep, 0.2) for _ in range(30)]
        for future in futures:
            future.result(timeout=60)
    assert len(aws.invocations()) == 1


def test_reserved_concurrency_is_the_most_there_is(aws: Any, function: Make) -> None:
    launcher = function(reserved_concurrency=1)
    with BatchExecutor(2, launcher=launcher, min_workers=2) as executor:
        squares(executor)
        eventually(lambda: "1 invocations that are reserved" in launcher.explain())
    assert len(aws.invocations()) == 1
    with BatchExecutor(1, launcher=function(reserved_concurrency=950)) as executor:
        with pytest.raises(LaunchError, match=r"cannot reserve 950.*smaller reserved_concurrency"):
            executor.submit(square, 1).result(timeout=60)


def test_a_function_that_was_stopped_starts_no_more_workers(
    aws: Any, function: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the next executor is started."""
    monkeypatch.setattr("cloudexec._launchers.lambda_.platform.UNSEEN", 2.0)
    client = boto3.client("lambda", region_name=aws.region)
    with BatchExecutor(1, launcher=function(), idle_timeout=0.1) as executor:
        assert executor.submit(square, 2).result(timeout=60) == 4
        eventually(lambda: not running(aws))
        name = calls(aws, "CreateFunction")[0]["FunctionName"]
        client.put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=0)
        with pytest.raises(LaunchError, match=r"was stopped.*reserved concurrency is 0"):
            executor.submit(square, 3).result(timeout=60)
    with BatchExecutor(1, launcher=function()) as executor:
        assert executor.submit(square, 3).result(timeout=60) == 9


# Ends.


def test_a_worker_whose_environment_dies_costs_no_task(aws: Any, function: Make) -> None:
    with BatchExecutor(1, launcher=function()) as executor:
        future = executor.submit(time.sleep, 4.0)
        eventually(lambda: executor.stats().tasks.running == 1)
        (event,) = aws.invocations()
        runtime = psutil.Process(event.pid)
        for each in (*runtime.children(recursive=True), runtime):
            each.kill()
        future.result(timeout=60)
    assert len(aws.invocations()) == 2


def test_a_worker_that_runs_out_of_memory_is_told_apart(aws: Any, function: Make) -> None:
    with BatchExecutor(1, launcher=function(), retries=0) as executor:
        future = executor.submit(time.sleep, 60)
        eventually(lambda: executor.stats().tasks.running == 1)
        aws.faults.functions.out_of_memory(aws.invocations()[0].request_id)
        with pytest.raises(WorkerLostError, match="used all of its memory, 1769 MiB"):
            future.result(timeout=60)


# Costs.


def test_milliseconds_and_requests_are_what_costs(aws: Any, function: Make) -> None:
    prices = PriceTable.built_in().functions
    one = function().estimate(1, 1.2341).accrued_usd
    assert one == pytest.approx(1.235 * 1769 / 1024 * prices.gb_second + prices.request)
    assert function(arch="arm64").estimate(1, 1).accrued_usd < function().estimate(1, 1).accrued_usd
    assert function(disk="10GiB").estimate(1, 1).accrued_usd > function().estimate(1, 1).accrued_usd
    launcher = function()
    with BatchExecutor(1, launcher=launcher) as executor:
        squares(executor)
    cost = executor.cost().accrued_usd
    eventually(lambda: not running(aws))
    (event,) = aws.invocations()
    billed = launcher.estimate(1, event.billed_ms / 1000).accrued_usd
    assert cost == pytest.approx(billed, rel=0.5)


def test_the_budget_bounds_the_workers(aws: Any, function: Make) -> None:
    launcher = function()
    ten_seconds = launcher.estimate(1, 10).accrued_usd
    with BatchExecutor(1, launcher=launcher, max_cost_usd=0.5 * ten_seconds) as executor:
        with pytest.raises(BudgetExceededError):
            executor.submit(square, 1).result(timeout=60)
    assert not aws.invocations()


# Clients that are killed.


def script_of(launcher: Lambda, *lines: str, **options: Any) -> str:
    """Return a program with three workers, which sleep until it ends."""
    given = {name: getattr(launcher, name) for name in ("role", "region", "image")}
    return textwrap.dedent(
        f"""
        import time
        from cloudexec import BatchExecutor, Lambda
        if __name__ == "__main__":
            launcher = Lambda(**{given!r})
            executor = BatchExecutor(3, launcher=launcher, min_workers=3, **{options!r})
            futures = [executor.submit(time.sleep, 300) for _ in range(3)]
            {"; ".join(lines) or "time.sleep(300)"}
        """
    )


ALL_RUN = "exec('while executor.stats().tasks.running < 3: time.sleep(0.05)')"
PHASES: dict[
    str, tuple[Callable[[Any], object], Callable[[Any, Path], object], tuple[str, ...]]
] = {
    "preparing": (
        lambda aws: setattr(aws.faults.functions, "pending", 600.0),
        lambda aws, path: calls(aws, "CreateFunction"),
        (),
    ),
    "before the answer": (
        lambda aws: aws.faults.lose_response("Invoke", 1000),
        lambda aws, path: len(aws.invocations()) >= 3,
        (),
    ),
    "queued": (
        lambda aws: aws.faults.functions.deliver_late(2.0),
        lambda aws, path: len(aws.invocations()) == 3,
        (),
    ),
    "running": (
        lambda aws: None,
        lambda aws, path: path.with_suffix(".running").exists(),
        (ALL_RUN, "open(__file__[:-3] + '.running', 'w').close()", "time.sleep(300)"),
    ),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_is_killed_leaves_nothing_running(
    aws: Any, function: Make, tmp_path: Path, phase: str
) -> None:
    """Whatever Lambda was told last: workers that find no client end by themselves."""
    prepare, reached, lines = PHASES[phase]
    prepare(aws)
    path = tmp_path / "client.py"
    kill_when(
        path,
        script_of(function(), *lines, launch_timeout=20.0, orphan_timeout=4.0),
        lambda: reached(aws, path),
    )
    eventually(lambda: not running(aws), timeout=60.0)
    assert all(each.left_running == 0 for each in aws.invocations())


# Rates, and later processes.


def test_a_thousand_workers_are_asked_for_at_the_published_rate() -> None:
    """Lambda grows a function by 1,000 environments every ten seconds, and keeps no rest."""

    async def times() -> list[float]:
        now = 0.0
        waits: list[tuple[float, asyncio.Event]] = []

        async def sleep(seconds: float) -> None:
            waits.append((now + seconds, asyncio.Event()))
            await waits[-1][1].wait()

        pacer = Pacer(asking.STARTS_PER_SECOND, asking.BURST, clock=lambda: now, sleep=sleep)
        found: list[float] = []

        async def one() -> None:
            await pacer.wait()
            found.append(now)

        tasks = [asyncio.ensure_future(one()) for _ in range(3000)]
        while not all(each.done() for each in tasks):
            await asyncio.sleep(0)
            if waits:
                first = min(waits, key=lambda each: each[0])
                waits.remove(first)
                now = max(now, first[0])
                first[1].set()
        return found

    found = asyncio.run(times())
    assert found.count(0.0) == asking.BURST
    assert found[999] == pytest.approx(5.0, abs=0.1)
    for index, at in enumerate(found):
        if at >= 10.0:  # of later seconds, no ten have more than a thousand
            assert index - bisect.bisect_right(found, at - 10.0) <= 1000


def test_many_workers_are_never_throttled(aws: Any, function: Make) -> None:
    """The emulated AWS refuses what is beyond the rate, and has nothing to refuse."""
    aws.faults.functions.deliver_late(3600.0)  # only the calls count
    with BatchExecutor(120, launcher=function(), min_workers=120) as executor:
        executor.submit(square, 1)
        eventually(lambda: len(aws.invocations()) >= 120)
        executor.shutdown(wait=False, cancel_futures=True)
    of_lambda = [each for each in aws.requests if each.service == "lambda"]
    assert {each.error for each in of_lambda} <= {None, "ResourceNotFoundException"}
    assert len(of_lambda) < 140


def test_a_later_process_finds_the_workers_of_an_earlier_one(aws: Any, function: Make) -> None:
    """By what they have written to the log: it has their names alone."""
    executor = ExecutorInfo(id="0123456789abcdef", launch_timeout=60.0)
    # They wait for a client to dial.
    variables = {"CLOUDEXEC_TARGET": "127.0.0.1:1", "CLOUDEXEC_EXECUTOR_ID": executor.id}
    variables |= {"CLOUDEXEC_KEY": "00" * 32, "CLOUDEXEC_SLOTS": "1", "CLOUDEXEC_LAUNCH": "1"}
    variables |= {"CLOUDEXEC_CERTIFICATE_SHA256": "00" * 32}
    jobs = [f"cloudexec-{executor.id}-{number}" for number in range(3)]

    async def before() -> None:
        async with function().connect(executor) as site:
            for name in jobs[:2]:
                await site.platform.prepare()
                request = JobRequest(name=name, workers=1, environment=variables)
                assert (await site.platform.submit(request)).worker_ids[0].startswith("lambda-")

    async def after() -> set[str]:
        looks = [Inspection(job_id=name, survey=True) for name in jobs]
        async with function().connect(executor) as site:
            found = await site.platform.describe(looks)
            assert await site.platform.find(jobs[0], spot=False) is not None
            assert await site.platform.find(jobs[2], spot=False) is None
            return set(found)

    asyncio.run(before())
    eventually(lambda: all(any(f'"{name}"' in each for each in lines(aws)) for name in jobs[:2]))
    assert asyncio.run(after()) == set(jobs[:2])
    eventually(lambda: not running(aws))
    assert [each.answer["exit_code"] for each in aws.invocations()] == [4, 4]
