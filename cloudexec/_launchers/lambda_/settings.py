"""The settings of the launcher for AWS Lambda: what workers to run there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from cloudexec._aws.function_requests import (
    LONGEST_SESSION,
    SHORTEST_SESSION,
    VCPU_MIB,
    disk_size,
    function_memory,
    function_size,
    function_size_for,
)
from cloudexec._aws.limits import WorkerSize, format_memory
from cloudexec._config import WorkerCapacity, check_count
from cloudexec._environment.packages import Packages
from cloudexec._errors import ConfigError
from cloudexec._launchers.aws.settings import AwsLauncher, check_texts, ids_of
from cloudexec._launchers.base import Arrival
from cloudexec._launchers.platform import ExecutorInfo, Site

__all__ = ["Lambda"]

_TIMEOUT = 180.0
"""Lambda prepares a new function for up to a minute, and keeps an event for another one."""
_GIB = 1024
_PACKAGES = ("auto", "zip", "image")


class Lambda(AwsLauncher):
    """Runs workers in a function of AWS Lambda: each worker is one invocation, up to 15 minutes.

    Workers start within seconds, are billed by the millisecond, and cost nothing while there are
    none. A worker hands back what it has not finished when its session is over, and another one
    takes its place while there is work. A task that needs a whole session fails.

    What it needs in the account comes from a profile, which ``cloudexec up --with lambda`` writes,
    or from ``role``. One launcher serves one executor at a time.

    Args:
        memory: Of each worker: ``"1769MiB"``, or MiB as an integer, up to 10 GiB. It decides the
            share of processors: 1769 MiB have one vCPU. Several sizes are a ladder: a task lost to
            memory runs again on the next larger one.
        arch: ``"x86_64"`` or ``"arm64"``.
        slots_per_worker: Tasks that one worker runs at once; by default one per whole vCPU, or, of
            those that say what they need (``with_options(cpus=, memory=)``), as many as fit.
        profile: Name of a profile; by default what ``CLOUDEXEC_PROFILE`` says, or ``"default"``
            unless ``role`` is given.
        role: ARN of the role that functions have, and with them tasks, instead of the profile's.
        image: Image of the workers, instead of the profile's: in Amazon ECR, of the same region.
        packages: Packages that workers have; see ``Batch``.
        package: What functions are made of: ``"zip"``, a .zip archive of the packages; ``"image"``,
            an image; or ``"auto"``, an archive if no image is named and the packages fit.
        region: AWS region, instead of the profile's or the SDK's.
        disk: Size of ``/tmp``, the only place that tasks can write to: ``"512MiB"`` to ``"10GiB"``.
        vpc: Whether workers are in the VPC of the profile. There they reach machines of that VPC,
            but nothing else, unless it has a NAT gateway. Without it, they reach the internet, but
            no VPC. By default they are in it if the address that they dial is a private one.
        subnets: Ids of the subnets in which workers are, instead of the profile's; 16 at most.
        security_groups: Ids of the groups that workers are in, instead of the profile's.
        reserved_concurrency: Invocations that are reserved for these workers, which is also the
            most that there are at once; by default they share what the account has.
        environment: Variables that every worker has.
        tags: Put on the function, besides ours.
        modules: Whether your own modules, those that are imported and not installed, are sent to
            the workers; or the names of the top-level ones that are.
        project: Goes into a tag, for ``cloudexec ps`` and the bill.
        relay: How workers reach a machine that nothing can dial; see ``Batch``. A relay that is
            started is a job of AWS Batch in the stack, here too.
        max_runtime: Seconds of a session, 30 to 900, after which Lambda kills a worker. The worker
            hands its tasks back before that: a task that runs then has a tenth of the session more,
            and a minute at most.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    def __init__(
        self,
        *,
        memory: str | int | Sequence[str | int] = VCPU_MIB,
        arch: str = "x86_64",
        slots_per_worker: int | None = None,
        profile: str | None = None,
        role: str | None = None,
        image: str | None = None,
        packages: str | Path | Packages | None = None,
        package: str = "auto",
        region: str | None = None,
        disk: str | int = "512MiB",
        vpc: bool | None = None,
        subnets: Sequence[str] | None = None,
        security_groups: Sequence[str] | None = None,
        reserved_concurrency: int | None = None,
        environment: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        modules: bool | Sequence[str] = True,
        project: str = "",
        relay: str | bool | None = None,
        max_runtime: float = LONGEST_SESSION,
    ) -> None:
        check_texts(role=role)
        if vpc is not None and not isinstance(vpc, bool):
            raise ConfigError(f"vpc must be True, False or None, not {vpc!r}")
        if package not in _PACKAGES:
            raise ConfigError(f"package must be 'auto', 'zip' or 'image', not {package!r}")
        if package == "zip" and image is not None:
            raise ConfigError(f"package='zip' has no image, and image={image!r} names one")
        self.subnets = ids_of("subnets", subnets)
        self.security_groups = ids_of("security_groups", security_groups)
        if vpc is False and (named := self.subnets or self.security_groups):
            raise ConfigError(
                f"with vpc=False, workers are in no VPC and have no use for {', '.join(named)}: "
                f"leave out vpc, or the subnets and security groups"
            )
        if reserved_concurrency is not None:
            check_count("reserved_concurrency", reserved_concurrency, least=1)
        ladder = _ladder(memory)
        super().__init__(
            vcpus=ladder[0].vcpus,
            memory=[each.memory_mib for each in ladder],
            spot=False,
            compute="lambda",
            arch=arch,
            slots_per_worker=slots_per_worker,
            profile=profile,
            by_hand=role is not None,
            image=image,
            packages=packages,
            job_role=role,
            execution_role=None,
            region=region,
            assign_public_ip=False,
            ephemeral_gib=None,
            environment=environment,
            tags=tags,
            modules=modules,
            project=project,
            relay=relay,
            max_runtime=max_runtime,
        )
        if not SHORTEST_SESSION <= max_runtime <= LONGEST_SESSION:
            raise ConfigError(
                f"max_runtime must be {SHORTEST_SESSION} to {LONGEST_SESSION} s, not "
                f"{max_runtime!r}: AWS Lambda ends every worker after 15 minutes. Fargate(...) and "
                f"Batch(...) have workers that run for longer"
            )
        self.disk_mib = disk_size(disk)
        # Of which the price is that of what is beyond 512 MiB.
        self.ephemeral_gib = self.disk_mib / _GIB  # type: ignore[assignment]
        self.role = role
        self.package = package
        self.vpc = vpc if subnets is None else True
        self.reserved_concurrency = reserved_concurrency
        self.launch_timeout = _TIMEOUT

    def _ladder(
        self, vcpus: float, memory: str | int | Sequence[str | int] | None
    ) -> tuple[WorkerSize, ...]:
        assert memory is not None
        return _ladder(memory)

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        """Read the profile, and find the address that workers dial.

        Raises:
            ConfigError: If there is no such profile, no role in it, or no address that workers can
                reach.
            AwsError: If AWS refuses.
        """
        from cloudexec._launchers.lambda_.platform import connect

        async with connect(self, executor) as site:
            yield site

    def connected(self, launch_id: str, arrival: Arrival) -> None:
        """A worker has dialed back."""
        super().connected(launch_id, arrival)
        self._tell("came", launch_id)

    def disconnected(self, launch_id: str, *, orderly: bool, reclaimed: bool) -> None:
        """A worker's session ended, and with it its invocation."""
        super().disconnected(launch_id, orderly=orderly, reclaimed=reclaimed)
        self._tell("went", launch_id)

    def _tell(self, what: str, launch_id: str) -> None:
        """Tell the platform of a worker, which no other one tells it."""
        job = self._running.ledger.job_of(launch_id)
        if job is not None:
            getattr(self._running.site.platform, what)(job.name)

    def capacity_for(self, cpus: float, memory: int, gpus: int) -> WorkerCapacity:
        """Return the least that Lambda has for a task which fits no size of the ladder.

        Raises:
            ConfigError: If there is none.
        """
        if gpus:
            raise ConfigError(
                f"gpus={gpus} cannot be had on AWS Lambda, which has no GPUs: "
                f"Batch(compute='ec2') has them"
            )
        found = function_size_for(cpus, -(-memory // 2**20))
        return WorkerCapacity(cpus=found.vcpus, memory=found.memory_mib << 20, gpus=0)

    def more_memory(self, size: int) -> str:
        """Say which settings give a worker of a size more memory."""
        mib = self.size_of(size).memory_mib
        try:
            larger = function_size_for(0, 2 * mib).memory_mib
        except ConfigError:
            return (
                f"AWS Lambda has {format_memory(mib)} at the most, or little more: use "
                f"Fargate(...) or Batch(...)"
            )
        return (
            f"give memory= a larger size, or several to climb: memory=('{mib}MiB', '{larger}MiB')"
        )

    def of_workers(self) -> tuple[object, ...]:
        """Return settings that tell workers apart, besides what ``describe`` says."""
        return (*super().of_workers(), self.role, self.package, self.disk_mib, self.max_runtime)

    def describe(self) -> str:
        """Say in a few words what this launches."""
        return f"sessions on AWS Lambda, {' or '.join(map(str, self.sizes))}"

    def __repr__(self) -> str:
        where = f"profile={self.profile!r}" if self.role is None else f"role={self.role!r}"
        return f"Lambda({where}, {self.describe()})"


def _ladder(memory: str | int | Sequence[str | int]) -> tuple[WorkerSize, ...]:
    """Check the sizes of a ladder, one or several."""
    if isinstance(memory, (str, int)):
        several: Sequence[str | int] = (memory,)
    elif isinstance(memory, Sequence) and not isinstance(memory, (bytes, bytearray)):
        several = memory
    else:
        raise ConfigError(
            f"memory must be like '2GiB', a whole number of MiB, or a list of such, not {memory!r}"
        )
    if not several:
        raise ConfigError("memory must be a size, or several, not an empty sequence")
    sizes = tuple(function_size(function_memory(each)) for each in several)
    if any(a.memory_mib >= b.memory_mib for a, b in itertools.pairwise(sizes)):
        raise ConfigError(f"the sizes of memory= must grow, not {memory!r}")
    return sizes


Lambda.__module__ = "cloudexec"
