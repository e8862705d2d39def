"""Finds what is left of a stack after teardown, by the stack's tag."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.functions import functions_of_stack
from cloudexec._aws.names import TAG_REGION, TAG_STACK
from cloudexec._aws.stack import find_stack
from cloudexec._aws.steps import Noted, Report
from cloudexec._aws.task_definitions import task_definitions
from cloudexec._errors import AwsError

__all__ = ["Remnant", "find_remnants", "tagged_secrets"]

_TYPES_SEEN_DIRECTLY = (
    "batch",
    "cloudformation",
    "ecr",
    "ecs",
    "iam",
    "lambda",
    "logs",
    "s3",
    "secretsmanager",
)

_DESCRIBED = {
    "launch-template": "describe_launch_templates",
    "network-interface": "describe_network_interfaces",
    "snapshot": "describe_snapshots",
    "subnet": "describe_subnets",
    "volume": "describe_volumes",
    "vpc": "describe_vpcs",
}
"""Types of EC2 resources, each with the call that describes one by its id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remnant:
    """A resource of the stack that still exists after teardown."""

    kind: str
    id: str
    """Name, id or ARN of the resource; or why it is not known whether there is one."""


async def find_remnants(
    clients: AwsClients, stack: str, report: Report, *, doubtful: Collection[str] = ()
) -> tuple[Remnant, ...]:
    """Ask each service for resources with the stack's tag, and then the tagging service.

    If a service cannot be asked, a remnant says so, because its resources may still exist. The
    tagging service may fail, because it only finds resources that no stack of ours has.

    Args:
        clients: Account and region of the stack.
        stack: Name of the stack.
        report: Called with the services that could not be asked.
        doubtful: Kinds of which the stack had no resource, as far as is known. A missing permission
            to look for them is reported, and is not a remnant.

    Raises:
        AwsError: If AWS cannot be reached, or fresh credentials are needed.
    """
    finders: dict[str, Callable[[AwsClients, str], AsyncIterator[str]]] = {
        "stack": _left_stack,
        "job queue": _left_queues,
        "compute environment": _left_environments,
        "job definition": _left_definitions,
        "cluster": _left_cluster,
        "task definition": _left_task_definitions,
        "function": functions_of_stack,
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
            if find is _left_elsewhere:
                report(Noted(text=f"the tagging service could not be asked: {exc}"))
            elif kind in doubtful and "Denied" in exc.code:
                report(Noted(text=f"{kind}: could not be looked for: {exc}"))
            else:
                remnants.append(Remnant(kind=kind, id=f"could not be looked for: {exc}"))
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
    async for each in clients.pages(
        "batch", "describe_job_definitions", "jobDefinitions", status="ACTIVE"
    ):
        if each.get("tags", {}).get(TAG_STACK) == stack and each.get("status") != "INACTIVE":
            yield each["jobDefinitionArn"]


async def _left_cluster(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    answer = await clients.call("ecs", "describe_clusters", clusters=[stack], include=["TAGS"])
    for each in answer["clusters"]:
        tags = {tag["key"]: tag["value"] for tag in each.get("tags", ())}
        # AWS describes a deleted cluster for some time.
        if each.get("status") != "INACTIVE" and tags.get(TAG_STACK) == stack:
            yield each["clusterName"]


async def _left_task_definitions(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    async for each in task_definitions(clients, stack):
        yield each.arn


async def _left_buckets(clients: AwsClients, stack: str) -> AsyncIterator[str]:
    answer = await clients.call("s3", "list_buckets")
    for each in answer.get("Buckets", ()):
        if each["Name"].startswith(_beginning(stack)):
            try:
                tagging = await clients.call("s3", "get_bucket_tagging", Bucket=each["Name"])
            except AwsError as exc:
                if exc.code in ("NoSuchBucket", "NoSuchTagSet"):
                    continue
                raise
            if _is_of_here(tagging.get("TagSet", ()), stack, clients.region):
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


async def tagged_secrets(
    clients: AwsClients, stack: str, *, planned: bool = False
) -> AsyncIterator[Any]:
    """Yield AWS's descriptions of the stack's secrets.

    Args:
        clients: Calls to AWS.
        stack: Value of the tag.
        planned: Whether secrets that are scheduled for deletion are included.
    """
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
    async for each in tagged_secrets(clients, stack):
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
            if _is_of_here(tags.get("Tags", ()), stack, clients.region):
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
        # The tagging service is updated late, so types that a finder has looked for are skipped.
        # AWS lists ended jobs and deregistered definitions for some time: they are no remnants.
        is_known = service == "ec2" and resource.startswith(("security-group", "instance"))
        if service in _TYPES_SEEN_DIRECTLY or is_known:
            continue
        is_there = await _is_there(clients, arn, service, resource)
        if is_there is None:
            yield f"{arn} (from the tagging service, which lists deleted resources for hours)"
        elif is_there:
            yield arn


async def _is_there(clients: AwsClients, arn: str, service: str, resource: str) -> bool | None:
    """Return whether a resource of the tagging service exists; ``None`` if nobody can tell."""
    kind, _, name = resource.partition("/")
    try:
        if service != "ec2" or kind not in _DESCRIBED:
            return None
        plural = "".join(part.capitalize() for part in kind.split("-"))
        wanted: dict[str, Any] = {f"{plural}Ids": [name]}
        answer = await clients.call("ec2", _DESCRIBED[kind], **wanted)
    except AwsError as exc:
        if exc.transient or exc.expired:
            raise
        return False if "NotFound" in exc.code else None
    return bool(answer.get(f"{plural}s"))


def _beginning(stack: str) -> str:
    """Return the beginning of the names that CloudFormation gives to the stack's resources.

    It shortens the stack's name if the whole would be too long, for roles 64 characters.
    """
    return stack[:20]


def _is_of_here(tags: Iterable[Mapping[str, str]], stack: str, region: str) -> bool:
    """Return whether a global resource is of this stack, and not of its namesake elsewhere."""
    found = {each.get("Key"): each.get("Value") for each in tags}
    return found.get(TAG_STACK) == stack and found.get(TAG_REGION, region) == region


def _has_tag(tags: Iterable[Mapping[str, str]], stack: str) -> bool:
    return any(each.get("Key") == TAG_STACK and each.get("Value") == stack for each in tags)
