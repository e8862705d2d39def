"""Set-up and teardown against the fake AWS, whose stacks take time, fail, and get stuck."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from instance_metadata import on_instance

from cloudexec import AwsError, ConfigError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.profile import Profile
from cloudexec._aws.remnants import Remnant
from cloudexec._aws.setup import SetupOptions, adopt, up
from cloudexec._aws.stack import find_stack
from cloudexec._aws.steps import Event, Noted, ResourceChanged, StepFinished, StepStarted
from cloudexec._aws.teardown import down, take_stock
from cloudexec._aws.template import template, template_text
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(60)

Result = TypeVar("Result")
INTERVAL = 0.01


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAWS]:
    """AWS with nothing in it but a default VPC, and no profiles."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "profiles"))
    with FakeAWS(grace=0.5, calls_per_second=1000, stack_seconds=0.1) as fake:
        yield fake


def _run(work: Callable[[AwsClients], Awaitable[Result]], region: str | None = None) -> Result:
    async def main() -> Result:
        async with AwsClients(region) as clients:
            return await work(clients)

    return asyncio.run(main())


def _up(report: Callable[[Event], None] | None = None, **options: Any) -> Profile:
    return _run(lambda c: up(c, SetupOptions(**options), report or _ignore, interval=INTERVAL))


def _down(
    report: Callable[[Event], None] | None = None, name: str = "default"
) -> tuple[Remnant, ...]:
    return _run(lambda c: down(c, name, report or _ignore, interval=INTERVAL, jobs_end_within=20))


def _call(service: str, operation: str, **parameters: Any) -> Any:
    return _run(lambda c: c.call(service, operation, **parameters))


def _ignore(event: Event) -> None:
    pass


def _operations(aws: FakeAWS) -> list[str]:
    return [each.operation for each in aws.requests]


def _submit(profile: Profile, *, size: int = 0, seconds: int = 60) -> str:
    definition = _call(
        "batch",
        "register_job_definition",
        jobDefinitionName="cloudexec-0123456789abcdef",
        type="container",
        platformCapabilities=["FARGATE"],
        containerProperties={
            "image": "worker",
            "command": ["sleep", str(seconds)],
            "executionRoleArn": profile.execution_role,
            "resourceRequirements": [
                {"type": "VCPU", "value": "0.25"},
                {"type": "MEMORY", "value": "512"},
            ],
        },
        tags={"cloudexec:stack": profile.stack},
    )
    extra = {"arrayProperties": {"size": size}} if size else {}
    job = _call(
        "batch",
        "submit_job",
        jobName="cloudexec-e-1",
        jobQueue=profile.queues["fargate"],
        jobDefinition=definition["jobDefinitionArn"],
        **extra,
    )
    return str(job["jobId"])


# Up


def test_up_writes_a_profile_of_what_the_stack_has(aws: FakeAWS) -> None:
    events: list[Event] = []
    profile = _up(events.append, project="sweeps")
    assert Profile.load("default") == profile
    assert profile.stack == "cloudexec-default"
    assert profile.region == aws.region
    assert set(profile.queues) == {"fargate", "fargate_spot", "fargate_relay"}
    assert profile.project == "sweeps"
    assert profile.assign_public_ip
    assert profile.subnets
    for value in (profile.job_role, profile.execution_role, profile.key_secret):
        assert value.startswith("arn:aws:")
    key = _call("secretsmanager", "get_secret_value", SecretId=profile.key_secret)["SecretString"]
    assert len(key) == 64
    assert set(key) <= set("0123456789abcdef")
    finished = [each.title for each in events if isinstance(each, StepFinished)]
    started = [each.title for each in events if isinstance(each, StepStarted)]
    assert finished == started
    made = {each.resource for each in events if isinstance(each, ResourceChanged)}
    assert {"FargateQueue", "Bucket", "KeySecret"} <= made


def test_up_again_changes_nothing(aws: FakeAWS) -> None:
    first = _up()
    events: list[Event] = []
    assert _up(events.append) == first
    assert _operations(aws).count("CreateStack") == 1
    assert not [each for each in events if isinstance(each, ResourceChanged)]
    assert "nothing to change" in [each.found for each in events if isinstance(each, StepFinished)]


def test_up_again_keeps_what_others_put_into_the_profile(aws: FakeAWS) -> None:
    profile = _up().with_image("3.11", "linux/amd64", "repository@sha256:1")
    profile = dataclasses.replace(profile, advertise="example.org:7000")
    profile.save()
    assert _up() == profile


def test_up_adds_ec2_to_a_stack_and_keeps_it_then(aws: FakeAWS) -> None:
    _up(max_vcpus=32)
    profile = _up(ec2=True)
    assert set(profile.queues) == {"fargate", "fargate_spot", "fargate_relay", "ec2", "ec2_spot"}
    assert _up() == profile
    found = _call("batch", "describe_compute_environments")["computeEnvironments"]
    assert sorted(each["computeResources"]["maxvCpus"] for each in found) == [4, *[32] * 4]


def test_two_set_ups_stand_side_by_side(aws: FakeAWS) -> None:
    one, other = _up(name="one"), _up(name="other")
    for kind in ("bucket", "repository", "key_secret", "log_group", "security_group", "job_role"):
        assert getattr(one, kind) != getattr(other, kind)
    assert _down(name="one") == ()
    assert Profile.names() == ["other"]
    assert _run(lambda c: find_stack(c, "cloudexec-other")) is not None
    assert _down(name="other") == ()


def test_up_after_an_interruption_waits_for_what_goes_on(aws: FakeAWS) -> None:
    """The first run is cancelled as soon as the stack is being made."""

    async def main() -> None:
        async with AwsClients() as clients:
            begun = asyncio.Event()

            def report(event: Event) -> None:
                if isinstance(event, ResourceChanged):
                    begun.set()

            task = asyncio.create_task(up(clients, SetupOptions(), report, interval=INTERVAL))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert Profile.names() == []
    profile = _up()
    assert set(profile.queues) == {"fargate", "fargate_spot", "fargate_relay"}
    assert _operations(aws).count("CreateStack") == 1


def test_reason_of_the_first_failed_resource_is_in_the_error(aws: FakeAWS) -> None:
    """And once it is mended, the same command removes what is left and begins anew."""
    aws.faults.resource_fails("Repository", "You have reached the limit of repositories")
    with pytest.raises(AwsError, match=r"Repository.*reached the limit of repositories"):
        _up()
    aws.faults.clear()
    assert _up().repository
    assert _operations(aws).count("CreateStack") == 2


def test_up_enables_what_an_interrupted_down_disabled(aws: FakeAWS) -> None:
    profile = _up()
    _call("batch", "update_job_queue", jobQueue=profile.queues["fargate"], state="DISABLED")
    _up()
    answer = _call("batch", "describe_job_queues", jobQueues=[profile.queues["fargate"]])
    assert answer["jobQueues"][0]["state"] == "ENABLED"


def _delete_default_vpc() -> None:
    vpc = _call("ec2", "describe_vpcs")["Vpcs"][0]["VpcId"]
    for subnet in _call("ec2", "describe_subnets")["Subnets"]:
        _call("ec2", "delete_subnet", SubnetId=subnet["SubnetId"])
    _call("ec2", "delete_vpc", VpcId=vpc)


def test_profile_that_could_not_be_written_stops_up_before_it_begins(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", "/dev/null/profiles")
    with pytest.raises(ConfigError, match=r"cannot be written.*CLOUDEXEC_CONFIG_DIR"):
        _up()
    assert not aws.requests


def test_up_has_what_is_invalid_looked_at_again(aws: FakeAWS) -> None:
    """Only then is it an error, which says what may be missing."""
    _up()
    aws.faults.service_role_broken()
    aws.clear_requests()
    with pytest.raises(AwsError, match=r"INVALID: .*AssumeRole.*create-service-linked-role"):
        _up()
    updates = [r.parameters for r in aws.requests if r.operation == "UpdateComputeEnvironment"]
    assert {each["state"] for each in updates} == {"ENABLED"}
    aws.faults.clear()
    _up()


def test_without_a_default_vpc_up_says_what_to_do(aws: FakeAWS) -> None:
    _delete_default_vpc()
    with pytest.raises(ConfigError, match=r"no default VPC.*--vpc"):
        _up()
    assert "CreateStack" not in _operations(aws)


def test_up_uses_the_network_that_it_is_given(aws: FakeAWS) -> None:
    vpc = _call("ec2", "create_vpc", CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    with pytest.raises(ConfigError, match="no subnets"):
        _up(vpc=vpc)
    subnet = _call("ec2", "create_subnet", VpcId=vpc, CidrBlock="10.9.1.0/24")["Subnet"]["SubnetId"]
    with pytest.raises(ConfigError, match=r"no default route.*NAT gateway"):
        _up(vpc=vpc)
    assert "CreateStack" not in _operations(aws)
    # A NAT gateway there, in place of one in a public subnet: what counts is the route.
    address = _call("ec2", "allocate_address", Domain="vpc")["AllocationId"]
    nat = _call("ec2", "create_nat_gateway", SubnetId=subnet, AllocationId=address)["NatGateway"]
    filters = [{"Name": "vpc-id", "Values": [vpc]}]
    (table,) = _call("ec2", "describe_route_tables", Filters=filters)["RouteTables"]
    _call(
        "ec2",
        "create_route",
        RouteTableId=table["RouteTableId"],
        DestinationCidrBlock="0.0.0.0/0",
        NatGatewayId=nat["NatGatewayId"],
    )
    profile = _up(vpc=vpc)
    assert (profile.vpc, profile.subnets) == (vpc, (subnet,))
    assert not profile.assign_public_ip


def test_up_on_an_instance_in_another_vpc_says_so(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its program would have to be reached at a public address, if there is one."""
    events: list[Event] = []
    with on_instance(monkeypatch, ("vpc-elsewhere", "10.9.0.5", "")):
        profile = _up(events.append)
    (text,) = [each.text for each in events if isinstance(each, Noted)]
    assert f"in vpc-elsewhere, the workers will be in {profile.vpc}" in text
    assert "--vpc vpc-elsewhere" in text


def test_up_does_not_take_public_addresses_from_where_they_are_needed(aws: FakeAWS) -> None:
    """An existing stack keeps its subnets, which are looked at once more."""
    _up()
    with pytest.raises(ConfigError, match=r"of no use without a public address"):
        _up(public_ip=False)
    assert "UpdateStack" not in _operations(aws)


def test_boundary_and_tags_reach_what_the_stack_makes(aws: FakeAWS) -> None:
    """Where an account demands both of every role; what is not given later stays."""
    boundary = "arn:aws:iam::123456789012:policy/boundary"
    profile = _up(permissions_boundary=boundary, tags={"team": "weather"})
    _up(max_vcpus=8, tags={"team": "weather"})
    with pytest.raises(ConfigError, match="made with other tags"):
        _up(tags={"team": "climate"})
    role = profile.job_role.rpartition("/")[2]
    found = _call("iam", "get_role", RoleName=role)["Role"]
    assert found["PermissionsBoundary"]["PermissionsBoundaryArn"] == boundary
    tags = _call("iam", "list_role_tags", RoleName=role)["Tags"]
    assert {"Key": "team", "Value": "weather"} in tags
    answer = _call("batch", "describe_job_queues", jobQueues=[profile.queues["fargate"]])
    assert answer["jobQueues"][0]["tags"]["team"] == "weather"


# Adopt


def _deploy(name: str, *, version: str | None = None) -> None:
    """Deploy the template as an administrator does, without us."""
    body = template()
    if version is not None:
        body["Outputs"]["Version"]["Value"] = version
    subnets = [each["SubnetId"] for each in _call("ec2", "describe_subnets")["Subnets"]]
    (vpc,) = _call("ec2", "describe_vpcs")["Vpcs"]
    network = {"VpcId": vpc["VpcId"], "SubnetIds": ",".join(subnets)}
    _call(
        "cloudformation",
        "create_stack",
        StackName=name,
        TemplateBody=json.dumps(body),
        Parameters=[{"ParameterKey": key, "ParameterValue": network[key]} for key in network],
        Capabilities=["CAPABILITY_IAM"],
    )
    while (stack := _run(lambda c: find_stack(c, name))) is None or stack.is_moving:
        pass
    assert stack.status == "CREATE_COMPLETE"


def _adopt(stack: str, report: Callable[[Event], None] = _ignore, **options: Any) -> Profile:
    return _run(lambda c: adopt(c, stack, SetupOptions(**options), report))


def test_a_stack_of_an_administrator_is_adopted_and_left_alone(aws: FakeAWS) -> None:
    """Whatever it is called; neither ``up`` nor ``down`` changes anything of it."""
    _deploy("research-batch")
    aws.clear_requests()
    profile = _adopt("research-batch", name="mine", project="p")
    assert Profile.load("mine") == profile
    assert (profile.stack, profile.project) == ("research-batch", "p")
    assert set(profile.queues) == {"fargate", "fargate_spot", "fargate_relay"}
    with pytest.raises(ConfigError, match="up --adopt research-batch --name mine"):
        _up(name="mine")
    assert _adopt("research-batch", name="mine") == profile
    assert _run(lambda c: take_stock(c, "mine")).stack is None
    events: list[Event] = []
    assert _down(events.append, name="mine") == ()
    assert Profile.names() == []
    assert any(isinstance(each, Noted) and "not yours" in each.text for each in events)
    for each in aws.requests:
        assert each.operation.startswith(("Describe", "Get", "List")), each.operation


def test_what_cannot_be_adopted(aws: FakeAWS) -> None:
    """No stack, one that is not of our template, one that is disabled; a profile in use."""
    with pytest.raises(ConfigError, match="no stack absent in"):
        _adopt("absent")
    _deploy("old", version="1")
    events: list[Event] = []
    profile = _adopt("old", events.append)
    assert any(isinstance(each, Noted) and "version 1" in each.text for each in events)
    _call("batch", "update_job_queue", jobQueue=profile.queues["fargate"], state="DISABLED")
    with pytest.raises(AwsError, match=r"VALID and DISABLED: the stack's administrator"):
        _adopt("old")
    profile.delete()
    body = {"Resources": {"Group": {"Type": "AWS::Logs::LogGroup"}}}
    _call("cloudformation", "create_stack", StackName="x", TemplateBody=json.dumps(body))
    while (stack := _run(lambda c: find_stack(c, "x"))) is None or stack.is_moving:
        pass
    with pytest.raises(ConfigError, match="not deployed from `cloudexec template`"):
        _adopt("x")
    Profile(name="own", region=aws.region, stack="cloudexec-own").save()
    with pytest.raises(ConfigError, match="of a stack of its own"):
        _adopt("old", name="own")
    _deploy("cloudexec-theirs")
    with pytest.raises(ConfigError, match="`cloudexec down` would delete: give another --name"):
        _adopt("cloudexec-theirs", name="theirs")


def test_profile_of_another_region_is_not_overwritten(aws: FakeAWS) -> None:
    Profile(name="default", region="eu-north-1", stack="cloudexec-default").save()
    with pytest.raises(ConfigError, match="eu-north-1"):
        _up()


def test_unreadable_profile_is_written_anew(aws: FakeAWS) -> None:
    path = Profile.path("default")
    path.parent.mkdir(parents=True)
    path.write_text("{", encoding="utf-8")
    events: list[Event] = []
    profile = _up(events.append)
    assert Profile.load("default") == profile
    assert any(isinstance(each, Noted) and "written again" in each.text for each in events)


def test_stack_of_a_newer_release_is_left_alone(aws: FakeAWS) -> None:
    profile = _up()
    body = template()
    body["Outputs"]["Version"]["Value"] = "99"
    keys = ("VpcId", "SubnetIds")
    _call(
        "cloudformation",
        "update_stack",
        StackName=profile.stack,
        TemplateBody=json.dumps(body),
        Parameters=[{"ParameterKey": key, "UsePreviousValue": True} for key in keys],
        Capabilities=["CAPABILITY_IAM"],
    )
    with pytest.raises(ConfigError, match="upgrade cloudexec"):
        _up()


def test_a_stack_whose_name_cannot_be_a_repositorys_fails(aws: FakeAWS) -> None:
    """CloudFormation takes more names than Amazon ECR does: by hand, one may be given."""
    vpc = _call("ec2", "describe_vpcs")["Vpcs"][0]["VpcId"]
    subnets = [each["SubnetId"] for each in _call("ec2", "describe_subnets")["Subnets"]]
    _call(
        "cloudformation",
        "create_stack",
        StackName="Team--A",
        TemplateBody=template_text(),
        Parameters=[
            {"ParameterKey": "VpcId", "ParameterValue": vpc},
            {"ParameterKey": "SubnetIds", "ParameterValue": ",".join(subnets)},
        ],
        Capabilities=["CAPABILITY_IAM"],
    )

    def events() -> list[str]:
        found = _call("cloudformation", "describe_stack_events", StackName="Team--A")
        return [each.get("ResourceStatusReason", "") for each in found["StackEvents"]]

    deadline = time.monotonic() + 30
    while not any("'repositoryName'" in each for each in events()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["", "Upper", "9", "a" * 33, "under_score", "a--b", "a-"])
def test_names_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="lower-case"):
        SetupOptions(name=name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "local"}, "CLOUDEXEC_PROFILE=local means this machine"),
        ({"log_retention_days": 31}, r"30, 60, .* not 31"),
        ({"bucket_expire_days": 0}, "bucket_expire_days"),
        ({"max_vcpus": 0}, "max_vcpus"),
        ({"subnets": ("s",) * 17}, "at most 16"),
        ({"permissions_boundary": "boundary"}, "ARN of a policy"),
        ({"tags": {"aws:x": "1"}}, "are reserved"),
    ],
)
def test_options_that_cannot_be_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SetupOptions(**options)


# Down


def _fill_bucket(profile: Profile) -> None:
    async def fill(clients: AwsClients) -> None:  # a client for each call would take seconds
        bucket = profile.bucket
        for number in range(3):
            for _ in range(2):
                key = f"data/{number}"
                await clients.call("s3", "put_object", Bucket=bucket, Key=key, Body=b"x")
        key = "data/unfinished"
        await clients.call("s3", "create_multipart_upload", Bucket=bucket, Key=key)

    _run(fill)


def _push(profile: Profile) -> None:
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"digest": f"sha256:{'a' * 64}", "size": 1, "mediaType": "x"},
        "layers": [],
    }
    _call(
        "ecr",
        "put_image",
        repositoryName=profile.repository.partition("/")[2],
        imageManifest=json.dumps(manifest),
        imageTag="a",
    )


def test_down_ends_jobs_and_deletes_everything(aws: FakeAWS) -> None:
    profile = _up()
    _push(profile)
    _fill_bucket(profile)
    _call(
        "s3",
        "put_bucket_versioning",
        Bucket=profile.bucket,
        VersioningConfiguration={"Status": "Enabled"},
    )
    _fill_bucket(profile)
    _call("s3", "delete_object", Bucket=profile.bucket, Key="data/0")
    job, array = _submit(profile), _submit(profile, size=3)
    stock = _run(lambda c: take_stock(c, "default"))
    assert (stock.jobs, stock.images, stock.definitions) == (2, 1, 2)
    assert stock.objects >= 3
    events: list[Event] = []
    assert _down(events.append) == ()
    ended = {each.job_id: each.status for each in aws.jobs()}
    assert ended[job] == ended[array] == "FAILED"
    found = {each.title: each.found for each in events if isinstance(each, StepFinished)}
    assert found["Jobs"] == "2 jobs terminated"
    assert found["Job definitions"] == "2 deregistered"
    assert Profile.names() == []
    assert _call("batch", "describe_job_queues")["jobQueues"] == []
    assert _call("batch", "describe_compute_environments")["computeEnvironments"] == []
    assert _call("s3", "list_buckets")["Buckets"] == []
    assert _call("ecr", "describe_repositories")["repositories"] == []
    assert _call("secretsmanager", "list_secrets")["SecretList"] == []
    assert _call("logs", "describe_log_groups", logGroupNamePrefix="/cloudexec")["logGroups"] == []


def test_down_where_nothing_is_says_so(aws: FakeAWS) -> None:
    events: list[Event] = []
    assert _down(events.append) == ()
    texts = [each.text for each in events if isinstance(each, Noted)]
    assert texts[0] == f"there is no stack cloudexec-default in {aws.region}"


def test_down_is_continued_after_an_interruption(aws: FakeAWS) -> None:
    """The first run is cancelled when the stack begins to be deleted."""
    profile = _up()
    _fill_bucket(profile)

    async def main() -> None:
        async with AwsClients() as clients:
            begun = asyncio.Event()

            def report(event: Event) -> None:
                if isinstance(event, StepStarted) and event.title.startswith("Deleting"):
                    begun.set()

            task = asyncio.create_task(down(clients, "default", report, interval=INTERVAL))
            await begun.wait()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert _down() == ()
    assert _down() == ()


def test_up_while_it_is_being_deleted_begins_anew(aws: FakeAWS) -> None:
    first = _up()
    _call("cloudformation", "delete_stack", StackName=first.stack)
    second = _up()
    assert second.key_secret != first.key_secret


def test_what_is_written_while_the_stack_is_deleted_is_deleted_too(aws: FakeAWS) -> None:
    """The deletion fails, for the bucket is not empty, and is tried once more."""
    profile = _up()
    events: list[Event] = []

    async def main() -> tuple[Remnant, ...]:
        async with AwsClients() as clients, AwsClients() as others:
            written: list[asyncio.Task[Any]] = []

            def report(event: Event) -> None:
                events.append(event)
                is_emptied = isinstance(event, StepFinished) and event.title.startswith("Bucket")
                if is_emptied and not written:
                    put = others.call("s3", "put_object", Bucket=profile.bucket, Key="late")
                    written.append(asyncio.create_task(put))

            return await down(clients, "default", report, interval=INTERVAL)

    assert asyncio.run(main()) == ()
    notes = [each.text for each in events if isinstance(each, Noted)]
    assert any("Bucket" in each and "trying once more" in each for each in notes)


def test_stack_that_cannot_be_deleted_is_left_and_named(aws: FakeAWS) -> None:
    """Somebody keeps writing into the bucket. Once that ends, ``down`` goes on from there."""
    profile = _up()

    async def main() -> tuple[Remnant, ...]:
        async with AwsClients() as clients, AwsClients() as others:
            written: set[asyncio.Task[Any]] = set()

            def report(event: Event) -> None:
                if isinstance(event, StepFinished) and event.title.startswith("Bucket"):
                    put = others.call("s3", "put_object", Bucket=profile.bucket, Key="late")
                    written.add(asyncio.create_task(put))

            left = await down(clients, "default", report, interval=INTERVAL)
            await asyncio.gather(*written)
            return left

    left = {each.kind: each.id for each in asyncio.run(main())}
    assert left["stack"] == "cloudexec-default (DELETE_FAILED)"
    assert left["bucket"] == profile.bucket
    assert Profile.load("default") == profile
    with pytest.raises(AwsError, match="run `cloudexec down` once more"):
        _up()
    assert _down() == ()


def test_what_is_left_is_found_by_its_tag(aws: FakeAWS) -> None:
    profile = _up()
    answer = _call(
        "ec2",
        "create_security_group",
        GroupName="by-hand",
        Description="by hand",
        VpcId=profile.vpc,
        TagSpecifications=[
            {
                "ResourceType": "security-group",
                "Tags": [{"Key": "cloudexec:stack", "Value": profile.stack}],
            }
        ],
    )
    left = _down()
    assert left == (Remnant(kind="security group", id=answer["GroupId"]),)


def test_secret_that_is_scheduled_for_deletion_is_deleted_for_good(aws: FakeAWS) -> None:
    tag = {"Key": "cloudexec:stack", "Value": "cloudexec-default"}
    secret = _call("secretsmanager", "create_secret", Name="key", SecretString="x", Tags=[tag])
    _call("secretsmanager", "delete_secret", SecretId=secret["ARN"], RecoveryWindowInDays=7)
    assert _down() == ()
    listed = _call("secretsmanager", "list_secrets", IncludePlannedDeletion=True)
    assert listed["SecretList"] == []


def test_set_up_of_the_same_name_in_another_region_is_not_left_over(aws: FakeAWS) -> None:
    """Its roles and its bucket are seen from everywhere, and are nobody's to delete."""

    async def main(region: str, work: Any) -> Any:
        async with AwsClients(region) as clients:
            return await work(clients)

    def make(clients: AwsClients) -> Any:
        return up(clients, SetupOptions(), lambda event: None, interval=0.01)

    def remove(clients: AwsClients) -> Any:
        return down(clients, "default", lambda event: None, interval=0.01)

    asyncio.run(main("eu-west-1", make))
    assert asyncio.run(main("us-east-1", remove)) == ()
    assert Profile.load("default").region == "eu-west-1"
    assert asyncio.run(main("eu-west-1", remove)) == ()
    assert Profile.names() == []


def test_what_only_the_tagging_service_knows_is_found(aws: FakeAWS) -> None:
    tags = [{"Key": "cloudexec:stack", "Value": "cloudexec-default"}]
    specification = [{"ResourceType": "vpc", "Tags": tags}]
    answer = _call("ec2", "create_vpc", CidrBlock="10.9.0.0/16", TagSpecifications=specification)
    (left,) = _down()
    assert left.kind == "tagged resource"
    assert left.id.endswith(f"vpc/{answer['Vpc']['VpcId']}")


def test_what_the_tagging_service_still_lists_is_described(aws: FakeAWS) -> None:
    """It goes on listing what is deleted: only what can be described is left."""
    tags = [{"Key": "cloudexec:stack", "Value": "cloudexec-default"}]
    specification = [{"ResourceType": "volume", "Tags": tags}]
    volumes = [
        _call(
            "ec2",
            "create_volume",
            Size=1,
            AvailabilityZone="us-east-1a",
            TagSpecifications=specification,
        )["VolumeId"]
        for _ in range(2)
    ]
    _call(
        "ecs",
        "create_cluster",
        clusterName="c",
        tags=[{"key": tags[0]["Key"], "value": tags[0]["Value"]}],
    )
    aws.faults.deleted_stay_listed()
    _call("ec2", "delete_volume", VolumeId=volumes[0])
    _call("ecs", "delete_cluster", cluster="c")
    listed = _call("resourcegroupstaggingapi", "get_resources")["ResourceTagMappingList"]
    assert sum(volumes[0] in each["ResourceARN"] for each in listed) == 1
    (left,) = _down()
    assert left.id.endswith(f"volume/{volumes[1]}")


def test_what_cannot_be_described_is_said_to_be_listed_only(aws: FakeAWS) -> None:
    tags = [{"Key": "cloudexec:stack", "Value": "cloudexec-default"}]
    _call("ssm", "put_parameter", Name="p", Value="x", Type="String", Tags=tags)
    (left,) = _down()
    assert left.id.endswith(
        "parameter/p (from the tagging service, which lists deleted resources for hours)"
    )


def test_what_may_not_be_looked_for_counts_as_left(aws: FakeAWS) -> None:
    _up()
    aws.faults.deny("ListRoles")
    (left,) = _down()
    assert left.kind == "role"
    assert "iam:ListRoles" in left.id


def test_definitions_and_queues_of_others_stay(aws: FakeAWS) -> None:
    theirs = aws.set_up("theirs")
    other = Profile(
        name="x",
        region=aws.region,
        stack="cloudexec-elsewhere",
        queues={"fargate": theirs.queue},
        execution_role=theirs.execution_role,
    )
    job = _submit(other)
    _up()
    assert _down() == ()
    assert aws.job(job).status != "FAILED"
    answer = _call("batch", "describe_job_definitions", status="ACTIVE")
    assert len(answer["jobDefinitions"]) == 1
    _call("batch", "terminate_job", jobId=job, reason="the test is over")


def test_expired_credentials_are_named(aws: FakeAWS) -> None:
    aws.faults.expire_credentials()
    with pytest.raises(AwsError, match="expired") as caught:
        _up()
    assert caught.value.expired
