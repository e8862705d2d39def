"""The settings of the launcher for AWS Batch: what workers to run there."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from cloudexec._config import check_count
from cloudexec._environment.packages import Packages
from cloudexec._errors import ConfigError
from cloudexec._launchers.aws.settings import DAY, AwsLauncher, check_texts, either_packages_or
from cloudexec._launchers.platform import ExecutorInfo, Site

__all__ = ["Batch"]

_SHARE = re.compile(r"[A-Za-z0-9]{1,255}")
_PRIORITY_LARGEST = 9999
"""AWS Batch API Reference, "SubmitJob"."""


class Batch(AwsLauncher):
    """Runs workers as AWS Batch jobs, on Fargate or EC2, on demand or Spot.

    What it needs in the account comes from a profile, which ``cloudexec up`` writes, or from
    ``queue``, ``execution_role``, ``job_role`` and ``image``. One launcher serves one
    executor at a time.

    Args:
        vcpus: Of each worker. Fargate: 0.25, 0.5, 1, 2, 4, 8, 16 or 32.
        memory: Of each worker: ``"2GiB"``, or MiB as an integer; by default the least there is of
            2 GiB per vCPU or more. Several sizes are a ladder: a task lost to memory runs again
            on the next larger one, ``("4GiB", "8GiB", "16GiB")``.
        spot: Whether workers run on spare capacity, cheaper, which AWS takes back at will:
            ``"prefer"`` goes on demand after repeated reclaims or when there is none, and needs a
            profile, which has a queue for each.
        compute: ``"fargate"`` or ``"ec2"``.
        arch: ``"x86_64"`` or ``"arm64"``.
        slots_per_worker: Tasks that one worker runs at once; by default one per whole vCPU, or, of
            those that say what they need (``with_options(cpus=, memory=)``), as many as fit.
        profile: Name of a profile; by default what ``CLOUDEXEC_PROFILE`` says, or ``"default"``
            unless ``queue`` is given.
        queue: Name or ARN of a job queue, instead of the profile's.
        share_identifier: Whose share of that queue the workers take, where its scheduling policy
            is fair share: letters and digits.
        scheduling_priority: Of the workers within that share, 0 to 9999.
        definition: Name or ARN of a job definition to use as it is, instead of one of ours.
        image: Image of the workers, instead of the profile's.
        packages: Packages that workers have, in an image that is made for it and kept in the
            profile's repository: ``"here"``, those that are installed here; ``"none"``; the path of
            a requirements file, a ``pyproject.toml`` or a ``uv.lock``; or ``Packages(...)``. By
            default the profile's image, or ``"here"`` where it has none.
        job_role: ARN of the role that tasks have, instead of the profile's.
        execution_role: ARN of the role that pulls the image, instead of the profile's.
        region: AWS region, instead of the profile's or the SDK's.
        assign_public_ip: Whether Fargate workers get a public address, instead of what the profile
            says; on EC2, their subnet decides.
        ephemeral_gib: Disk of each Fargate worker, 21 to 200; by default 20.
        environment: Variables that every worker has. They can be read by all who may describe
            jobs: no place for secrets.
        tags: Put on every job, besides ours; 44 at most.
        modules: Whether your own modules, those that are imported and not installed, are sent to
            the workers; or the names of the top-level ones that are.
        project: Goes into a tag, for ``cloudexec ps`` and the bill.
        relay: How workers reach a machine that nothing can dial: ``True`` starts a relay in the
            stack's VPC for each executor, ``"auto"`` does so where there is no other way;
            ``"ssh://user@host"`` is a host of yours whose OpenSSH forwards a port, ``"host:port"``
            a ``cloudexec relay`` that you run, and workers must reach either. ``False``: workers
            dial this machine. By default what ``CLOUDEXEC_RELAY`` or the profile says.
        max_runtime: Seconds after which AWS ends a worker, whatever became of this process.

    Raises:
        ConfigError: If a setting is out of its range; wrong sizes name the nearest right ones.
    """

    def __init__(
        self,
        *,
        vcpus: float = 1,
        memory: str | int | Sequence[str | int] | None = None,
        spot: bool | str = False,
        compute: str = "fargate",
        arch: str = "x86_64",
        slots_per_worker: int | None = None,
        profile: str | None = None,
        queue: str | None = None,
        share_identifier: str | None = None,
        scheduling_priority: int = 0,
        definition: str | None = None,
        image: str | None = None,
        packages: str | Path | Packages | None = None,
        job_role: str | None = None,
        execution_role: str | None = None,
        region: str | None = None,
        assign_public_ip: bool | None = None,
        ephemeral_gib: int | None = None,
        environment: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        modules: bool | Sequence[str] = True,
        project: str = "",
        relay: str | bool | None = None,
        max_runtime: float = DAY,
    ) -> None:
        if compute not in ("fargate", "ec2"):
            raise ConfigError(f"compute must be 'fargate' or 'ec2', not {compute!r}")
        check_texts(queue=queue, definition=definition)
        if share_identifier is not None and not (
            isinstance(share_identifier, str) and _SHARE.fullmatch(share_identifier)
        ):
            raise ConfigError(
                f"share_identifier must be 1 to 255 letters and digits, not {share_identifier!r}"
            )
        if spot == "prefer" and queue is not None:
            raise ConfigError(
                f"spot='prefer' needs two queues, such as those of a profile, and queue={queue!r} "
                f"is one: give profile= instead, or spot=True or False"
            )
        check_count("scheduling_priority", scheduling_priority, least=0)
        if scheduling_priority > _PRIORITY_LARGEST:
            raise ConfigError(
                f"scheduling_priority must be {_PRIORITY_LARGEST} or less, "
                f"not {scheduling_priority!r}"
            )
        if definition is not None and packages is not None:
            raise either_packages_or("definition")
        super().__init__(
            vcpus=vcpus,
            memory=memory,
            spot=spot,
            compute=compute,
            arch=arch,
            slots_per_worker=slots_per_worker,
            profile=profile,
            by_hand=queue is not None,
            image=image,
            packages=packages,
            job_role=job_role,
            execution_role=execution_role,
            region=region,
            assign_public_ip=assign_public_ip,
            ephemeral_gib=ephemeral_gib,
            environment=environment,
            tags=tags,
            modules=modules,
            project=project,
            relay=relay,
            max_runtime=max_runtime,
        )
        self.queue = queue
        self.share_identifier = share_identifier or ""
        self.scheduling_priority = scheduling_priority
        self.definition = definition

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        """Read the profile and the key, and find the address that workers dial.

        Raises:
            ConfigError: If there is no such profile, or no address that workers can reach.
            AwsError: If AWS refuses.
            LaunchError: If the stack's key cannot be used.
        """
        from cloudexec._launchers.batch.platform import connect

        async with connect(self, executor) as site:
            yield site

    def of_workers(self) -> tuple[object, ...]:
        """Return settings that tell workers apart, besides what ``describe`` says."""
        return (*super().of_workers(), self.queue, self.definition)

    def describe(self) -> str:
        """Say in a few words what this launches."""
        sizes = " or ".join(map(str, self.sizes))
        kind = "Fargate" if self.compute == "fargate" else "EC2"
        return f"AWS Batch workers on {kind}{' Spot' if self.spot else ''}, {sizes}"

    def __repr__(self) -> str:
        where = f"profile={self.profile!r}" if self.queue is None else f"queue={self.queue!r}"
        return f"Batch({where}, {self.describe()})"


Batch.__module__ = "cloudexec"
