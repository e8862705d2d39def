"""The settings of the launcher for AWS Batch."""

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

    The queues, roles and image come from a profile, which ``cloudexec up`` writes, or from
    ``queue``, ``execution_role``, ``job_role`` and ``image``. One launcher serves one executor at a
    time.

    Args:
        vcpus: vCPUs of each worker. On Fargate, 0.25, 0.5, 1, 2, 4, 8, 16 or 32.
        memory: Memory of each worker: ``"2GiB"``, or MiB as an integer. The default is the smallest
            valid size with at least 2 GiB per vCPU. Several sizes, such as
            ``("4GiB", "8GiB", "16GiB")``, are a ladder: a task that runs out of memory runs again
            on the next larger size.
        spot: Whether workers run on spare capacity, which is cheaper and which AWS may reclaim at
            any time. With ``"prefer"``, they run on demand if there is none, or after repeated
            reclaims; this needs a profile, which has a queue for Spot and one for on demand.
        compute: ``"fargate"`` or ``"ec2"``.
        arch: ``"x86_64"`` or ``"arm64"``.
        slots_per_worker: Tasks that one worker runs at once. The default is one per whole vCPU;
            tasks with ``with_options(cpus=, memory=)`` run together as far as they fit.
        profile: Name of a profile. If neither this nor ``queue`` is given, it is the value of
            ``CLOUDEXEC_PROFILE``, or else ``"default"``.
        queue: Name or ARN of a job queue, instead of the profile's.
        share_identifier: Letters and digits that name the share from which the workers run, if the
            queue has a fair-share scheduling policy.
        scheduling_priority: Priority of the workers within their share, 0 to 9999.
        definition: Name or ARN of a job definition to use unchanged, instead of one that the
            executor registers.
        image: Image of the workers, instead of the profile's.
        packages: Packages of the workers, from which an image is made and kept in the profile's
            repository: ``"here"`` for the packages that are installed here, ``"none"``, the path of
            a requirements file, a ``pyproject.toml`` or a ``uv.lock``, or ``Packages(...)``. The
            default is the profile's image, or ``"here"`` if it has none.
        job_role: ARN of the role that tasks have, instead of the profile's.
        execution_role: ARN of the role that pulls the image, instead of the profile's.
        region: AWS region, instead of the profile's or the SDK's.
        assign_public_ip: Whether Fargate workers get a public address, instead of the profile's
            setting. On EC2, the subnet decides this.
        ephemeral_gib: Disk of each Fargate worker in GiB, 21 to 200; the default is 20.
        environment: Environment variables of every worker. They must have no secrets, as everyone
            who may describe jobs can read them.
        tags: Up to 44 tags of every job, besides those of cloudexec.
        modules: Whether your own modules, which are imported but not installed, are sent to the
            workers; or the top-level names of the modules that are sent.
        project: Value of a tag, by which ``cloudexec ps`` and the bill can be filtered.
        relay: How workers reach a machine that accepts no connections. ``True`` starts a relay in
            the stack's VPC for each executor, and ``"auto"`` does so if workers cannot dial this
            machine. ``"ssh://user@host"`` names a host whose OpenSSH forwards a port, and
            ``"host:port"`` a ``cloudexec relay`` that you run; workers must be able to dial it.
            With ``False``, workers dial this machine. The default is the value of
            ``CLOUDEXEC_RELAY``, or else the profile's.
        max_runtime: Seconds after which AWS ends a worker, even if this process was killed.

    Raises:
        ConfigError: If a setting is out of its range; for a wrong size, the message names the
            nearest valid ones.
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
                f"spot='prefer' needs two queues, such as a profile has, but queue={queue!r} names "
                f"one: give profile= instead, or spot=True or False"
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
        """Return the settings that make workers differ and that ``describe`` does not name."""
        return (*super().of_workers(), self.queue, self.definition)

    def describe(self) -> str:
        """Describe in a few words the workers that this launcher starts."""
        sizes = " or ".join(map(str, self.sizes))
        kind = "Fargate" if self.compute == "fargate" else "EC2"
        return f"AWS Batch workers on {kind}{' Spot' if self.spot else ''}, {sizes}"

    def __repr__(self) -> str:
        where = f"profile={self.profile!r}" if self.queue is None else f"queue={self.queue!r}"
        return f"Batch({where}, {self.describe()})"


Batch.__module__ = "cloudexec"
