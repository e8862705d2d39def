"""Names that cloudexec gives in AWS: tags, stacks, jobs, definitions, objects."""

from __future__ import annotations

import getpass
import re

__all__ = [
    "DEFINITION_PREFIX",
    "JOB_PREFIX",
    "OBJECTS_PREFIX",
    "ORDERED_ENDS",
    "RELAY_NAME",
    "RELAY_PORT",
    "RELAY_QUEUE",
    "RUNS_PREFIX",
    "RUN_EXECUTOR",
    "TAG_ATTEMPT",
    "TAG_DISK",
    "TAG_EXECUTOR",
    "TAG_EXPIRES",
    "TAG_JOB",
    "TAG_PROJECT",
    "TAG_REGION",
    "TAG_RUN",
    "TAG_STACK",
    "TAG_USER",
    "definition_name",
    "is_setup_name",
    "job_name",
    "log_group_of",
    "object_prefix",
    "partition_of",
    "region_of",
    "stack_name",
    "user_name",
]

TAG_EXECUTOR = "cloudexec:executor"
TAG_USER = "cloudexec:user"
TAG_PROJECT = "cloudexec:project"
TAG_EXPIRES = "cloudexec:expires"
"""The time at which the job's time limit ends it, in UTC, ISO 8601."""
TAG_JOB = "cloudexec:job"
"""Name of the job that an EC2 instance belongs to, where there is no AWS Batch."""
TAG_ATTEMPT = "cloudexec:attempt"
TAG_DISK = "cloudexec:disk-gib"
"""Number of the attempt, on the EC2 instance of a run."""
TAG_RUN = "cloudexec:run"
"""The run's name, on jobs of executors in a program that ``cloudexec run`` has started."""
TAG_STACK = "cloudexec:stack"
"""The stack's name, on everything that ``cloudexec up`` creates."""
TAG_REGION = "cloudexec:region"
"""The stack's region, on global resources. Another region may have a stack of the same name."""

ORDERED_ENDS = (
    "cloudexec: the executor does not need it any more",
    "cloudexec: the executor has shut down",
    "cloudexec: it is not needed any more",
    "cloudexec: the run ",
    "stopped through cloudexec",
    "stopped by ",
)
"""Beginnings of the reasons with which the executor or a person terminates workers. AWS Batch calls
such a job FAILED, whatever its exit code."""
JOB_PREFIX = "cloudexec-"
DEFINITION_PREFIX = "cloudexec-"
OBJECTS_PREFIX = "cloudexec/"
"""Prefix of the executors' objects in the bucket. The role of tasks has no access to them."""
RUNS_PREFIX = f"{OBJECTS_PREFIX}runs/"
"""Prefix of the files that ``cloudexec run`` exchanges. The run's name follows."""
RUN_EXECUTOR = "run-"
"""Prefix of ``TAG_EXECUTOR`` on a run's own job. The run's name follows."""
RELAY_NAME = "-relay-"
"""Part of the name of a relay's job that follows the executor's id."""
RELAY_PORT = 443
"""Port of the relays in the stack's VPC. Many networks let connections out to no other port."""
RELAY_QUEUE = "fargate_relay"
"""Name of the relays' queue in profiles."""
_NAME = re.compile(r"(?=.{1,32}$)[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""The repository has the same name, and Amazon ECR allows no two hyphens in a row, and none at the
end. Amazon ECR API Reference, "CreateRepository"."""


def region_of(arn: str) -> str:
    """Return the region in an ARN. The result is empty for a name."""
    return arn.split(":")[3] if arn.startswith("arn:") and arn.count(":") >= 5 else ""


def partition_of(region: str) -> str:
    """Return the partition of a region, or ``"aws"`` if the AWS SDK does not know the region."""
    import botocore.session
    from botocore.exceptions import UnknownRegionError

    try:
        return str(botocore.session.get_session().get_partition_for_region(region))
    except UnknownRegionError:
        return "aws"


def is_setup_name(name: str) -> bool:
    """Return whether ``cloudexec up --name`` accepts this name."""
    return _NAME.fullmatch(name) is not None and name != "local"


def stack_name(name: str) -> str:
    """Return the name of a set-up's CloudFormation stack.

    Args:
        name: Name given to ``cloudexec up --name``: lower-case letters and digits, with single
            hyphens between them.

    Raises:
        ConfigError: If the name is not allowed.
    """
    if not _NAME.fullmatch(name):
        from cloudexec._errors import ConfigError

        raise ConfigError(
            f"a name is 1 to 32 lower-case letters and digits, beginning with a letter, with "
            f"single hyphens between them, not {name!r}"
        )
    return f"cloudexec-{name}"


def log_group_of(stack: str) -> str:
    """Return the name of a stack's log group; empty without a stack."""
    return f"/cloudexec/{stack}" if stack else ""


def job_name(executor_id: str, launch: str) -> str:
    """Return the name of a launch's job. It is unique, so that the job can be found by it."""
    return f"{JOB_PREFIX}{executor_id}-{launch}"


def definition_name(content_hash: str) -> str:
    """Return the name of the job definition with this content hash."""
    return f"{DEFINITION_PREFIX}{content_hash[:16]}"


def object_prefix(executor_id: str) -> str:
    """Return the prefix of the keys of an executor's objects."""
    return f"{OBJECTS_PREFIX}{executor_id}/"


def user_name() -> str:
    """Return the name of the user of this process, for tags and reasons."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # in a container, the user may have no name
        return "unknown"
