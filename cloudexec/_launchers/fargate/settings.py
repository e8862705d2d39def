"""The settings of the launcher for AWS Fargate without AWS Batch."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from cloudexec._aws.limits import ECS_MOST_VCPUS
from cloudexec._environment.packages import Packages
from cloudexec._launchers.aws.settings import DAY, AwsLauncher, check_texts, ids_of
from cloudexec._launchers.platform import ExecutorInfo, Site

__all__ = ["Fargate"]


class Fargate(AwsLauncher):
    """Runs workers as tasks of Amazon ECS on AWS Fargate, on demand or Spot, without AWS Batch.

    As its workers pass no queue of AWS Batch, they are expected to start sooner than those of
    ``Batch``; that is not measured on AWS. Cluster, network, roles and image come from a profile,
    which ``cloudexec up --with fargate`` writes, or from ``cluster``, ``subnets``,
    ``security_groups``, ``execution_role``, ``job_role`` and ``image``.
    One launcher serves one executor at a time.

    Args:
        vcpus: vCPUs of each worker: 0.25, 0.5, 1, 2, 4, 8 or 16.
        memory: Memory of each worker: ``"2GiB"``, or MiB as an integer. The default is the smallest
            valid size with at least 2 GiB per vCPU. Several sizes, such as
            ``("4GiB", "8GiB", "16GiB")``, are a ladder: a task that runs out of memory runs again
            on the next larger size.
        spot: Whether workers run on Fargate Spot, which is cheaper and which AWS reclaims with a
            notice of two minutes. With ``"prefer"``, they run on demand if there is no capacity,
            or after repeated reclaims.
        arch: ``"x86_64"`` or ``"arm64"``.
        slots_per_worker: Tasks that one worker runs at once. The default is one per whole vCPU;
            tasks with ``with_options(cpus=, memory=)`` run together as far as they fit.
        profile: Name of a profile. If neither this nor ``cluster`` is given, it is the value of
            ``CLOUDEXEC_PROFILE``, or else ``"default"``.
        cluster: Name or ARN of a cluster of Amazon ECS, instead of the profile's. For Spot, it
            must be associated with the capacity provider FARGATE_SPOT.
        subnets: Up to 16 ids of the subnets in which workers run, instead of the profile's.
        security_groups: Up to 5 ids of the workers' security groups, instead of the profile's.
        image: Image of the workers, instead of the profile's.
        packages: Packages of the workers, from which an image is made; see ``Batch``.
        job_role: ARN of the role that tasks have, instead of the profile's.
        execution_role: ARN of the role that pulls the image, instead of the profile's.
        region: AWS region, instead of the profile's or the SDK's.
        assign_public_ip: Whether workers get a public address, instead of the profile's setting.
        ephemeral_gib: Disk of each worker in GiB, 21 to 200; the default is 20.
        environment: Environment variables of every worker. They must have no secrets, as everyone
            who may describe tasks can read them.
        tags: Up to 44 tags of every task, besides those of cloudexec.
        modules: Whether your own modules, which are imported but not installed, are sent to the
            workers; or the top-level names of the modules that are sent.
        project: Value of a tag, by which ``cloudexec ps`` and the bill can be filtered.
        relay: How workers reach a machine that accepts no connections; see ``Batch``. A relay that
            the launcher starts is a job of AWS Batch in the stack, here too.
        max_runtime: Seconds after which a worker ends, even if this process was killed. As Amazon
            ECS has no time limit for tasks, the worker itself keeps the limit. This needs an image
            with this version of cloudexec, and a task that starts the worker. ``cloudexec doctor``
            and ``cloudexec ps`` name tasks that have exceeded their limit.

    Raises:
        ConfigError: If a setting is out of its range; for a wrong size, the message names the
            nearest valid ones.
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
        self.subnets = ids_of("subnets", subnets)
        self.security_groups = ids_of("security_groups", security_groups)
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
        """Return the settings that make workers differ and that ``describe`` does not name."""
        return (*super().of_workers(), self.cluster)

    def describe(self) -> str:
        """Describe in a few words the workers that this launcher starts."""
        sizes = " or ".join(map(str, self.sizes))
        return f"tasks on Fargate{' Spot' if self.spot else ''}, {sizes}"

    def __repr__(self) -> str:
        where = f"profile={self.profile!r}" if self.cluster is None else f"cluster={self.cluster!r}"
        return f"Fargate({where}, {self.describe()})"


Fargate.__module__ = "cloudexec"
