"""Names that both sides of AWS must agree on: tags, stacks, jobs, definitions, variables."""

from __future__ import annotations

import getpass
import re

__all__ = [
    "DEFINITION_PREFIX",
    "JOB_PREFIX",
    "OBJECTS_PREFIX",
    "ORDERED_ENDS",
    "RELAY_PORT",
    "RELAY_QUEUE",
    "RUNS_PREFIX",
    "RUN_EXECUTOR",
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
"""When the job's time limit ends it at the latest, in UTC, ISO 8601."""
TAG_JOB = "cloudexec:job"
"""On EC2 instances that were asked for without AWS Batch: the name of what they belong to."""
TAG_RUN = "cloudexec:run"
"""On jobs of executors that a program started with ``cloudexec run`` has made: the run's name."""
TAG_STACK = "cloudexec:stack"
"""On everything that ``cloudexec up`` makes: the stack's name."""
TAG_REGION = "cloudexec:region"
"""On what of it all regions see: where the stack is, for another region may have its like."""

ORDERED_ENDS = (
    "cloudexec: the executor does not need it any more",
    "cloudexec: the executor has shut down",
    "cloudexec: it is not needed any more",
    "cloudexec: the run ",
    "stopped through cloudexec",
    "stopped by ",
)
"""What reasons begin with for which workers are terminated by the executor, once they are of no use
any more, or by a person. AWS Batch calls such a job FAILED, whatever its exit code."""
JOB_PREFIX = "cloudexec-"
DEFINITION_PREFIX = "cloudexec-"
OBJECTS_PREFIX = "cloudexec/"
"""Keys of the bucket that executors use: apart from those of tasks, which may not touch them."""
RUNS_PREFIX = f"{OBJECTS_PREFIX}runs/"
"""Keys of what ``cloudexec run`` sends and brings back, by the run's name."""
RUN_EXECUTOR = "run-"
"""What the tag ``TAG_EXECUTOR`` of a run's own job begins with, before the run's name."""
RELAY_PORT = 443
"""Of the relays that are started in the stack's VPC: many networks let out nothing else."""
RELAY_QUEUE = "fargate_relay"
"""What profiles call the queue of relays."""
_NAME = re.compile(r"(?=.{1,32}$)[a-z][a-z0-9]*(-[a-z0-9]+)*")
"""The repository is called so, too, and Amazon ECR takes no two hyphens in a row nor one at the
end. Amazon ECR API Reference, "CreateRepository"."""


def region_of(arn: str) -> str:
    """Return the region in an ARN; empty for a name."""
    return arn.split(":")[3] if arn.startswith("arn:") and arn.count(":") >= 5 else ""


def partition_of(region: str) -> str:
    """Return the partition of a region, as the AWS SDK knows it; ``"aws"`` of one it does not."""
    import botocore.session
    from botocore.exceptions import UnknownRegionError

    try:
        return str(botocore.session.get_session().get_partition_for_region(region))
    except UnknownRegionError:
        return "aws"


def is_setup_name(name: str) -> bool:
    """Whether ``cloudexec up --name`` takes it."""
    return _NAME.fullmatch(name) is not None and name != "local"


def stack_name(name: str) -> str:
    """Return the CloudFormation stack of a set-up.

    Args:
        name: As given to ``cloudexec up --name``: lower-case letters and digits, with single
            hyphens between them.

    Raises:
        ConfigError: If the name cannot be one.
    """
    if not _NAME.fullmatch(name):
        from cloudexec._errors import ConfigError

        raise ConfigError(
            f"a name is 1 to 32 lower-case letters and digits, beginning with a letter, with "
            f"single hyphens between them, not {name!r}"
        )
    return f"cloudexec-{name}"


def job_name(executor_id: str, launch: str) -> str:
    """Return the name of the job that starts with this launch: unique, so that it can be found."""
    return f"{JOB_PREFIX}{executor_id}-{launch}"


def definition_name(content_hash: str) -> str:
    """Return the name of the job definition with this content."""
    return f"{DEFINITION_PREFIX}{content_hash[:16]}"


def object_prefix(executor_id: str) -> str:
    """Return what the keys of an executor's objects begin with."""
    return f"{OBJECTS_PREFIX}{executor_id}/"


def user_name() -> str:
    """Return the name of the user here, for tags and reasons."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user may have no name
        return "unknown"
