"""Set-up and teardown: one CloudFormation stack, what it does not delete by itself, and proof."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.names import DEFINITION_PREFIX, TAG_STACK, stack_name
from cloudexec._aws.profile import Profile
from cloudexec._aws.template import TEMPLATE_VERSION, template
from cloudexec._errors import AwsError, ConfigError

__all__ = [
    "Event",
    "Noted",
    "Remnant",
    "Report",
    "ResourceChanged",
    "SetupOptions",
    "Stack",
    "StepFinished",
    "StepStarted",
    "Stock",
    "down",
    "find_stack",
    "take_stock",
    "up",
]

_INTERVAL = 2.0
_VALID_WITHIN = 600.0
"""Seconds for queues and environments to become VALID; CloudFormation has waited for them once."""
_JOBS_END_WITHIN = 180.0
"""Seconds for terminated jobs to end. SIGKILL follows SIGTERM after 30 s: AWS Batch User Guide,
"Job timeouts"; the rest is AWS's own delay."""
_CALLS_AT_ONCE = 10
_SUBNETS = 16
"""Subnets of one compute environment. AWS Batch API Reference, "ComputeResource"."""
_ACTIVE = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING", "RUNNING")
"""In the order in which jobs pass through them: one that moves on meanwhile is met again."""
_QUEUES = {
    "fargate": "FargateQueue",
    "fargate_spot": "FargateSpotQueue",
    "ec2": "Ec2Queue",
    "ec2_spot": "Ec2SpotQueue",
}
_UNBORN = ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED")
_DELETE_BATCH = 1000
"""Objects in one DeleteObjects call. Amazon S3 API Reference."""
_IMAGE_BATCH = 100
"""Images in one BatchDeleteImage call. Amazon ECR API Reference."""


# What is reported -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted:
    """Work on something began."""

    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """The step that began last has ended well."""

    title: str
    found: str
    """What came of it, in a few words; may be empty."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceChanged:
    """CloudFormation says what became of one resource of the stack."""

    resource: str
    """Its name in the template."""
    kind: str
    """Such as ``"AWS::S3::Bucket"``."""
    status: str
    """Such as ``"CREATE_COMPLETE"``."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """Something worth knowing that stops nothing."""

    text: str


Event: TypeAlias = StepStarted | StepFinished | ResourceChanged | Noted
Report: TypeAlias = Callable[[Event], None]
"""Called on the event loop's thread, and must not block."""


@dataclass(slots=True)
class _Step:
    found: str = ""


@contextlib.contextmanager
def _step(report: Report, title: str) -> Iterator[_Step]:
    report(StepStarted(title=title))
    started = time.monotonic()
    step = _Step()
    yield step
    report(StepFinished(title=title, found=step.found, seconds=time.monotonic() - started))


# What is asked for, and what there is ---------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupOptions:
    """What to set up. Empty and ``None``: as the stack has it, or the template's default."""

    name: str = "default"
    """Of the profile; the stack is ``cloudexec-NAME``."""
    vpc: str = ""
    """A new stack uses the default VPC if none is given."""
    subnets: tuple[str, ...] = ()
    """A new stack uses all default subnets, or those of the VPC that is given."""
    max_vcpus: int | None = None
    ec2: bool | None = None
    """Whether there are queues for EC2 instances too."""
    public_ip: bool | None = None
    log_retention_days: int | None = None
    bucket_expire_days: int | None = None
    project: str = ""

    def __post_init__(self) -> None:
        stack_name(self.name)
        if self.max_vcpus is not None and self.max_vcpus < 1:
            raise ConfigError(f"max_vcpus must be 1 or more, not {self.max_vcpus}")
        if len(self.subnets) > _SUBNETS:
            raise ConfigError(f"at most {_SUBNETS} subnets, not {len(self.subnets)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A CloudFormation stack as it is now."""

    id: str
    """Its ARN, by which it can be found for a while even when it is deleted."""
    name: str
    status: str
    reason: str
    outputs: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_moving(self) -> bool:
        """Whether an operation goes on."""
        return self.status.endswith("_IN_PROGRESS") and self.status != "REVIEW_IN_PROGRESS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """What ``down`` would end or delete for good."""

    stack: Stack | None
    jobs: int
    """Jobs that have not finished; an array counts once."""
    objects: int
    """Objects in the bucket, as far as counted: see ``has_more_objects``."""
    has_more_objects: bool
    images: int
    """Images in the repository."""
    definitions: int
    """Active revisions of job definitions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remnant:
    """Something of the stack that is still there after teardown."""

    kind: str
    id: str


async def find_stack(clients: AwsClients, name: str) -> Stack | None:
    """Look a stack up.

    Args:
        clients: Where to look.
        name: Its name or ARN.

    Returns:
        The stack, or ``None`` if there is none.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    try:
        answer = await clients.call("cloudformation", "describe_stacks", StackName=name)
    except AwsError as exc:
        if exc.code == "ValidationError" and "does not exist" in exc.message:
            return None
        raise
    found = answer["Stacks"][0]
    return Stack(
        id=found["StackId"],
        name=found["StackName"],
        status=found["StackStatus"],
        reason=found.get("StackStatusReason", ""),
        outputs={each["OutputKey"]: each["OutputValue"] for each in found.get("Outputs", ())},
        parameters={
            each["ParameterKey"]: each.get("ParameterValue", "")
            for each in found.get("Parameters", ())
        },
    )


# Up -------------------------------------------------------------------------------------------


async def up(
    clients: AwsClients, options: SetupOptions, report: Report, *, interval: float = _INTERVAL
) -> Profile:
    """Create the stack or bring it up to date, wait until it can be used, write the profile.

    May be repeated: what is there is kept, what goes on is waited for, what failed is made anew.
    When cancelled, the stack goes on by itself, and the next call continues.

    Args:
        clients: Account and region to set up in.
        options: What to set up.
        report: Told of each step.
        interval: Seconds between two looks at the stack.

    Raises:
        AwsError: If AWS refuses, or the stack fails: with the reason of the first failure.
        ConfigError: If there is no network to use, or the profile belongs to another stack.
    """
    name = stack_name(options.name)
    earlier = _earlier_profile(options.name, report)
    if earlier is not None and earlier.stack and earlier.region != clients.region:
        raise ConfigError(
            f"the profile {options.name!r} is of a stack in {earlier.region}, not in "
            f"{clients.region}: give another --name, or first `cloudexec down --name "
            f"{options.name}`"
        )
    with _step(report, "Credentials") as step:
        identity = await clients.call("sts", "get_caller_identity")
        step.found = f"account {identity['Account']}, {clients.region}, as {identity['Arn']}"
    stack = await _settle(clients, name, report, interval)
    if stack is None:
        stack = await _create(clients, name, options, report, interval)
    else:
        stack = await _update(clients, stack, options, report, interval)
    with _step(report, "Queues and compute environments") as step:
        queues = [stack.outputs[key] for key in _QUEUES.values() if key in stack.outputs]
        step.found = await _await_valid(clients, queues, interval)
    with _step(report, f"Profile {options.name}") as step:
        profile = _profile(clients.region, stack, options, earlier)
        step.found = str(profile.save())
    return profile


def _earlier_profile(name: str, report: Report | None = None) -> Profile | None:
    if not Profile.path(name).exists():
        return None
    try:
        return Profile.load(name)
    except ConfigError as exc:
        if report is not None:
            report(Noted(text=f"{exc}; it is written anew"))
        return None


async def _settle(clients: AwsClients, name: str, report: Report, interval: float) -> Stack | None:
    """Wait for what goes on, remove what a failed creation left; return what can be updated."""
    while (stack := await find_stack(clients, name)) is not None:
        if stack.is_moving:
            with _step(report, f"Waiting for the stack {name}, {stack.status}") as step:
                done, failures = await _follow(clients, stack, set(), report, interval)
                step.found = done.status if done else "deleted"
            if stack.status == "CREATE_IN_PROGRESS" and done and done.status in _UNBORN:
                raise _failure(done, failures)
        elif stack.status in _UNBORN:
            with _step(report, f"Removing what is left of the stack {name}, {stack.status}"):
                seen = await _event_ids(clients, stack)
                await clients.call("cloudformation", "delete_stack", StackName=stack.id)
                done, failures = await _follow(clients, stack, seen, report, interval)
            if done is not None and done.status != "DELETE_COMPLETE":
                raise _failure(done, failures)
        elif stack.status == "DELETE_FAILED":
            raise AwsError(
                f"the stack {name} could not be deleted earlier ({stack.reason or 'no reason'}): "
                f"run `cloudexec down` once more, then `cloudexec up`",
                code=stack.status,
            )
        elif stack.status in ("REVIEW_IN_PROGRESS", "UPDATE_ROLLBACK_FAILED"):
            raise AwsError(
                f"the stack {name} is in {stack.status}, which cloudexec leaves alone: finish or "
                f"delete it in the CloudFormation console, then run `cloudexec up` again",
                code=stack.status,
            )
        elif stack.status == "DELETE_COMPLETE":
            return None
        else:
            return stack
    return None


async def _create(
    clients: AwsClients, name: str, options: SetupOptions, report: Report, interval: float
) -> Stack:
    with _step(report, "Network") as step:
        vpc, subnets = await _network(clients, options)
        step.found = f"{vpc} with {_count(len(subnets), 'subnet')}"
    body = template()
    defaults = {k: str(v["Default"]) for k, v in body["Parameters"].items() if "Default" in v}
    network = {"VpcId": vpc, "SubnetIds": ",".join(subnets)}
    given = {**network, **defaults, **_parameters(options)}
    with _step(report, f"Creating the stack {name}") as step:
        created = await clients.call(
            "cloudformation",
            "create_stack",
            StackName=name,
            TemplateBody=json.dumps(body),
            Parameters=_pairs(given),
            Capabilities=["CAPABILITY_IAM"],
            Tags=[{"Key": TAG_STACK, "Value": name}],
        )
        begun = Stack(id=created["StackId"], name=name, status="CREATE_IN_PROGRESS", reason="")
        done, failures = await _follow(clients, begun, set(), report, interval)
        if done is None or done.status != "CREATE_COMPLETE":
            raise _failure(done or begun, failures)
        step.found = done.status
    return done


async def _update(
    clients: AwsClients, stack: Stack, options: SetupOptions, report: Report, interval: float
) -> Stack:
    version = stack.outputs.get("Version", "")
    if version.isdecimal() and int(version) > int(TEMPLATE_VERSION):
        raise ConfigError(
            f"the stack {stack.name} has template version {version}, made by a newer cloudexec "
            f"than this one, which has {TEMPLATE_VERSION}: upgrade cloudexec"
        )
    given = _parameters(options)
    if options.vpc or options.subnets:
        vpc, subnets = await _network(clients, options)
        given |= {"VpcId": vpc, "SubnetIds": ",".join(subnets)}
    body = template()
    kept = [
        {"ParameterKey": key, "UsePreviousValue": True}
        for key in body["Parameters"]
        if key in stack.parameters and key not in given
    ]
    with _step(report, f"Updating the stack {stack.name}") as step:
        seen = await _event_ids(clients, stack)
        try:
            await clients.call(
                "cloudformation",
                "update_stack",
                StackName=stack.name,
                TemplateBody=json.dumps(body),
                Parameters=[*_pairs(given), *kept],
                Capabilities=["CAPABILITY_IAM"],
            )
        except AwsError as exc:
            if "No updates are to be performed" not in exc.message:
                raise
            step.found = "nothing to change"
            return stack
        done, failures = await _follow(clients, stack, seen, report, interval)
        if done is None or done.status != "UPDATE_COMPLETE":
            raise _failure(done or stack, failures)
        step.found = done.status
    return done


def _parameters(options: SetupOptions) -> dict[str, str]:
    given: dict[str, str | None] = {
        "MaxVcpus": _text(options.max_vcpus),
        "LogRetentionDays": _text(options.log_retention_days),
        "BucketExpireDays": _text(options.bucket_expire_days),
        "Ec2": None if options.ec2 is None else ("true" if options.ec2 else "false"),
        "AssignPublicIp": (
            None if options.public_ip is None else ("ENABLED" if options.public_ip else "DISABLED")
        ),
    }
    return {key: value for key, value in given.items() if value is not None}


def _pairs(parameters: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)


async def _network(clients: AwsClients, options: SetupOptions) -> tuple[str, tuple[str, ...]]:
    """Return the VPC and subnets that are asked for, or the account's default ones."""
    if options.subnets:
        found = [
            each
            async for each in clients.pages(
                "ec2", "describe_subnets", "Subnets", SubnetIds=list(options.subnets)
            )
        ]
        vpcs = sorted({each["VpcId"] for each in found} | ({options.vpc} - {""}))
        if len(vpcs) != 1:
            raise ConfigError(f"all subnets must be in one VPC, but these are in {', '.join(vpcs)}")
        return vpcs[0], options.subnets
    filters: list[dict[str, Any]] = [{"Name": "state", "Values": ["available"]}]
    vpc = options.vpc
    if not vpc:
        defaults = await clients.call(
            "ec2", "describe_vpcs", Filters=[{"Name": "is-default", "Values": ["true"]}]
        )
        if not defaults["Vpcs"]:
            raise ConfigError(
                f"there is no default VPC in {clients.region}: name one with --vpc and, if not all "
                f"of its subnets are meant, --subnet; or make one with `aws ec2 create-default-vpc`"
            )
        vpc = defaults["Vpcs"][0]["VpcId"]
        filters.append({"Name": "default-for-az", "Values": ["true"]})
    subnets = [
        each
        async for each in clients.pages(
            "ec2",
            "describe_subnets",
            "Subnets",
            Filters=[*filters, {"Name": "vpc-id", "Values": [vpc]}],
        )
    ]
    if options.vpc and options.public_ip is not False:
        # A public address is of no use in a private subnet.
        subnets = [each for each in subnets if each.get("MapPublicIpOnLaunch")] or subnets
    if not subnets:
        raise ConfigError(f"{vpc} has no subnets to run workers in: name them with --subnet")
    subnets.sort(key=lambda each: (each.get("AvailabilityZone", ""), each["SubnetId"]))
    return vpc, tuple(each["SubnetId"] for each in subnets[:_SUBNETS])


async def _await_valid(clients: AwsClients, queues: Sequence[str], interval: float) -> str:
    """Wait until queues and their environments are VALID, and enable those that are not."""
    started = time.monotonic()
    enabled: set[str] = set()
    while True:
        answer = await clients.call("batch", "describe_job_queues", jobQueues=list(queues))
        found = answer["jobQueues"]
        names = [each["computeEnvironment"] for q in found for each in q["computeEnvironmentOrder"]]
        answer = await clients.call(
            "batch", "describe_compute_environments", computeEnvironments=names
        )
        waiting = [f"{missing} does not exist" for missing in queues[len(found) :]]
        for kind, each in [
            *(("queue", q) for q in found),
            *(("compute environment", c) for c in answer["computeEnvironments"]),
        ]:
            is_queue = kind == "queue"
            name = each["jobQueueName" if is_queue else "computeEnvironmentName"]
            status, state = each.get("status", "VALID"), each.get("state", "ENABLED")
            if status == "INVALID":
                raise AwsError(
                    f"the {kind} {name} is INVALID: {each.get('statusReason') or 'no reason given'}"
                    f"; once that is mended, `cloudexec up` again",
                    code="INVALID",
                )
            if state != "ENABLED" and status == "VALID" and name not in enabled:
                # `down` disables queues first, and may have been interrupted after that.
                enabled.add(name)
                await clients.call(
                    "batch",
                    "update_job_queue" if is_queue else "update_compute_environment",
                    **{"jobQueue" if is_queue else "computeEnvironment": name, "state": "ENABLED"},
                )
            if status != "VALID" or state != "ENABLED":
                waiting.append(f"{kind} {name} is {status} and {state}")
        if not waiting:
            return f"{_count(len(queues), 'queue')} VALID and ENABLED"
        if time.monotonic() - started > _VALID_WITHIN:
            raise AwsError(
                f"after {_VALID_WITHIN:.0f} s, {'; '.join(waiting)}: look at it in the AWS Batch "
                f"console, then run `cloudexec up` again",
                code="NotValid",
            )
        await asyncio.sleep(interval)


def _profile(region: str, stack: Stack, options: SetupOptions, earlier: Profile | None) -> Profile:
    outputs = stack.outputs
    base = earlier or Profile(name=options.name, region=region)
    repository = outputs.get("Repository", "")
    return replace(
        base,
        region=region,
        stack=stack.name,
        queues={kind: outputs[key] for kind, key in _QUEUES.items() if key in outputs},
        job_role=outputs.get("JobRole", ""),
        execution_role=outputs.get("ExecutionRole", ""),
        key_secret=outputs.get("KeySecret", ""),
        log_group=outputs.get("LogGroup", ""),
        bucket=outputs.get("Bucket", ""),
        repository=repository,
        # Images went with the repository that they were in.
        images=base.images if base.repository in ("", repository) else {},
        security_group=outputs.get("SecurityGroup", ""),
        vpc=outputs.get("Vpc", ""),
        subnets=tuple(filter(None, outputs.get("Subnets", "").split(","))),
        assign_public_ip=outputs.get("AssignPublicIp", "ENABLED") == "ENABLED",
        project=options.project or base.project,
    )


# Following a stack ----------------------------------------------------------------------------


async def _follow(
    clients: AwsClients, stack: Stack, seen: set[str], report: Report, interval: float
) -> tuple[Stack | None, list[ResourceChanged]]:
    """Report what happens until the stack rests; return it, and what failed, first things first.

    Args:
        stack: Is looked up by its id, which stays when it is deleted.
        seen: Ids of events that are known.
    """
    failures: list[ResourceChanged] = []
    while True:
        # The state before the events: all of what led to it is then among them.
        now = await find_stack(clients, stack.id)
        if now is not None:
            for event in await _new_events(clients, now, seen):
                if event.resource == stack.name:
                    continue
                report(event)
                if event.status.endswith("_FAILED") and "cancelled" not in event.reason.lower():
                    failures.append(event)
        if now is None or not now.is_moving:
            return now, failures
        await asyncio.sleep(interval)


async def _new_events(clients: AwsClients, stack: Stack, seen: set[str]) -> list[ResourceChanged]:
    events: list[ResourceChanged] = []
    # The newest come first, so the known ones end the search.
    async for each in clients.pages(
        "cloudformation", "describe_stack_events", "StackEvents", StackName=stack.id
    ):
        if each["EventId"] in seen:
            break
        seen.add(each["EventId"])
        events.append(
            ResourceChanged(
                resource=each.get("LogicalResourceId", ""),
                kind=each.get("ResourceType", ""),
                status=each.get("ResourceStatus", ""),
                reason=each.get("ResourceStatusReason", ""),
            )
        )
    return events[::-1]


async def _event_ids(clients: AwsClients, stack: Stack) -> set[str]:
    seen: set[str] = set()
    await _new_events(clients, stack, seen)
    return seen


def _failure(stack: Stack, failures: Sequence[ResourceChanged]) -> AwsError:
    if failures:
        first = failures[0]
        why = f"{first.resource} ({first.kind}): {first.reason or 'no reason given'}"
    else:
        why = stack.reason or "no reason given"
    return AwsError(
        f"the stack {stack.name} failed ({stack.status}): {why}; once that is mended, run "
        f"`cloudexec up` again, which removes what is left and begins anew",
        code=stack.status,
        operation="cloudformation",
    )


# Down -----------------------------------------------------------------------------------------


async def take_stock(clients: AwsClients, name: str) -> Stock:
    """Say what ``down`` would end and delete.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    stack = await find_stack(clients, stack_name(name))
    resources = await _resources(clients, stack)
    jobs: set[str] = set()
    for queue in resources.get("AWS::Batch::JobQueue", ()):
        jobs |= await _active_jobs(clients, queue)
    objects, has_more = 0, False
    for bucket in resources.get("AWS::S3::Bucket", ()):
        page = await _unless_gone(
            clients.call("s3", "list_object_versions", Bucket=bucket, MaxKeys=_DELETE_BATCH), {}
        )
        objects += len(page.get("Versions", ())) + len(page.get("DeleteMarkers", ()))
        has_more = has_more or bool(page.get("IsTruncated"))
    images = 0
    for repository in resources.get("AWS::ECR::Repository", ()):
        images += len(await _digests(clients, repository))
    roles = resources.get("AWS::IAM::Role", ())
    definitions = [each async for each in _definitions(clients, stack_name(name), roles)]
    return Stock(
        stack=stack,
        jobs=len(jobs),
        objects=objects,
        has_more_objects=has_more,
        images=images,
        definitions=len(definitions),
    )


async def down(
    clients: AwsClients,
    name: str,
    report: Report,
    *,
    interval: float = _INTERVAL,
    jobs_end_within: float = _JOBS_END_WITHIN,
) -> tuple[Remnant, ...]:
    """End the stack's jobs, delete all that it holds, the stack and the profile; then look.

    May be repeated, also after an interruption; where nothing is, nothing happens.

    Args:
        clients: Account and region of the stack.
        name: Of the profile; the stack is ``cloudexec-NAME``.
        report: Told of each step.
        interval: Seconds between two looks.
        jobs_end_within: Seconds to wait for terminated jobs to end; AWS Batch deletes queues
            with jobs too, but its Fargate environments may then get stuck.

    Returns:
        What is left: nothing, if all went well.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    stack_of = stack_name(name)
    with _step(report, "Credentials") as step:
        identity = await clients.call("sts", "get_caller_identity")
        step.found = f"account {identity['Account']}, {clients.region}, as {identity['Arn']}"
    stack = await find_stack(clients, stack_of)
    resources = await _resources(clients, stack)
    queues = resources.get("AWS::Batch::JobQueue", ())
    if queues:
        with _step(report, "Jobs") as step:
            for queue in queues:
                await _disable_queue(clients, queue)
            ended, running = await _end_jobs(clients, queues, interval, jobs_end_within)
            step.found = f"{_count(ended, 'job')} terminated" if ended else "none was active"
        if running:
            text = f"{_count(running, 'job')} still ending after {jobs_end_within:.0f} s: going on"
            report(Noted(text=text))
    with _step(report, "Job definitions") as step:
        count = 0
        roles = resources.get("AWS::IAM::Role", ())
        arns = [each async for each in _definitions(clients, stack_of, roles)]
        for arn in arns:
            await clients.call("batch", "deregister_job_definition", jobDefinition=arn)
            count += 1
        step.found = f"{count:,} deregistered" if count else "there was none"
    if stack is None:
        report(Noted(text=f"there is no stack {stack_of} in {clients.region}"))
    else:
        await _empty(clients, resources, report)
        stack = await _delete(clients, stack, resources, report, interval)
    await _purge_secrets(clients, stack_of)
    if stack is None:
        earlier = _earlier_profile(name)
        if earlier is not None and earlier.stack == stack_of and earlier.region == clients.region:
            earlier.delete()
            report(Noted(text=f"profile {name} deleted"))
    with _step(report, "Looking for what is left") as step:
        remnants = await _remnants(clients, stack_of, report)
        step.found = f"{_count(len(remnants), 'thing')}" if remnants else "nothing"
    return remnants


async def _resources(clients: AwsClients, stack: Stack | None) -> dict[str, tuple[str, ...]]:
    """Return physical ids of the stack's resources that exist, by type."""
    found: dict[str, tuple[str, ...]] = {}
    if stack is None or stack.status == "DELETE_COMPLETE":
        return found
    answer = await clients.call("cloudformation", "describe_stack_resources", StackName=stack.id)
    for each in answer["StackResources"]:
        physical = each.get("PhysicalResourceId")
        if physical and each.get("ResourceStatus") != "DELETE_COMPLETE":
            kind = each["ResourceType"]
            found[kind] = (*found.get(kind, ()), physical)
    return found


async def _active_jobs(clients: AwsClients, queue: str) -> set[str]:
    """Return ids of jobs that have not finished; of arrays, the parent's."""
    found: set[str] = set()
    try:
        for status in _ACTIVE:
            async for each in clients.pages(
                "batch", "list_jobs", "jobSummaryList", jobQueue=queue, jobStatus=status
            ):
                if each.get("status", status) == status:
                    found.add(each["jobId"].partition(":")[0])
    except AwsError as exc:
        if exc.code != "ClientException":  # the queue is gone
            raise
    return found


async def _disable_queue(clients: AwsClients, queue: str) -> None:
    try:
        await clients.call("batch", "update_job_queue", jobQueue=queue, state="DISABLED")
    except AwsError as exc:
        # It may be gone, or on its way: a deletion that was interrupted goes on.
        if exc.transient or exc.code != "ClientException":
            raise


async def _end_jobs(
    clients: AwsClients, queues: Iterable[str], interval: float, within: float
) -> tuple[int, int]:
    """Terminate jobs until none is active; return how many were, and how many still are."""
    gate = asyncio.Semaphore(_CALLS_AT_ONCE)

    async def terminate(job: str) -> None:
        async with gate:
            await clients.call(
                "batch", "terminate_job", jobId=job, reason="cloudexec down: the stack is deleted"
            )

    ended: set[str] = set()
    started = time.monotonic()
    while True:
        active: set[str] = set()
        for queue in queues:
            active |= await _active_jobs(clients, queue)
        await asyncio.gather(*(terminate(job) for job in active - ended))
        ended |= active
        if not active or time.monotonic() - started > within:
            return len(ended), len(active)
        await asyncio.sleep(interval)


async def _definitions(clients: AwsClients, stack: str, roles: Iterable[str]) -> AsyncIterator[str]:
    """Yield ARNs of the active job definitions that were registered for the stack: by their tag,
    or by our name together with the stack's roles."""
    names = set(roles)
    async for each in clients.pages(
        "batch", "describe_job_definitions", "jobDefinitions", status="ACTIVE"
    ):
        if each.get("status", "ACTIVE") != "ACTIVE":
            continue
        container = each.get("containerProperties") or {}
        used = {
            container.get(key, "").rpartition("/")[2] for key in ("jobRoleArn", "executionRoleArn")
        }
        is_ours = each["jobDefinitionName"].startswith(DEFINITION_PREFIX) and used & names
        if each.get("tags", {}).get(TAG_STACK) == stack or is_ours:
            yield each["jobDefinitionArn"]


async def _empty(
    clients: AwsClients, resources: Mapping[str, tuple[str, ...]], report: Report
) -> None:
    """Delete what CloudFormation does not: objects and images."""
    for bucket in resources.get("AWS::S3::Bucket", ()):
        with _step(report, f"Bucket {bucket}") as step:
            count = await _empty_bucket(clients, bucket)
            step.found = f"{_count(count, 'object')} deleted" if count else "was empty"
    for repository in resources.get("AWS::ECR::Repository", ()):
        with _step(report, f"Repository {repository}") as step:
            count = await _empty_repository(clients, repository)
            step.found = f"{_count(count, 'image')} deleted" if count else "was empty"


async def _empty_bucket(clients: AwsClients, bucket: str) -> int:
    count = 0
    try:
        while True:
            page = await clients.call(
                "s3", "list_object_versions", Bucket=bucket, MaxKeys=_DELETE_BATCH
            )
            objects = [
                {"Key": each["Key"], "VersionId": each["VersionId"]}
                for each in (*page.get("Versions", ()), *page.get("DeleteMarkers", ()))
            ]
            if not objects:
                break
            answer = await clients.call(
                "s3", "delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True}
            )
            if answer.get("Errors"):
                first = answer["Errors"][0]
                raise AwsError(
                    f"{first.get('Key')} in {bucket} cannot be deleted: {first.get('Message')}",
                    code=first.get("Code", ""),
                    operation="s3:DeleteObjects",
                )
            count += len(objects)
        async for each in clients.pages("s3", "list_multipart_uploads", "Uploads", Bucket=bucket):
            await clients.call(
                "s3",
                "abort_multipart_upload",
                Bucket=bucket,
                Key=each["Key"],
                UploadId=each["UploadId"],
            )
    except AwsError as exc:
        if not _is_gone(exc):
            raise
    return count


async def _digests(clients: AwsClients, repository: str) -> set[str]:
    try:
        return {
            each["imageDigest"]
            async for each in clients.pages(
                "ecr", "list_images", "imageIds", repositoryName=repository
            )
        }
    except AwsError as exc:
        if _is_gone(exc):
            return set()
        raise


async def _empty_repository(clients: AwsClients, repository: str) -> int:
    count, before = 0, set[str]()
    # An index goes before the images that it lists, so more than one pass may be needed.
    while (digests := await _digests(clients, repository)) and digests != before:
        ordered = sorted(digests)
        for start in range(0, len(ordered), _IMAGE_BATCH):
            chunk = [{"imageDigest": each} for each in ordered[start : start + _IMAGE_BATCH]]
            answer = await clients.call(
                "ecr", "batch_delete_image", repositoryName=repository, imageIds=chunk
            )
            count += len({each["imageDigest"] for each in answer.get("imageIds", ())})
        before = digests
    return count


async def _delete(
    clients: AwsClients,
    stack: Stack,
    resources: Mapping[str, tuple[str, ...]],
    report: Report,
    interval: float,
) -> Stack | None:
    """Delete the stack, a second time if the first fails; return it if it is still there."""
    for is_last in (False, True):
        with _step(report, f"Deleting the stack {stack.name}") as step:
            seen = await _event_ids(clients, stack)
            await clients.call("cloudformation", "delete_stack", StackName=stack.id)
            done, failures = await _follow(clients, stack, seen, report, interval)
            if done is None or done.status == "DELETE_COMPLETE":
                step.found = "DELETE_COMPLETE"
                return None
            step.found = done.status
        reasons = "; ".join(f"{each.resource}: {each.reason}" for each in failures)
        text = f"the stack could not be deleted: {reasons or done.reason or 'no reason given'}"
        if "depend" in text:
            # "resource sg-... has a dependent object": a machine of the user's is in the group.
            text += (
                "; something still uses it: take your machines out of the stack's security group"
            )
        report(Noted(text=text if is_last else f"{text}; trying once more"))
        if not is_last:
            # Somebody may have written into them meanwhile.
            await _empty(clients, resources, report)
    return done


async def _purge_secrets(clients: AwsClients, stack: str) -> None:
    """Delete for good what is only scheduled for deletion."""
    async for each in _tagged_secrets(clients, stack, planned=True):
        if each.get("DeletedDate"):
            await clients.call(
                "secretsmanager",
                "delete_secret",
                SecretId=each["ARN"],
                ForceDeleteWithoutRecovery=True,
            )


# Proof ----------------------------------------------------------------------------------------

_TYPES_SEEN_DIRECTLY = ("batch", "cloudformation", "ecr", "iam", "logs", "s3", "secretsmanager")


async def _remnants(clients: AwsClients, stack: str, report: Report) -> tuple[Remnant, ...]:
    """Ask each service for what carries the stack's tag, then the tagging service for the rest."""
    finders: dict[str, Callable[[AwsClients, str], AsyncIterator[str]]] = {
        "stack": _left_stack,
        "job queue": _left_queues,
        "compute environment": _left_environments,
        "job definition": _left_definitions,
        "bucket": _left_buckets,
        "repository": _left_repositories,
        "log group": _left_log_groups,
        "secret": _left_secrets,
        "security group": _left_groups,
        "instance": _left_instances,
        "role": _left_roles,
        "tagged resource": _left_elsewhere,
    }
    remnants: list[Remnant] = []
    for kind, find in finders.items():
        try:
            remnants += [Remnant(kind=kind, id=each) async for each in find(clients, stack)]
        except AwsError as exc:
            if exc.transient or exc.expired:
                raise
            report(Noted(text=f"could not look for a {kind}: {exc}"))
    return tuple(remnants)


async def _left_stack(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    found = await find_stack(clients, stack)
    if found is not None and found.status != "DELETE_COMPLETE":
        yield f"{found.name} ({found.status})"


async def _left_queues(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    async for each in clients.pages("batch", "describe_job_queues", "jobQueues"):
        if each.get("tags", {}).get(TAG_STACK) == stack and each.get("status") != "DELETED":
            yield each["jobQueueName"]


async def _left_environments(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    async for each in clients.pages(
        "batch", "describe_compute_environments", "computeEnvironments"
    ):
        if each.get("tags", {}).get(TAG_STACK) == stack and each.get("status") != "DELETED":
            yield each["computeEnvironmentName"]


async def _left_definitions(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    async for each in _definitions(clients, stack, ()):
        yield each


async def _left_buckets(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    answer = await clients.call("s3", "list_buckets")
    for each in answer.get("Buckets", ()):
        if each["Name"].startswith(_beginning(stack)):
            tagging = await _unless_gone(
                clients.call("s3", "get_bucket_tagging", Bucket=each["Name"]), {}
            )
            if _has_tag(tagging.get("TagSet", ()), stack):
                yield each["Name"]


async def _left_repositories(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    async for each in clients.pages("ecr", "describe_repositories", "repositories"):
        if each["repositoryName"] == stack:
            tags = await clients.call(
                "ecr", "list_tags_for_resource", resourceArn=each["repositoryArn"]
            )
            if _has_tag(tags.get("tags", ()), stack):
                yield each["repositoryName"]


async def _left_log_groups(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    name = f"/cloudexec/{stack}"
    async for each in clients.pages(
        "logs", "describe_log_groups", "logGroups", logGroupNamePrefix=name
    ):
        if each["logGroupName"] == name:
            yield name


async def _tagged_secrets(
    clients: AwsClients, stack: str, *, planned: bool = False
) -> AsyncIterator[Any]:
    async for each in clients.pages(
        "secretsmanager",
        "list_secrets",
        "SecretList",
        Filters=[{"Key": "tag-key", "Values": [TAG_STACK]}],
        IncludePlannedDeletion=planned,
    ):
        if _has_tag(each.get("Tags", ()), stack):
            yield each


async def _left_secrets(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    async for each in _tagged_secrets(clients, stack):
        yield each["ARN"]


async def _left_groups(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    async for each in clients.pages(
        "ec2",
        "describe_security_groups",
        "SecurityGroups",
        Filters=[{"Name": f"tag:{TAG_STACK}", "Values": [stack]}],
    ):
        yield each["GroupId"]


async def _left_instances(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    states = ["pending", "running", "stopping", "stopped"]
    async for each in clients.pages(
        "ec2",
        "describe_instances",
        "Reservations",
        Filters=[
            {"Name": f"tag:{TAG_STACK}", "Values": [stack]},
            {"Name": "instance-state-name", "Values": states},
        ],
    ):
        for instance in each["Instances"]:
            yield instance["InstanceId"]


async def _left_roles(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    async for each in clients.pages("iam", "list_roles", "Roles"):
        if each["RoleName"].startswith(_beginning(stack)):
            tags = await clients.call("iam", "list_role_tags", RoleName=each["RoleName"])
            if _has_tag(tags.get("Tags", ()), stack):
                yield each["RoleName"]


async def _left_elsewhere(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    async for each in clients.pages(
        "resourcegroupstaggingapi",
        "get_resources",
        "ResourceTagMappingList",
        TagFilters=[{"Key": TAG_STACK, "Values": [stack]}],
    ):
        arn = each["ResourceARN"]
        service, resource = arn.split(":")[2], arn.split(":", 5)[5]
        # This service lags behind: what was asked for directly is not asked for twice. Jobs that
        # have ended and definitions that are deregistered stay listed for a time, as AWS has it.
        is_known = service == "ec2" and resource.startswith(("security-group", "instance"))
        if service not in _TYPES_SEEN_DIRECTLY and not is_known:
            yield arn


def _beginning(stack: str) -> str:
    """Return how names begin that CloudFormation made: tags are read only of these.

    It shortens the stack's name to fit, for roles to 64 characters in all.
    """
    return stack[:20]


def _has_tag(tags: Iterable[Mapping[str, str]], stack: str) -> bool:
    return any(each.get("Key") == TAG_STACK and each.get("Value") == stack for each in tags)


def _is_gone(exc: AwsError) -> bool:
    return exc.code in ("NoSuchBucket", "NoSuchTagSet", "RepositoryNotFoundException")


async def _unless_gone(answer: Awaitable[Any], otherwise: Any) -> Any:
    try:
        return await answer
    except AwsError as exc:
        if _is_gone(exc):
            return otherwise
        raise


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
