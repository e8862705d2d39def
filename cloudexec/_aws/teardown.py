"""Teardown: ends jobs, deletes what CloudFormation does not delete, and then the stack itself."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.names import (
    DEFINITION_PREFIX,
    JOB_PREFIX,
    RUN_EXECUTOR,
    TAG_STACK,
    stack_name,
)
from cloudexec._aws.profile import Profile
from cloudexec._aws.records import ACTIVE
from cloudexec._aws.remnants import Remnant, find_remnants, tagged_secrets
from cloudexec._aws.stack import Stack, event_ids, find_stack, follow
from cloudexec._aws.steps import Noted, Report, counted, stepping
from cloudexec._aws.task_definitions import (
    TaskDefinition,
    delete_task_definitions,
    task_definitions,
)
from cloudexec._aws.task_requests import DESCRIBE_TASKS
from cloudexec._aws.teardown_ec2 import active_instances, delete_instances
from cloudexec._aws.teardown_lambda import delete_functions
from cloudexec._errors import AwsError, ConfigError

__all__ = ["Stock", "down", "take_stock"]

_INTERVAL = 2.0
_JOBS_END_WITHIN = 180.0
"""Seconds for terminated jobs to end. SIGKILL follows SIGTERM after 30 s (AWS Batch User Guide,
"Job timeouts"), and AWS itself takes some time."""
_CALLS_AT_ONCE = 10
"""Calls at a time that end jobs or tasks."""
_RUN_JOB = re.compile(rf"{JOB_PREFIX}{RUN_EXECUTOR}(.+)-r[0-9a-f]+")
_DELETE_BATCH = 1000
"""Most objects in one DeleteObjects call. Amazon S3 API Reference."""
_IMAGE_BATCH = 100
"""Most images in one BatchDeleteImage call. Amazon ECR API Reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """The jobs that ``down`` would end, and the contents that it would delete for good."""

    stack: Stack | None
    jobs: int
    """Number of jobs that have not ended, where an array counts once, and of tasks and instances
    without a job."""
    runs: tuple[str, ...]
    """Names of running programs that ``cloudexec run`` has started."""
    objects: int
    """Number of objects in the bucket, as far as counted: see ``has_more_objects``."""
    has_more_objects: bool
    images: int
    """Number of images in the repository."""
    definitions: int
    """Number of active revisions of job definitions, and of revisions of task definitions. Those of
    task definitions are left out if AWS forbids to list them."""


async def take_stock(clients: AwsClients, name: str) -> Stock:
    """Count the jobs that ``down`` would end, and the contents that it would delete.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    if _adopted_profile(name) is not None:
        return Stock(
            stack=None, jobs=0, runs=(), objects=0, has_more_objects=False, images=0, definitions=0
        )
    stack = await find_stack(clients, stack_name(name))
    resources = await _resources(clients, stack)
    jobs: dict[str, str] = {}
    for queue in resources.get("AWS::Batch::JobQueue", ()):
        jobs |= await _active_jobs(clients, queue)
    jobs |= await active_instances(clients, stack_name(name))
    for cluster in resources.get("AWS::ECS::Cluster", ()):
        tasks = await _active_tasks(clients, cluster)
        # Those that ended since they were listed count as well.
        jobs |= dict.fromkeys(tasks, "")
        async for each in _described(clients, cluster, tasks):
            jobs[each["taskArn"]] = each.get("startedBy", "")
    runs = {run[1] for job in jobs.values() if (run := _RUN_JOB.fullmatch(job)) is not None}
    objects, has_more = 0, False
    for bucket in resources.get("AWS::S3::Bucket", ()):
        try:
            page = await clients.call(
                "s3", "list_object_versions", Bucket=bucket, MaxKeys=_DELETE_BATCH
            )
        except AwsError as exc:
            if exc.code != "NoSuchBucket":
                raise
            continue
        objects += len(page.get("Versions", ())) + len(page.get("DeleteMarkers", ()))
        has_more = has_more or bool(page.get("IsTruncated"))
    images = 0
    for repository in resources.get("AWS::ECR::Repository", ()):
        images += len(await _digests(clients, repository))
    roles = resources.get("AWS::IAM::Role", ())
    definitions = [each async for each in _definitions(clients, stack_name(name), roles)]
    of_tasks, _ = await _task_definitions(clients, stack_name(name), roles)
    return Stock(
        stack=stack,
        jobs=len(jobs),
        runs=tuple(sorted(runs)),
        objects=objects,
        has_more_objects=has_more,
        images=images,
        definitions=len(definitions) + len(of_tasks),
    )


async def down(
    clients: AwsClients,
    name: str,
    report: Report,
    *,
    interval: float = _INTERVAL,
    jobs_end_within: float = _JOBS_END_WITHIN,
) -> tuple[Remnant, ...]:
    """End the stack's jobs, delete its contents, the stack and the profile; find remnants.

    It may be repeated, also after an interruption. If nothing is left, it does nothing.

    Args:
        clients: Account and region of the stack.
        name: Name of the profile. The stack is ``cloudexec-NAME``.
        report: Called with each step.
        interval: Seconds between two looks.
        jobs_end_within: Seconds to wait for terminated jobs to end. AWS Batch would delete queues
            that have jobs, but its Fargate environments may then get stuck.

    Returns:
        Resources that are left; none, if all went well.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    stack_of = stack_name(name)
    if (adopted := _adopted_profile(name)) is not None:
        # Only the administrator who deployed the stack deletes it.
        adopted.delete()
        text = f"profile {name} deleted; its stack, {adopted.stack}, stays, as it is not yours"
        report(Noted(text=text))
        return ()
    with stepping(report, "Credentials") as step:
        identity = await clients.call("sts", "get_caller_identity")
        step.found = f"account {identity['Account']}, {clients.region}, as {identity['Arn']}"
    stack = await find_stack(clients, stack_of)
    resources = await _resources(clients, stack)
    queues = resources.get("AWS::Batch::JobQueue", ())
    if queues:
        with stepping(report, "Jobs") as step:
            for queue in queues:
                await _disable_queue(clients, queue)
            ended, running = await _end_jobs(clients, queues, interval, jobs_end_within)
            step.found = f"{counted(ended, 'job')} terminated" if ended else "none was active"
        if running:
            text = f"{counted(running, 'job')} still ending after {jobs_end_within:.0f} s: going on"
            report(Noted(text=text))
    for cluster in resources.get("AWS::ECS::Cluster", ()):
        with stepping(report, "Tasks") as step:
            ended, running = await _end_tasks(clients, cluster, interval, jobs_end_within)
            step.found = f"{counted(ended, 'task')} stopped" if ended else "none was active"
        if running:
            text = f"{counted(running, 'task')} still ending after {jobs_end_within:.0f} s"
            report(Noted(text=f"{text}: going on"))
    await delete_instances(clients, stack_of, report, interval, jobs_end_within)
    roles = resources.get("AWS::IAM::Role", ())
    with stepping(report, "Job definitions") as step:
        arns = [each async for each in _definitions(clients, stack_of, roles)]
        for arn in arns:
            await clients.call("batch", "deregister_job_definition", jobDefinition=arn)
        step.found = f"{len(arns):,} deregistered" if arns else "there was none"
    await delete_functions(clients, stack_of, roles, report)
    of_tasks, refusal = await _task_definitions(clients, stack_of, roles)
    if refusal:
        report(Noted(text=f"task definitions could not be looked for: {refusal}"))
    if of_tasks:
        with stepping(report, "Task definitions") as step:
            failures = await delete_task_definitions(clients, of_tasks)
            step.found = f"{len(of_tasks) - len(failures):,} deleted"
        for arn, why in failures.items():
            report(Noted(text=f"the task definition {arn} could not be deleted: {why}"))
    if stack is None:
        report(Noted(text=f"there is no stack {stack_of} in {clients.region}"))
    else:
        await _empty(clients, resources, report)
        stack = await _delete(clients, stack, resources, report, interval)
    await _purge_secrets(clients, stack_of, report)
    if stack is None:
        _delete_profile(name, stack_of, clients.region, report)
    with stepping(report, "Looking for what is left") as step:
        # If the stack has no cluster or role for it, the user may lack the permissions for Amazon
        # ECS or AWS Lambda.
        doubtful = ["function"]
        doubtful += [] if resources.get("AWS::ECS::Cluster") else ["cluster", "task definition"]
        remnants = await find_remnants(clients, stack_of, report, doubtful=doubtful)
        step.found = f"{counted(len(remnants), 'thing')}" if remnants else "nothing"
    return remnants


def _adopted_profile(name: str) -> Profile | None:
    try:
        profile = Profile.load(name)
    except ConfigError:
        return None
    return profile if profile.is_adopted else None


def _delete_profile(name: str, stack: str, region: str, report: Report) -> None:
    """Delete the profile, if it belongs to this stack."""
    try:
        profile = Profile.load(name)
    except ConfigError:
        return
    if (profile.stack, profile.region) == (stack, region):
        profile.delete()
        report(Noted(text=f"profile {name} deleted"))


async def _resources(clients: AwsClients, stack: Stack | None) -> dict[str, tuple[str, ...]]:
    """Return the physical ids of the stack's existing resources, by type."""
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


async def _active_jobs(clients: AwsClients, queue: str) -> dict[str, str]:
    """Return the names of jobs that have not ended, by id. An array is one job."""
    found: dict[str, str] = {}
    try:
        for status in ACTIVE:
            async for each in clients.pages(
                "batch", "list_jobs", "jobSummaryList", jobQueue=queue, jobStatus=status
            ):
                if each.get("status", status) == status:
                    found[each["jobId"].partition(":")[0]] = each["jobName"]
    except AwsError as exc:
        if exc.code != "ClientException":  # the queue is gone
            raise
    return found


async def _disable_queue(clients: AwsClients, queue: str) -> None:
    try:
        await clients.call("batch", "update_job_queue", jobQueue=queue, state="DISABLED")
    except AwsError as exc:
        # An interrupted deletion may have deleted the queue, or may still be deleting it.
        if exc.transient or exc.code != "ClientException":
            raise


async def _end_jobs(
    clients: AwsClients, queues: Iterable[str], interval: float, within: float
) -> tuple[int, int]:
    """Terminate jobs until none is active; return how many there were, and how many are left."""
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
            active |= (await _active_jobs(clients, queue)).keys()
        await asyncio.gather(*(terminate(job) for job in active - ended))
        ended |= active
        if not active or time.monotonic() - started > within:
            return len(ended), len(active)
        await asyncio.sleep(interval)


async def _active_tasks(clients: AwsClients, cluster: str) -> set[str]:
    """Return the ARNs of tasks that were not told to stop."""
    try:
        return {
            each async for each in clients.pages("ecs", "list_tasks", "taskArns", cluster=cluster)
        }
    except AwsError as exc:
        if exc.code != "ClusterNotFoundException":
            raise
        return set()


async def _end_tasks(
    clients: AwsClients, cluster: str, interval: float, within: float
) -> tuple[int, int]:
    """Stop tasks until none is active; return how many there were, and how many are left.

    CloudFormation cannot delete a cluster that has tasks.
    """
    gate = asyncio.Semaphore(_CALLS_AT_ONCE)

    async def stop(task: str) -> None:
        async with gate:
            await clients.call(
                "ecs",
                "stop_task",
                cluster=cluster,
                task=task,
                reason="cloudexec down: the stack is deleted",
            )

    stopped: set[str] = set()
    started = time.monotonic()
    while True:
        active = await _active_tasks(clients, cluster)
        await asyncio.gather(*(stop(task) for task in active - stopped))
        stopped |= active
        ending = active | await _ending(clients, cluster, stopped)
        if not ending or time.monotonic() - started > within:
            return len(stopped), len(ending)
        await asyncio.sleep(interval)


async def _ending(clients: AwsClients, cluster: str, tasks: Iterable[str]) -> set[str]:
    """Return the tasks that have not stopped yet."""
    return {
        each["taskArn"]
        async for each in _described(clients, cluster, tasks)
        if each["lastStatus"] != "STOPPED"
    }


async def _described(
    clients: AwsClients, cluster: str, tasks: Iterable[str]
) -> AsyncIterator[Mapping[str, Any]]:
    ordered = sorted(tasks)
    for at in range(0, len(ordered), DESCRIBE_TASKS):
        some = ordered[at : at + DESCRIBE_TASKS]
        answer = await clients.call("ecs", "describe_tasks", cluster=cluster, tasks=some)
        for each in answer["tasks"]:
            yield each


async def _definitions(clients: AwsClients, stack: str, roles: Iterable[str]) -> AsyncIterator[str]:
    """Yield the ARNs of the stack's active job definitions, found by their tag, or by our name
    together with the stack's roles."""
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


async def _task_definitions(
    clients: AwsClients, stack: str, roles: Sequence[str]
) -> tuple[list[TaskDefinition], str]:
    """Return the stack's task definitions, or why they cannot be listed.

    A user without permissions for Amazon ECS must be able to delete a stack that does not use it.
    """
    try:
        return [each async for each in task_definitions(clients, stack, roles)], ""
    except AwsError as exc:
        if "Denied" not in exc.code:
            raise
        return [], str(exc)


async def _empty(
    clients: AwsClients, resources: Mapping[str, tuple[str, ...]], report: Report
) -> None:
    """Delete the contents that CloudFormation does not delete: objects and images."""
    for bucket in resources.get("AWS::S3::Bucket", ()):
        with stepping(report, f"Bucket {bucket}") as step:
            count = await _empty_bucket(clients, bucket)
            step.found = f"{counted(count, 'object')} deleted" if count else "was empty"
    for repository in resources.get("AWS::ECR::Repository", ()):
        with stepping(report, f"Repository {repository}") as step:
            count = await _empty_repository(clients, repository)
            step.found = f"{counted(count, 'image')} deleted" if count else "was empty"


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
        if exc.code != "NoSuchBucket":
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
        if exc.code == "RepositoryNotFoundException":
            return set()
        raise


async def _empty_repository(clients: AwsClients, repository: str) -> int:
    count, before = 0, set[str]()
    # An index must go before the images that it lists, so more than one pass may be needed.
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
    """Delete the stack, with a second try if the first fails; return it if it still exists."""
    for is_last in (False, True):
        with stepping(report, f"Deleting the stack {stack.name}") as step:
            seen = await event_ids(clients, stack)
            await clients.call("cloudformation", "delete_stack", StackName=stack.id)
            done, failures = await follow(clients, stack, seen, report, interval)
            if done is None or done.status == "DELETE_COMPLETE":
                step.found = "DELETE_COMPLETE"
                return None
            step.found = done.status
        reasons = "; ".join(f"{each.resource}: {each.reason}" for each in failures)
        text = f"the stack could not be deleted: {reasons or done.reason or 'no reason given'}"
        if "depend" in text:
            # "resource sg-... has a dependent object": a machine of the user is in the group.
            text += (
                "; something still uses it: take your machines out of the stack's security group"
            )
        report(Noted(text=text if is_last else f"{text}; trying once more"))
        if not is_last:
            # Someone may have written objects or images since the first try.
            await _empty(clients, resources, report)
    return done


async def _purge_secrets(clients: AwsClients, stack: str, report: Report) -> None:
    """Delete secrets for good that are only scheduled for deletion."""
    try:
        async for each in tagged_secrets(clients, stack, planned=True):
            if each.get("DeletedDate"):
                await clients.call(
                    "secretsmanager",
                    "delete_secret",
                    SecretId=each["ARN"],
                    ForceDeleteWithoutRecovery=True,
                )
    except AwsError as exc:
        if exc.transient or exc.expired:
            raise
        # AWS deletes the secret after some days, and charges nothing until then.
        report(Noted(text=f"the key's secret may only be scheduled for deletion: {exc}"))
