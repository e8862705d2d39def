"""The settings of the launcher for AWS Fargate: what workers to run there, without AWS Batch."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from cloudexec._aws.limits import ECS_MOST_VCPUS
from cloudexec._environment.packages import Packages
from cloudexec._errors import ConfigError
from cloudexec._launchers.aws.settings import DAY, AwsLauncher, check_texts
from cloudexec._launchers.platform import ExecutorInfo, Site

__all__ = ["Fargate"]


class Fargate(AwsLauncher):
    """Runs workers as tasks of Amazon ECS on AWS Fargate, on demand or Spot, without AWS Batch.

    No queue of AWS Batch is between, so workers are expected to start sooner than those of
    ``Batch``; that is not measured on AWS. What it needs in the account comes from a profile,
    which ``cloudexec up --with fargate`` writes, or from ``cluster``, ``subnets``,
    ``security_groups``, ``execution_role``, ``job_role`` and ``image``.
    One launcher serves one executor at a time.

    Args:
        vcpus: Of each worker: 0.25, 0.5, 1, 2, 4, 8 or 16.
        memory: Of each worker: ``"2GiB"``, or MiB as an integer; by default the least there is of
            2 GiB per vCPU or more. Several sizes are a ladder: a task lost to memory runs again
            on the next larger one, ``("4GiB", "8GiB", "16GiB")``.
        spot: Whether workers run on Fargate Spot, cheaper, which AWS takes back with a notice of
            two minutes: ``"prefer"`` goes on demand after repeated reclaims or when there is none.
        arch: ``"x86_64"`` or ``"arm64"``.
        slots_per_worker: Tasks that one worker runs at once; by default one per whole vCPU, or, of
            those that say what they need (``with_options(cpus=, memory=)``), as many as fit.
        profile: Name of a profile; by default what ``CLOUDEXEC_PROFILE`` says, or ``"default"``
            unless ``cluster`` is given.
        cluster: Name or ARN of a cluster of Amazon ECS, instead of the profile's. For Spot, it
            must be associated with the capacity provider FARGATE_SPOT.
        subnets: Ids of the subnets in which workers run, instead of the profile's; 16 at most.
        security_groups: Ids of the groups that workers are in, instead of the profile's; 5 at most.
        image: Image of the workers, instead of the profile's.
        packages: Packages that workers have, in an image that is made for it; see ``Batch``.
        job_role: ARN of the role that tasks have, instead of the profile's.
        execution_role: ARN of the role that pulls the image, instead of the profile's.
        region: AWS region, instead of the profile's or the SDK's.
        assign_public_ip: Whether workers get a public address, instead of what the profile says.
        ephemeral_gib: Disk of each worker, 21 to 200; by default 20.
        environment: Variables that every worker has. They can be read by all who may describe
            tasks: no place for secrets.
        tags: Put on every task, besides ours; 44 at most.
        modules: Whether your own modules, those that are imported and not installed, are sent to
            the workers; or the names of the top-level ones that are.
        project: Goes into a tag, for ``cloudexec ps`` and the bill.
        relay: How workers reach a machine that nothing can dial; see ``Batch``. A relay that is
            started is a job of AWS Batch in the stack, here too.
        max_runtime: Seconds after which a worker ends, whatever became of this process. Amazon ECS
            has no time limit for tasks, so the worker keeps it itself, if the image has this
            version of cloudexec and the task gets as far as starting it. ``cloudexec doctor`` and
            ``cloudexec ps`` name tasks that are past their time.

    Raises:
        ConfigError: If a setting is out of its range; wrong sizes name the nearest right ones.
    """

    most_vcpus = ECS_MOST_VCPUS

    def __init__(
        self,
        *,
        vcpus: float = 1,
        memory: str | int | Sequence[str | int] | None = None,
        spot: bool | str = False,
        arch: str = "x86_64",
        slots_per_worker: int | None = None,
        profile: str | None = None,
        cluster: str | None = None,
        subnets: Sequence[str] | None = None,
        security_groups: Sequence[str] | None = None,
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
        check_texts(cluster=cluster)
        self.subnets = _ids("subnets", subnets)
        self.security_groups = _ids("security_groups", security_groups)
        super().__init__(
            vcpus=vcpus,
            memory=memory,
            spot=spot,
            compute="fargate",
            arch=arch,
            slots_per_worker=slots_per_worker,
            profile=profile,
            by_hand=cluster is not None,
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
        self.cluster = cluster

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        """Read the profile and the key, and find the address that workers dial.

        Raises:
            ConfigError: If there is no such profile, no cluster in it, or no address that workers
                can reach.
            AwsError: If AWS refuses.
            LaunchError: If the stack's key cannot be used.
        """
        from cloudexec._launchers.fargate.platform import connect

        async with connect(self, executor) as site:
            yield site

    def of_workers(self) -> tuple[object, ...]:
        """Return settings that tell workers apart, besides what ``describe`` says."""
        return (*super().of_workers(), self.cluster)

    def describe(self) -> str:
        """Say in a few words what this launches."""
        sizes = " or ".join(map(str, self.sizes))
        return f"tasks on Fargate{' Spot' if self.spot else ''}, {sizes}"

    def __repr__(self) -> str:
        where = f"profile={self.profile!r}" if self.cluster is None else f"cluster={self.cluster!r}"
        return f"Fargate({where}, {self.describe()})"


def _ids(name: str, given: Sequence[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    ids = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(each, str) and each.strip() for each in ids):
        raise ConfigError(f"{name} must be ids, such as ['subnet-0abc'], not {given!r}")
    return ids


Fargate.__module__ = "cloudexec"
