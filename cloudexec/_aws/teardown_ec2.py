"""Teardown of what instances without AWS Batch leave: themselves, and their launch templates."""

from __future__ import annotations

import asyncio
import time

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.machines import ALIVE, end_instances, find_instances, tags_of
from cloudexec._aws.names import DEFINITION_PREFIX, TAG_JOB, TAG_STACK
from cloudexec._aws.steps import Noted, Report, counted, stepping
from cloudexec._errors import AwsError, ConfigError

__all__ = ["active_instances", "check_no_instances", "delete_instances"]


async def active_instances(clients: AwsClients, stack: str) -> dict[str, str]:
    """Return a stack's instances that have not ended, or nothing if that is not allowed.

    Returns:
        The name of the job that each of them belongs to, by its id.

    Raises:
        AwsError: If AWS refuses otherwise.
    """
    tags = {TAG_STACK: [stack]}
    states = ("pending", "running", "shutting-down", "stopping", "stopped")
    try:
        return {
            str(each["InstanceId"]): job
            async for each in find_instances(clients, tags, states=states)
            if (job := tags_of(each).get(TAG_JOB)) is not None
        }
    except AwsError as exc:
        if "Unauthorized" not in exc.code:
            raise
        return {}


async def check_no_instances(clients: AwsClients, stack: str) -> None:
    """Refuse to remove what instances need that run, also those of other people.

    Raises:
        AwsError: If AWS refuses.
        ConfigError: If there are some.
    """
    tags = {TAG_STACK: [stack]}
    found = [each async for each in find_instances(clients, tags, states=ALIVE)]
    if found:
        raise ConfigError(
            f"the stack {stack} has {counted(len(found), 'instance')} that have not ended, and "
            f"their role cannot be removed: leave ec2 in the list of launchers, or end the workers "
            f"(`cloudexec ps` shows them, `cloudexec stop` ends them)"
        )


async def delete_instances(
    clients: AwsClients, stack: str, report: Report, interval: float, within: float
) -> None:
    """End the instances of a stack, and delete their launch templates.

    CloudFormation deletes no security group that an instance is in.

    Args:
        clients: Account and region of the stack.
        stack: Its name.
        report: Told of each step.
        interval: Seconds between two looks.
        within: Seconds for which the ends are waited for.

    Raises:
        AwsError: If AWS refuses.
    """
    active = await active_instances(clients, stack)
    if active:
        with stepping(report, "Instances") as step:
            await end_instances(clients, active)
            started = time.monotonic()
            left = active
            while left and time.monotonic() - started < within:
                await asyncio.sleep(interval)
                left = await active_instances(clients, stack)
            step.found = f"{counted(len(active), 'instance')} terminated"
        if left:
            text = f"{counted(len(left), 'instance')} still ending after {within:.0f} s: going on"
            report(Noted(text=text))
    try:
        templates = [
            str(each["LaunchTemplateName"])
            async for each in clients.pages(
                "ec2",
                "describe_launch_templates",
                "LaunchTemplates",
                Filters=[{"Name": f"tag:{TAG_STACK}", "Values": [stack]}],
            )
        ]
        ours = [each for each in templates if each.startswith(DEFINITION_PREFIX)]
        if ours:
            with stepping(report, "Launch templates") as step:
                for each in ours:
                    await clients.call("ec2", "delete_launch_template", LaunchTemplateName=each)
                step.found = f"{len(ours):,} deleted"
    except AwsError as exc:
        if "Unauthorized" not in exc.code:
            raise
        report(Noted(text=f"launch templates could not be looked for: {exc}"))
