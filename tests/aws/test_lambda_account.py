"""An account that is set up for AWS Lambda: from `up` to `down`."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import replace
from typing import Any

import boto3
import pytest
from account_helpers import checks, eventually, remove, set_up
from click.testing import CliRunner

from cloudexec import BatchExecutor, ConfigError, Lambda, LaunchError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.function_log import read_invocations, read_report
from cloudexec._aws.function_prices import FunctionPrices
from cloudexec._aws.monitor import Monitor
from cloudexec._aws.policy import policy
from cloudexec._aws.prices import PriceTable, refresh
from cloudexec._aws.profile import Profile
from cloudexec._pricing import run_seconds
from cloudexec.cli.cost import cost_command
from cloudexec.cli.jobs import jobs_command
from cloudexec.cli.logs import logs_command
from cloudexec.cli.ps import ps_command
from cloudexec.cli.stop import stop_command
from cloudexec.testing import FakeAWS


def ready(profile: Profile, **settings: Any) -> Lambda:
    return Lambda(image=f"{profile.repository}@sha256:{'0' * 64}", **settings)


def functions() -> list[dict[str, Any]]:
    return list(boto3.client("lambda").list_functions()["Functions"])


def over(aws: FakeAWS) -> bool:
    return all(each.status not in ("queued", "running") for each in aws.invocations())


def test_up_adds_a_role_where_it_is_asked_to_and_keeps_it(aws: FakeAWS) -> None:
    """The repository lets Lambda in from then on."""
    assert set_up().function_role == ""
    profile = set_up("lambda", "fargate")
    assert ":role/cloudexec-default-FunctionRole" in profile.function_role
    assert profile.cluster
    assert set_up().function_role == profile.function_role
    assert Profile.load("default") == profile
    assert set_up("batch").function_role == ""
    assert remove() == ()


def test_a_profile_without_a_role_says_how_to_get_one(aws: FakeAWS) -> None:
    profile = set_up()
    with pytest.raises((ConfigError, LaunchError), match=r"`cloudexec up --with lambda` adds one"):
        with BatchExecutor(1, launcher=ready(profile)) as executor:
            executor.submit(pow, 2, 3).result(timeout=60)


def test_all_that_is_needed_is_in_the_published_policy(aws: FakeAWS) -> None:
    """For functions of its own stack and no others. The key of the stack stays where it is."""
    profile = set_up("lambda")
    aws.faults.allow_only(policy(profile))
    with BatchExecutor(2, launcher=ready(profile), idle_timeout=0.1) as executor:
        assert list(executor.map(pow, [2, 3], [2, 2])) == [4, 9]
        eventually(lambda: over(aws))
        assert executor.submit(pow, 2, 5).result(timeout=60) == 32
    secret = boto3.client("secretsmanager", region_name=aws.region)
    aws.faults.clear()
    key = secret.get_secret_value(SecretId=profile.key_secret)["SecretString"]
    sent = b"".join(each.payload for each in aws.invocations())
    assert key.encode() not in sent
    (made,) = functions()
    assert made["FunctionName"].startswith("cloudexec-default-")
    assert made["LoggingConfig"]["LogGroup"] == profile.log_group
    aws.faults.allow_only(policy(replace(profile, stack="cloudexec-other")))
    with BatchExecutor(1, launcher=ready(profile, memory=2048)) as executor:
        with pytest.raises(LaunchError, match="not authorized to perform: lambda:"):
            executor.submit(pow, 2, 3).result(timeout=60)


def test_without_a_role_the_policy_has_nothing_of_functions(aws: FakeAWS) -> None:
    profile = set_up()
    actions = {
        action
        for statement in policy(profile)["Statement"]
        for action in statement["Action"]
        if action.startswith("lambda:")
    }
    assert actions == {"lambda:ListFunctions"}
    assert "FilterLogEvents" not in json.dumps(policy(profile))


def test_a_repository_that_does_not_let_lambda_in_is_named(aws: FakeAWS) -> None:
    profile = set_up("lambda")
    name = profile.repository.partition("/")[2]
    boto3.client("ecr").delete_repository_policy(repositoryName=name)
    with BatchExecutor(1, launcher=ready(profile)) as executor:
        with pytest.raises(LaunchError, match=r"access the ECR image.*up --with lambda"):
            executor.submit(pow, 2, 3).result(timeout=60)


def test_the_monitor_shows_workers_by_the_log_and_costs_by_the_millisecond(aws: FakeAWS) -> None:
    profile = set_up("lambda")
    aws.faults.allow_only(policy(profile))
    launcher = ready(profile, memory=1769)
    with BatchExecutor(1, launcher=launcher) as executor, Monitor("default") as monitor:
        executor.submit(pow, 2, 3).result(timeout=60)
        (shown,) = eventually(monitor.executors)
        assert shown.is_active
        assert (shown.vcpus, shown.memory_mib) == (1.0, 1769)
        (job,) = monitor.jobs()
        assert (job.state, job.compute, job.first_worker) == ("RUNNING", "lambda", 1)
        line = "enrolled as worker-1"
        eventually(lambda: line in CliRunner().invoke(logs_command, [job.id]).output)
        assert monitor.jobs(active=False) == []
    eventually(lambda: over(aws))
    (event,) = aws.invocations()
    with Monitor("default") as monitor:
        exact = pytest.approx(launcher.estimate(1, event.billed_ms / 1000).accrued_usd)
        # The log has the line with the cost a moment after the end.
        (job,) = eventually(
            lambda: [each for each in monitor.jobs(active=False) if each.cost_usd == exact]
        )
        assert (job.state, job.exit_code, job.reason) == ("SUCCEEDED", 0, "")
        report = monitor.cost()
        assert report.cost_usd == exact
        assert any("of the last day" in note for note in report.notes)
    for command in (ps_command, jobs_command, cost_command):
        done = CliRunner().invoke(command, [])
        assert done.exit_code == 0, done.output
    with Monitor(region=aws.region) as everywhere:
        aws.faults.clear()
        assert len(everywhere.jobs()) == 1, "functions tell where their log is"


def test_stop_keeps_a_function_from_starting_workers(aws: FakeAWS) -> None:
    """Nothing ends those that run but their program. The next executor lifts it."""
    profile = set_up("lambda")
    aws.faults.allow_only(policy(profile))
    with BatchExecutor(1, launcher=ready(profile)) as executor:
        executor.submit(pow, 2, 3).result(timeout=60)
        (event,) = aws.invocations()
        mine = json.loads(event.payload)["session"]["cloudexec:executor"]
        with Monitor("default") as monitor:
            eventually(monitor.jobs)  # the log tells of it
        stop = CliRunner().invoke(stop_command, ["--executor", mine, "--yes"])
        assert stop.exit_code == 0, stop.output
        assert "15 minutes" in stop.output
        assert event.status == "running"
        assert executor.submit(pow, 2, 4).result(timeout=60) == 16
    eventually(lambda: event.status == "succeeded")
    with BatchExecutor(1, launcher=ready(profile)) as executor:
        assert executor.submit(pow, 2, 5).result(timeout=60) == 32


def test_functions_go_with_their_stack_and_others_stay(aws: FakeAWS) -> None:
    profile = set_up("lambda")
    client = boto3.client("lambda")
    with BatchExecutor(1, launcher=ready(profile)) as executor:
        executor.submit(pow, 2, 3).result(timeout=60)
    given = {
        "PackageType": "Image",
        "Code": {"ImageUri": f"{profile.repository}:1"},
        "Role": aws.set_up("other").function_role,
    }
    client.create_function(FunctionName="cloudexec-mine", **given)
    client.create_function(FunctionName="other", **given)
    assert len(functions()) == 3
    assert remove() == ()
    assert {each["FunctionName"] for each in functions()} == {"cloudexec-mine", "other"}


def test_functions_that_may_not_be_looked_for_are_reported(aws: FakeAWS) -> None:
    set_up()
    aws.faults.deny("ListFunctions")
    told: list[str] = []
    assert remove(lambda event: told.append(str(event))) == ()
    assert any("functions of AWS Lambda could not be looked for" in each for each in told)


def test_doctor_tells_how_many_workers_there_may_be(aws: FakeAWS) -> None:
    set_up("lambda")
    found = checks()["AWS Lambda"]
    assert found.outcome == "ok"
    assert found.found.startswith("1000 workers at once; outside of the VPC")
    aws.faults.functions.concurrency = 10
    few = checks()["AWS Lambda"]
    assert few.outcome == "warning"
    assert "10 workers at once" in few.found
    assert "Service Quotas" in few.remedy


def test_a_private_address_is_dialed_from_within_the_vpc(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other: in public subnets, a function in the VPC has no way out of it."""
    profile = set_up("lambda")
    created: list[dict[str, Any]] = []
    for number, (advertise, vpc) in enumerate(
        [("10.1.2.3:4567", None), ("192.0.2.1:4567", None), ("10.1.2.3:4567", False)]
    ):
        launcher = ready(profile, memory=1024 + number, vpc=vpc)
        aws.faults.functions.deliver_late(3600.0)
        executor = BatchExecutor(1, launcher=launcher, advertise=advertise, listen="127.0.0.1:0")
        executor.submit(pow, 2, 3)
        eventually(lambda: len(functions()) == number + 1)  # noqa: B023 (called at once)
        executor.shutdown(wait=False, cancel_futures=True)
        made = [r.parameters for r in aws.requests if r.operation == "CreateFunction"]
        # A request that was made again has the same name.
        created = list({each["FunctionName"]: each for each in made}.values())
    inside, outside, forced = created
    assert inside["VpcConfig"]["SubnetIds"] == list(profile.subnets)
    assert inside["VpcConfig"]["SecurityGroupIds"] == [profile.security_group]
    assert "VpcConfig" not in outside
    assert "VpcConfig" not in forced


def test_a_relay_cannot_be_reached_from_within_public_subnets(aws: FakeAWS) -> None:
    profile = set_up("lambda")
    launcher = ready(profile, vpc=True, relay="192.0.2.1:443")
    with pytest.raises((ConfigError, LaunchError), match=r"cannot reach the relay.*vpc="):
        with BatchExecutor(1, launcher=launcher) as executor:
            executor.submit(pow, 2, 3).result(timeout=60)


def _may_listen() -> bool:
    """Whether a process of this user may have port 443 at an address of its own."""
    try:
        socket.create_server(("127.200.0.1", 443)).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _may_listen(), reason="port 443 of 127.200.0.1 cannot be had")
def test_workers_come_through_a_relay(aws: FakeAWS) -> None:
    """It knows the stack's key, which comes with the events, and stands in no other place."""
    profile = set_up("lambda")
    aws.faults.allow_only(policy(profile))
    with BatchExecutor(2, launcher=ready(profile, relay=True)) as executor:
        assert list(executor.map(pow, [2, 3], [2, 2])) == [4, 9]
        assert "a relay at" in executor.cost().note
    eventually(lambda: not any(job.status in ("STARTING", "RUNNING") for job in aws.jobs()))
    assert {job.queue for job in aws.jobs()} == {"cloudexec-default-relay"}
    eventually(lambda: over(aws))


def test_prices_are_looked_up_with_those_of_fargate(aws: FakeAWS) -> None:
    async def run() -> PriceTable:
        async with AwsClients() as clients:
            return await refresh(clients)

    table = asyncio.run(run())
    assert table.source == "AWS Price List API"
    assert PriceTable.load(aws.region).functions == table.functions == FunctionPrices()
    found = FunctionPrices.learned(
        {"EUC1-Lambda-GB-Second": 1.0, "Lambda-GB-Second-ARM": 2.0, "EU-Request": 3.0, "x": 4.0}
    )
    assert (found.gb_second, found.arm_gb_second, found.request) == (1.0, 2.0, 3.0)
    assert found.disk_gb_second == FunctionPrices().disk_gb_second


@pytest.mark.parametrize(
    ("end", "status", "out_of_memory"),
    [
        ("", "", False),
        ("\tInit Duration: 448.12 ms\t", "", False),
        ("\tStatus: timeout", "timeout", False),
        ("\tStatus: error\tError Type: Runtime.ExitError", "error", True),
    ],
)
def test_reports_are_read_as_lambda_writes_them(end: str, status: str, out_of_memory: bool) -> None:
    used = 512 if out_of_memory else 76
    report = read_report(
        f"REPORT RequestId: 3604209a-e9a3-11e6-939a-754dd98c7be3\tDuration: 12.34 ms\tBilled "
        f"Duration: 13 ms\tMemory Size: 512 MB\tMax Memory Used: {used} MB\t{end}\n"
    )
    assert report is not None
    assert report.request == "3604209a-e9a3-11e6-939a-754dd98c7be3"
    assert (report.billed_ms, report.memory_mib, report.used_mib) == (13, 512, used)
    assert (report.status, report.out_of_memory) == (status, out_of_memory)
    assert read_report("START RequestId: 1 Version: $LATEST") is None


@pytest.mark.parametrize("before", [0, 1, 2])
def test_an_invocation_that_ends_while_its_log_is_read_has_not_failed(
    aws: FakeAWS, before: int
) -> None:
    """Of one that has ended, the exit code is known: it was written first."""
    logs = boto3.client("logs")
    logs.create_log_group(logGroupName="/mine")
    logs.create_log_stream(logGroupName="/mine", logStreamName="one")
    at = int(time.time() * 1000)

    def write(*lines: str) -> None:
        events = [{"timestamp": at, "message": each} for each in lines]
        logs.put_log_events(logGroupName="/mine", logStreamName="one", logEvents=events)

    write('cloudexec session {"request": "1", "cloudexec:executor": "x"}')
    ends = [
        'cloudexec session {"request": "1", "exit_code": "0"}',
        "REPORT RequestId: 1\tDuration: 12.34 ms\tBilled Duration: 13 ms\tMemory Size: 512 MB\t"
        "Max Memory Used: 76 MB",
    ]
    requests = []

    async def call(service: str, operation: str, **parameters: Any) -> Any:
        if len(requests) == before:
            write(*ends)
        requests.append(operation)
        return getattr(boto3.client(service), operation)(**parameters)

    (found,) = asyncio.run(read_invocations(call, "/mine", at - 1000))
    assert len(requests) == 2
    assert (found.report is not None, found.exit_code) == {
        0: (True, 0),
        1: (False, 0),
        2: (False, None),
    }[before]


def test_a_run_costs_the_milliseconds_between_its_times() -> None:
    """Times since 1970 have no exact binary fractions, which once made it a millisecond more."""
    price = FunctionPrices().worker(
        memory_mib=1024, arch="x86_64", disk_gib=None, assumed=False, table=""
    )
    for began in range(1796047336000, 1796047336999, 37):
        run = run_seconds(began / 1000, (began + 2057) / 1000)
        assert price.cost(run) == pytest.approx(2.057 * price.per_second + price.per_run, rel=1e-9)
