"""Set-up: the stack is made or brought up to date, and a profile written of what it has."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.diagnosis import mend_invalid
from cloudexec._aws.names import TAG_STACK, is_setup_name, stack_name
from cloudexec._aws.profile import Profile
from cloudexec._aws.stack import Stack, event_ids, find_stack, follow, stack_failure
from cloudexec._aws.steps import Noted, Report, counted, stepping
from cloudexec._aws.template import LOG_RETENTION_DAYS, TEMPLATE_VERSION, template
from cloudexec._errors import AwsError, ConfigError

__all__ = ["SetupOptions", "up"]

_INTERVAL = 2.0
_VALID_WITHIN = 600.0
"""Seconds for queues and environments to become VALID; CloudFormation has waited for them once."""
_SUBNETS = 16
"""Subnets of one compute environment. AWS Batch API Reference, "ComputeResource"."""
_QUEUES = {
    "fargate": "FargateQueue",
    "fargate_spot": "FargateSpotQueue",
    "ec2": "Ec2Queue",
    "ec2_spot": "Ec2SpotQueue",
}
_UNBORN = ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED")


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
        if not is_setup_name(self.name):
            raise ConfigError(
                "a profile cannot be called 'local': CLOUDEXEC_PROFILE=local means this machine"
            )
        if self.bucket_expire_days is not None and self.bucket_expire_days < 1:
            raise ConfigError(
                f"bucket_expire_days must be 1 or more, not {self.bucket_expire_days}"
            )
        if self.log_retention_days not in (None, *LOG_RETENTION_DAYS):
            choices = ", ".join(map(str, LOG_RETENTION_DAYS))
            raise ConfigError(
                f"CloudWatch Logs keeps logs for {choices} days, not {self.log_retention_days}"
            )
        if self.max_vcpus is not None and self.max_vcpus < 1:
            raise ConfigError(f"max_vcpus must be 1 or more, not {self.max_vcpus}")
        if len(self.subnets) > _SUBNETS:
            raise ConfigError(f"at most {_SUBNETS} subnets, not {len(self.subnets)}")


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
    await asyncio.to_thread(Profile.check_writable, options.name)
    earlier = _earlier_profile(options.name, report)
    if earlier is not None and earlier.stack and earlier.region != clients.region:
        raise ConfigError(
            f"the profile {options.name!r} is of a stack in {earlier.region}, not in "
            f"{clients.region}: give another --name, or first `cloudexec down --name "
            f"{options.name}`"
        )
    with stepping(report, "Credentials") as step:
        identity = await clients.call("sts", "get_caller_identity")
        step.found = f"account {identity['Account']}, {clients.region}, as {identity['Arn']}"
    stack = await _settle(clients, name, report, interval)
    if stack is None:
        stack = await _create(clients, name, options, report, interval)
    else:
        stack = await _update(clients, stack, options, report, interval)
    with stepping(report, "Queues and compute environments") as step:
        queues = [stack.outputs[key] for key in _QUEUES.values() if key in stack.outputs]
        step.found = await _await_valid(clients, queues, interval)
    with stepping(report, f"Profile {options.name}") as step:
        profile = _profile(clients.region, stack, options, earlier)
        step.found = str(profile.save())
    return profile


def _earlier_profile(name: str, report: Report) -> Profile | None:
    if not Profile.path(name).exists():
        return None
    try:
        return Profile.load(name)
    except ConfigError as exc:
        report(Noted(text=f"{exc}; it is written anew"))
        return None


async def _settle(clients: AwsClients, name: str, report: Report, interval: float) -> Stack | None:
    """Wait for what goes on, remove what a failed creation left; return what can be updated."""
    while (stack := await find_stack(clients, name)) is not None:
        if stack.is_moving:
            with stepping(report, f"Waiting for the stack {name}, {stack.status}") as step:
                done, failures = await follow(clients, stack, set(), report, interval)
                step.found = done.status if done else "deleted"
            if stack.status == "CREATE_IN_PROGRESS" and done and done.status in _UNBORN:
                raise stack_failure(done, failures)
        elif stack.status in _UNBORN:
            with stepping(report, f"Removing what is left of the stack {name}, {stack.status}"):
                seen = await event_ids(clients, stack)
                await clients.call("cloudformation", "delete_stack", StackName=stack.id)
                done, failures = await follow(clients, stack, seen, report, interval)
            if done is not None and done.status != "DELETE_COMPLETE":
                raise stack_failure(done, failures)
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
    with stepping(report, "Network") as step:
        vpc, subnets = await _network(clients, options)
        step.found = f"{vpc} with {counted(len(subnets), 'subnet')}"
    body = template()
    defaults = {k: str(v["Default"]) for k, v in body["Parameters"].items() if "Default" in v}
    network = {"VpcId": vpc, "SubnetIds": ",".join(subnets)}
    given = {**network, **defaults, **_parameters(options)}
    with stepping(report, f"Creating the stack {name}") as step:
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
        done, failures = await follow(clients, begun, set(), report, interval)
        if done is None or done.status != "CREATE_COMPLETE":
            raise stack_failure(done or begun, failures)
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
    with stepping(report, f"Updating the stack {stack.name}") as step:
        seen = await event_ids(clients, stack)
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
        done, failures = await follow(clients, stack, seen, report, interval)
        if done is None or done.status != "UPDATE_COMPLETE":
            raise stack_failure(done or stack, failures)
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
    touched: set[str] = set()
    while True:
        answer = await clients.call("batch", "describe_job_queues", jobQueues=list(queues))
        found = answer["jobQueues"]
        names = [each["computeEnvironment"] for q in found for each in q["computeEnvironmentOrder"]]
        answer = await clients.call(
            "batch", "describe_compute_environments", computeEnvironments=names
        )
        arns = {each["jobQueueArn"] for each in found}
        waiting = [f"{queue} does not exist" for queue in queues if queue not in arns]
        for kind, each in [
            *(("queue", q) for q in found),
            *(("compute environment", c) for c in answer["computeEnvironments"]),
        ]:
            is_queue = kind == "queue"
            name = each["jobQueueName" if is_queue else "computeEnvironmentName"]
            status, state = each.get("status", "VALID"), each.get("state", "ENABLED")
            if status == "INVALID" and name in touched:
                raise AwsError(
                    f"the {kind} {name} is INVALID: {each.get('statusReason') or 'no reason given'}"
                    f"; once that is mended, {mend_invalid('`cloudexec up`')}",
                    code="INVALID",
                )
            is_off = status == "VALID" and state != "ENABLED"
            if (is_off or status == "INVALID") and name not in touched:
                # `down` disables queues first, and may have been interrupted after that. What was
                # INVALID is looked at again when it is updated.
                touched.add(name)
                await clients.call(
                    "batch",
                    "update_job_queue" if is_queue else "update_compute_environment",
                    **{"jobQueue" if is_queue else "computeEnvironment": name, "state": "ENABLED"},
                )
            if status != "VALID" or state != "ENABLED":
                waiting.append(f"{kind} {name} is {status} and {state}")
        if not waiting:
            return f"{counted(len(queues), 'queue')} VALID and ENABLED"
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
