"""Looks at what instances without AWS Batch need, and at those that run too long."""

from __future__ import annotations

from datetime import UTC, datetime

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.job_details import time_of_text
from cloudexec._aws.machines import ALIVE, find_instances, tags_of
from cloudexec._aws.names import TAG_EXPIRES, TAG_JOB
from cloudexec._aws.profile import Profile
from cloudexec._aws.steps import counted

__all__ = ["look_at_instances"]


async def look_at_instances(clients: AwsClients, profile: Profile) -> tuple[str, str]:
    """Say what was found, and what to do about it; nothing is to be done if that is empty.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    now = datetime.now(UTC)
    running, overdue = 0, list[str]()
    async for each in find_instances(clients, {TAG_JOB: ["*"]}, states=ALIVE):
        running += 1
        expires = time_of_text(tags_of(each).get(TAG_EXPIRES))
        if expires is not None and expires < now:
            overdue.append(str(each["InstanceId"]))
    if overdue:
        return (
            f"{counted(len(overdue), 'instance')} past the time limit: "
            f"{', '.join(sorted(overdue)[:3])}",
            "`cloudexec stop --expired` ends them. Their own timers have not: their scripts may "
            "not have started",
        )
    role = profile.instance_profile.rpartition("/")[2]
    some = counted(running, "instance") if running else "no instance"
    return f"instances have the profile {role}; {some} of cloudexec's now", ""
