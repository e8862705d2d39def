"""Set-up: creates or updates the stack, and writes a profile with its resources."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cloudexec._aws import template_ec2
from cloudexec._aws.address import advertised_address, vpcs_of_this_machine
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.diagnosis import mend_invalid
from cloudexec._aws.names import RELAY_QUEUE, TAG_STACK, is_setup_name, stack_name
from cloudexec._aws.network import SUBNETS_LARGEST, choose_network
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.relays import AUTO, lacks_for_relay, relay_price
from cloudexec._aws.requests import check_tags
from cloudexec._aws.stack import STANDING, Stack, event_ids, find_stack, follow, stack_failure
from cloudexec._aws.steps import Noted, Report, counted, stepping
from cloudexec._aws.teardown_ec2 import check_no_instances
from cloudexec._aws.template import LOG_RETENTION_DAYS, TEMPLATE_VERSION, template
from cloudexec._errors import AwsError, ConfigError

__all__ = ["SetupOptions", "adopt", "up"]

_INTERVAL = 2.0
_VALID_WITHIN = 600.0
"""Seconds until queues and environments must be VALID. CloudFormation has waited once before."""
_QUEUES = {
    "fargate": "FargateQueue",
    "fargate_spot": "FargateSpotQueue",
    RELAY_QUEUE: "RelayQueue",
    "ec2": "Ec2Queue",
    "ec2_spot": "Ec2SpotQueue",
}
_PARAMETERS = {"fargate": "Fargate", "ec2": template_ec2.PARAMETER, "lambda": "Lambda"}
"""By launcher: the template's parameter that adds the launcher's resources to the stack."""
_NEEDED_OUTPUTS = ("FargateQueue", "ExecutionRole", "JobRole", "KeySecret", "LogGroup", "Version")
_POLICY = re.compile(r"arn:aws[a-z-]*:iam::(\d{12}|aws):policy/[\w+=,.@/-]+")
_UNBORN = ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupOptions:
    """Options of a set-up. Empty and ``None``: as in the stack, or the template's default."""

    name: str = "default"
    """Name of the profile. The stack is ``cloudexec-NAME``."""
    vpc: str = ""
    """VPC of the workers. A new stack uses the default VPC if none is given."""
    subnets: tuple[str, ...] = ()
    """Subnets of the workers. A new stack uses those of the VPC in which workers can start; in the
    default VPC, only its default subnets."""
    max_vcpus: int | None = None
    ec2: bool | None = None
    """Whether there are queues for EC2 instances, too."""
    launchers: tuple[str, ...] | None = None
    """Launchers for which the stack has resources: ``"fargate"``, ``"ec2"`` and ``"lambda"``. It
    always has those for ``"batch"``."""
    public_ip: bool | None = None
    """Whether workers get public addresses. For a new stack or a changed network, the default is
    yes if there are subnets with an internet gateway."""
    log_retention_days: int | None = None
    bucket_expire_days: int | None = None
    project: str = ""
    permissions_boundary: str | None = None
    """ARN of the permissions boundary of the stack's roles; empty: none."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of a new stack, and of all its resources that can have tags."""

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
        if self.launchers is not None and not self.launchers:
            raise ConfigError(
                f"the list of launchers is empty; a stack can be for "
                f"{', '.join(('batch', *_PARAMETERS))}"
            )
        if unknown := set(self.launchers or ()) - {"batch", *_PARAMETERS}:
            raise ConfigError(
                f"a stack can be for {', '.join(('batch', *_PARAMETERS))}, not for "
                f"{', '.join(sorted(unknown))}"
            )
        if self.max_vcpus is not None and self.max_vcpus < 1:
            raise ConfigError(f"max_vcpus must be 1 or more, not {self.max_vcpus}")
        if len(self.subnets) > SUBNETS_LARGEST:
            raise ConfigError(f"at most {SUBNETS_LARGEST} subnets, not {len(self.subnets)}")
        if self.permissions_boundary and not _POLICY.fullmatch(self.permissions_boundary):
            raise ConfigError(
                f"a permissions boundary is the ARN of a policy, arn:aws:iam::ACCOUNT:policy/NAME, "
                f"not {self.permissions_boundary!r}"
            )
        check_tags(self.tags)


async def up(
    clients: AwsClients, options: SetupOptions, report: Report, *, interval: float = _INTERVAL
) -> Profile:
    """Create or update the stack, wait until it can be used, and write the profile.

    It may be repeated: it keeps what exists, waits for what goes on, and creates again what failed.
    If it is cancelled, CloudFormation continues, and the next call waits for it.

    Args:
        clients: Account and region to set up in.
        options: Options of the set-up.
        report: Called with each step.
        interval: Seconds between two looks at the stack.

    Raises:
        AwsError: If AWS refuses, or the stack fails. The message has the first failure's reason.
        ConfigError: If there is no network to use, or the profile belongs to another stack.
    """
    name = stack_name(options.name)
    await asyncio.to_thread(Profile.check_writable, options.name)
    earlier = _earlier_profile(options.name, report)
    if earlier is not None and earlier.is_adopted:
        raise ConfigError(
            f"the profile {options.name!r} uses the stack {earlier.stack}, which another person "
            f"deployed: `cloudexec up --adopt {earlier.stack} --name {options.name}` writes it "
            f"again; for a stack of your own, give another --name"
        )
    if earlier is not None and earlier.stack and earlier.region != clients.region:
        raise ConfigError(
            f"the profile {options.name!r} is of a stack in {earlier.region}, not in "
            f"{clients.region}: give another --name, or first `cloudexec down --name "
            f"{options.name}`"
        )
    await _say_who(clients, report)
    stack = await _settle(clients, name, report, interval)
    if stack is None:
        stack = await _create(clients, name, options, report, interval)
    else:
        stack = await _update(clients, stack, options, report, interval)
    with stepping(report, "Queues and compute environments") as step:
        step.found = await _await_valid(clients, _queues(stack), interval)
    return await _write_profile(clients, stack, options, earlier, report)


async def adopt(
    clients: AwsClients, deployed: str, options: SetupOptions, report: Report
) -> Profile:
    """Write a profile for a stack that another person has deployed from our template.

    Nothing in AWS is changed. The administrator who deployed the stack also updates and deletes
    it. This call needs permissions to describe the stack and its queues.

    Args:
        clients: Account and region of the stack.
        deployed: Name or ARN of the stack.
        options: Name of the profile, and its project; nothing else.
        report: Called with each step.

    Raises:
        AwsError: If AWS refuses, or a queue cannot be used.
        ConfigError: If there is no such stack, or it was not made from our template.
    """
    await asyncio.to_thread(Profile.check_writable, options.name)
    earlier = _earlier_profile(options.name, report)
    if earlier is not None and earlier.stack and not earlier.is_adopted:
        raise ConfigError(
            f"the profile {options.name!r} is of a stack of its own, {earlier.stack}: give another "
            f"--name, or first `cloudexec down --name {options.name}`"
        )
    await _say_who(clients, report)
    with stepping(report, f"Stack {deployed}") as step:
        stack = await find_stack(clients, deployed)
        if stack is None:
            raise ConfigError(f"there is no stack {deployed} in {clients.region}")
        if stack.status not in STANDING:
            raise AwsError(
                f"the stack {stack.name} is in {stack.status} and cannot be used: its "
                f"administrator must finish or repair it",
                code=stack.status,
            )
        if stack.name == stack_name(options.name):
            raise ConfigError(
                f"the stack {stack.name} has the name of this profile's own stack, which "
                f"`cloudexec down` would delete: give another --name"
            )
        version = stack.outputs.get("Version", "")
        missing = [key for key in _NEEDED_OUTPUTS if not stack.outputs.get(key)]
        if missing:
            raise ConfigError(
                f"the stack {stack.name} was not deployed from `cloudexec template`: it has no "
                f"output {', '.join(missing)}"
            )
        step.found = f"{stack.status}, template version {version}"
    if version != TEMPLATE_VERSION:
        text = (
            f"the stack has template version {version}, this cloudexec {TEMPLATE_VERSION}: its "
            f"administrator can bring it up to date with `cloudexec template`"
        )
        report(Noted(text=text))
    with stepping(report, "Queues and compute environments") as step:
        step.found = await _await_valid(clients, _queues(stack), 0.0, is_ours=False)
    return await _write_profile(clients, stack, options, earlier, report)


async def _say_who(clients: AwsClients, report: Report) -> None:
    with stepping(report, "Credentials") as step:
        identity = await clients.call("sts", "get_caller_identity")
        step.found = f"account {identity['Account']}, {clients.region}, as {identity['Arn']}"


def _queues(stack: Stack) -> list[str]:
    return [stack.outputs[key] for key in _QUEUES.values() if key in stack.outputs]


async def _write_profile(
    clients: AwsClients,
    stack: Stack,
    options: SetupOptions,
    earlier: Profile | None,
    report: Report,
) -> Profile:
    with stepping(report, f"Profile {options.name}") as step:
        profile = _profile(clients.region, stack, options, earlier)
        why = ""
        if not profile.relay and not lacks_for_relay(profile):
            try:
                await advertised_address(profile, endpoint=clients.endpoint)
            except ConfigError as exc:
                why = str(exc).partition(". ")[0]
                profile = replace(profile, relay=AUTO)
        step.found = str(profile.save())
    if why:
        price = relay_price(PriceTable.load(clients.region), "x86_64", clients.region)
        text = (
            f"{why}. Executors start a relay for them here, for about ${price.per_hour:.2f} an "
            f"hour while they run; with Batch(relay=False) they start none"
        )
        report(Noted(text=text))
    return profile


def _earlier_profile(name: str, report: Report) -> Profile | None:
    if not Profile.path(name).exists():
        return None
    try:
        return Profile.load(name)
    except ConfigError as exc:
        report(Noted(text=f"{exc}; it is written again"))
        return None


async def _settle(clients: AwsClients, name: str, report: Report, interval: float) -> Stack | None:
    """Wait for the stack's operations. Delete it if its creation failed; else return it."""
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
                f"the stack {name} is in {stack.status}, which cloudexec cannot handle: finish or "
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
    network = await _network(clients, options, report)
    body = template()
    defaults = {k: str(v["Default"]) for k, v in body["Parameters"].items() if "Default" in v}
    given = {**defaults, **_parameters(options), **network}
    with stepping(report, f"Creating the stack {name}") as step:
        created = await clients.call(
            "cloudformation",
            "create_stack",
            StackName=name,
            TemplateBody=json.dumps(body),
            Parameters=_pairs(given),
            Capabilities=["CAPABILITY_IAM"],
            Tags=[
                {"Key": key, "Value": value}
                for key, value in {**options.tags, TAG_STACK: name}.items()
            ],
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
    if not options.tags.items() <= stack.tags.items():
        # CloudFormation may replace a job queue to change its tags. The new queue would need the
        # name of the old one, so the update would fail.
        raise ConfigError(
            f"the stack {stack.name} was made with other tags, which cannot change: leave --tag "
            f"out, or delete the stack with `cloudexec down` first"
        )
    given = _parameters(options)
    if given.get("Fargate") == "false" and (cluster := stack.outputs.get("Cluster")):
        await _check_unused(clients, cluster)
    if given.get(template_ec2.PARAMETER) == "false" and stack.outputs.get("WorkerProfile"):
        await check_no_instances(clients, stack.name)
    if options.vpc or options.subnets or options.public_ip is not None:
        given |= await _network(clients, options, report, stack)
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


async def _check_unused(clients: AwsClients, cluster: str) -> None:
    """Refuse to remove a cluster in which workers run, including those of other people."""
    try:
        answer = await clients.call("ecs", "list_tasks", cluster=cluster)
    except AwsError as exc:
        if exc.code != "ClusterNotFoundException":
            raise
        return
    if tasks := answer["taskArns"]:
        name = cluster.rpartition("/")[2]
        more = " or more" if answer.get("nextToken") else ""
        raise ConfigError(
            f"the cluster {name} has {counted(len(tasks), 'task')}{more} that have not ended, and "
            f"cannot be removed: leave fargate in the list of launchers, or end the workers "
            f"(`cloudexec ps` shows them, `cloudexec stop` ends them)"
        )


def _parameters(options: SetupOptions) -> dict[str, str]:
    given: dict[str, str | None] = {
        "MaxVcpus": _text(options.max_vcpus),
        "LogRetentionDays": _text(options.log_retention_days),
        "BucketExpireDays": _text(options.bucket_expire_days),
        "PermissionsBoundary": options.permissions_boundary,
        "Ec2": None if options.ec2 is None else ("true" if options.ec2 else "false"),
    }
    if options.launchers is not None:
        for name, parameter in _PARAMETERS.items():
            given[parameter] = "true" if name in options.launchers else "false"
    return {key: value for key, value in given.items() if value is not None}


def _pairs(parameters: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]


def _text(number: int | None) -> str | None:
    return None if number is None else str(number)


async def _network(
    clients: AwsClients, options: SetupOptions, report: Report, stack: Stack | None = None
) -> dict[str, str]:
    """Return the template's network parameters, from the options or by choosing subnets."""
    subnets: Sequence[str] = options.subnets
    if stack is not None and not (options.vpc or options.subnets):
        # The subnets stay. Only the public addresses of workers change.
        subnets = stack.parameters.get("SubnetIds", "").split(",")
    with stepping(report, "Network") as step:
        network = await choose_network(
            clients, vpc=options.vpc, subnets=subnets, public_ip=options.public_ip
        )
        address = "with" if network.public_ip else "without"
        number = counted(len(network.subnets), "subnet")
        names = ", ".join(map(str, network.subnets))
        step.found = f"{network.vpc} with {number}: {names}; workers {address} public addresses"
    for text in network.left_out:
        report(Noted(text=f"not used: {text}"))
    maps = all(each.maps_public for each in network.subnets if each.reach == "public")
    if options.ec2 and not maps:
        text = (
            "instances get no public address in some of these public subnets, and so no way out: "
            "`aws ec2 modify-subnet-attribute --map-public-ip-on-launch --subnet-id ID` gives "
            "them one"
        )
        report(Noted(text=text))
    elsewhere = await vpcs_of_this_machine()
    if elsewhere and network.vpc not in elsewhere:
        text = (
            f"this instance is in {', '.join(elsewhere)}, the workers will be in {network.vpc}: "
            f"they reach it only at its public address, or if the two VPCs are peered; --vpc "
            f"{elsewhere[0]} puts them into the same VPC"
        )
        report(Noted(text=text))
    return {
        "VpcId": network.vpc,
        "SubnetIds": ",".join(each.id for each in network.subnets),
        "AssignPublicIp": "ENABLED" if network.public_ip else "DISABLED",
    }


async def _await_valid(
    clients: AwsClients, queues: Sequence[str], interval: float, *, is_ours: bool = True
) -> str:
    """Wait until queues and their environments are VALID, and enable those that are not.

    In a stack that is not ours, all must be VALID and ENABLED from the start.
    """
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
                why = str(each.get("statusReason") or "no reason given")
                raise AwsError(
                    f"the {kind} {name} is INVALID: {why}; once that is repaired, "
                    f"{mend_invalid('`cloudexec up`', why)}",
                    code="INVALID",
                )
            if not is_ours and (status, state) != ("VALID", "ENABLED"):
                raise AwsError(
                    f"the {kind} {name} is {status} and {state}: the stack's administrator must "
                    f"repair or enable it",
                    code=status,
                )
            is_off = status == "VALID" and state != "ENABLED"
            if (is_off or status == "INVALID") and name not in touched:
                # `down` disables queues first, and may have been interrupted after that. AWS Batch
                # checks an INVALID queue or environment again when it is updated.
                touched.add(name)
                await clients.call(
                    "batch",
                    "update_job_queue" if is_queue else "update_compute_environment",
                    **{"jobQueue" if is_queue else "computeEnvironment": name, "state": "ENABLED"},
                )
            if status != "VALID" or state != "ENABLED":
                waiting.append(f"{kind} {name} is {status} and {state}")
        if waiting and not is_ours:
            raise AwsError("; ".join(waiting), code="NotValid")
        if not waiting:
            return f"{counted(len(queues), 'queue')} VALID and ENABLED"
        if time.monotonic() - started > _VALID_WITHIN:
            raise AwsError(
                f"after {_VALID_WITHIN:.0f} s, {'; '.join(waiting)}: check this in the AWS Batch "
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
        run_role=outputs.get("RunRole", ""),
        execution_role=outputs.get("ExecutionRole", ""),
        key_secret=outputs.get("KeySecret", ""),
        log_group=outputs.get("LogGroup", ""),
        bucket=outputs.get("Bucket", ""),
        repository=repository,
        # A replaced repository has lost the images.
        images=base.images if base.repository in ("", repository) else {},
        security_group=outputs.get("SecurityGroup", ""),
        cluster=outputs.get("Cluster", ""),
        function_role=outputs.get("FunctionRole", ""),
        instance_profile=outputs.get("WorkerProfile", ""),
        instance_role=outputs.get("WorkerRole", ""),
        run_profile=outputs.get("RunProfile", ""),
        vpc=outputs.get("Vpc", ""),
        subnets=tuple(filter(None, outputs.get("Subnets", "").split(","))),
        assign_public_ip=outputs.get("AssignPublicIp", "ENABLED") == "ENABLED",
        project=options.project or base.project,
    )
