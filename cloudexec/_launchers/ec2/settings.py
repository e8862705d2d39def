"""The settings of the launcher for EC2 instances: what workers to run there, without AWS Batch."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cloudexec._aws.instance_prices import assumed_price
from cloudexec._aws.limits import USUAL_DISK_GIB, WorkerSize, check_instance_disk
from cloudexec._aws.prices import PriceTable
from cloudexec._config import check_count
from cloudexec._environment.packages import Packages
from cloudexec._errors import ConfigError
from cloudexec._launchers.aws.settings import DAY, AwsLauncher, check_texts, ids_of
from cloudexec._launchers.platform import ExecutorInfo, Site
from cloudexec._pricing import WorkerPrice

__all__ = ["EC2"]

_TYPE = re.compile(r"[a-z][a-z0-9-]*\.([a-z0-9-]+)")
"""Such as ``c7i.large`` and ``u7in-16tb.224xlarge``. Amazon EC2 Instance Types, "Naming
conventions"."""
_SIZES = re.compile(r"nano|micro|small|medium|large|\d*xlarge|metal(-\d+xl)?")
_ARM = re.compile(r"(a1|[a-z]+\d+g[a-z]*(-[a-z0-9]+)?)\.")
"""Types with Graviton processors have a g after the generation."""
_AMI = re.compile(r"ami-[0-9a-f]{8,17}|resolve:ssm:\S+")
_OWN_TAGS = ("Name",)
_MOST_TAGS = 41
"""A job of AWS Batch has six tags of ours, an instance three more."""
_MOST_GPUS = 16


class EC2(AwsLauncher):
    """Runs workers on EC2 instances of their own, on demand or Spot, without AWS Batch.

    Each worker has an instance, and runs as many tasks at once as the instance has vCPUs for. The
    instance runs the image of the workers with the engine of the ECS-optimised Amazon Linux 2023,
    and terminates when its worker ends. What it needs in the account comes from a profile, which
    ``cloudexec up --with ec2`` writes. One launcher serves one executor at a time.

    Args:
        vcpus: That an instance has at least: a whole number.
        memory: That an instance has at least: ``"8GiB"``, or MiB as an integer; by default 2 GiB
            per vCPU. The system takes about 7 % of it. Several sizes are a ladder: a task lost to
            memory runs again on the next larger one, ``("8GiB", "16GiB")``.
        gpus: NVIDIA GPUs of each instance.
        instance_types: Types that may be used, such as ``["c7i.large", "m7i.large"]``; by default
            all of the current generation that have what is asked for, and at most twice the vCPUs,
            or twice those that come with so much memory.
        spot: Whether instances are Spot, cheaper, which AWS takes back with a notice of two
            minutes: ``"prefer"`` goes on demand after repeated reclaims or when there is none.
        arch: ``"x86_64"`` or ``"arm64"``.
        slots_per_worker: Tasks that one worker runs at once; by default one per vCPU that is asked
            for, or, of those that say what they need (``with_options(cpus=, memory=)``), as many
            as fit.
        profile: Name of a profile; by default what ``CLOUDEXEC_PROFILE`` says, or ``"default"``.
        subnets: Ids of the subnets in which instances start, instead of the profile's.
        security_groups: Ids of the groups that instances are in, instead of the profile's.
        ami: Image of the system, which must have Docker, cloud-init and curl: ``"ami-..."`` or
            ``"resolve:ssm:..."``; by default the newest ECS-optimised Amazon Linux 2023.
        disk_gib: Disk of each instance, 30 or more.
        image: Image of the workers, instead of the profile's.
        packages: Packages that workers have, in an image that is made for it; see ``Batch``.
        region: AWS region, instead of the profile's or the SDK's.
        assign_public_ip: Whether instances get a public address, instead of what the profile says.
        environment: Variables that every worker has. They are part of the instances' user data and
            can be read there: no place for secrets.
        tags: Put on every instance, its disk and its network interface, besides ours; 41 at most.
        modules: Whether your own modules, those that are imported and not installed, are sent to
            the workers; or the names of the top-level ones that are.
        project: Goes into a tag, for ``cloudexec ps`` and the bill.
        relay: How workers reach a machine that nothing can dial; see ``Batch``. A relay that is
            started is a job of AWS Batch in the stack, here too.
        max_runtime: Seconds after which a worker ends, whatever became of this process. The
            instance turns itself off some minutes later, also if its worker never started.

    Raises:
        ConfigError: If a setting is out of its range; wrong sizes name the nearest right ones.
    """

    def __init__(
        self,
        *,
        vcpus: float = 2,
        memory: str | int | Sequence[str | int] | None = None,
        gpus: int = 0,
        instance_types: str | Sequence[str] | None = None,
        spot: bool | str = False,
        arch: str = "x86_64",
        slots_per_worker: int | None = None,
        profile: str | None = None,
        subnets: Sequence[str] | None = None,
        security_groups: Sequence[str] | None = None,
        ami: str | None = None,
        disk_gib: int = USUAL_DISK_GIB,
        image: str | None = None,
        packages: str | Path | Packages | None = None,
        region: str | None = None,
        assign_public_ip: bool | None = None,
        environment: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        modules: bool | Sequence[str] = True,
        project: str = "",
        relay: str | bool | None = None,
        max_runtime: float = DAY,
    ) -> None:
        check_texts(ami=ami)
        check_count("gpus", gpus, least=0)
        if gpus > _MOST_GPUS:
            raise ConfigError(
                f"gpus must be {_MOST_GPUS} or less, not {gpus}: no instance has more"
            )
        if gpus and arch == "arm64":
            raise ConfigError(
                f"gpus={gpus} goes with arch='x86_64': the system with drivers for GPUs is for that"
            )
        check_instance_disk(disk_gib)
        if ami is not None and not _AMI.fullmatch(ami):
            raise ConfigError(
                f"ami must be like 'ami-0123456789abcdef0' or 'resolve:ssm:NAME', not {ami!r}"
            )
        self.subnets = ids_of("subnets", subnets, least=1)
        self.security_groups = ids_of("security_groups", security_groups, least=1)
        self.instance_types = _types(instance_types, arch)
        for each in _OWN_TAGS:
            if each in (tags or {}):
                raise ConfigError(f"the tag {each!r} of instances is cloudexec's own")
        if len(tags or {}) > _MOST_TAGS:
            raise ConfigError(
                f"an instance may have {_MOST_TAGS} tags of yours, not {len(tags or {})}"
            )
        super().__init__(
            vcpus=vcpus,
            memory=memory,
            spot=spot,
            compute="ec2",
            arch=arch,
            slots_per_worker=slots_per_worker,
            profile=profile,
            by_hand=False,
            image=image,
            packages=packages,
            job_role=None,
            execution_role=None,
            region=region,
            assign_public_ip=assign_public_ip,
            ephemeral_gib=None,
            environment=environment,
            tags=tags,
            modules=modules,
            project=project,
            relay=relay,
            max_runtime=max_runtime,
        )
        self.sizes = tuple(replace(each, gpus=gpus) for each in self.sizes)
        self.gpus = gpus
        self.ami = ami
        self.disk_gib = disk_gib
        # An instance boots in less than a minute, and pulls an image of some GB in a few.
        self.launch_timeout = 300.0

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        """Read the profile and the key, and find the address that workers dial.

        Raises:
            ConfigError: If there is no such profile, nothing for instances in it, or no address
                that workers can reach.
            AwsError: If AWS refuses.
            LaunchError: If the stack's key cannot be used.
        """
        from cloudexec._launchers.ec2.platform import connect

        async with connect(self, executor) as site:
            yield site

    def of_workers(self) -> tuple[object, ...]:
        """Return settings that tell workers apart, besides what ``describe`` says."""
        return (*super().of_workers(), self.instance_types, self.ami, self.disk_gib)

    def describe(self) -> str:
        """Say in a few words what this launches."""
        sizes = " or ".join(map(str, self.sizes))
        types = f" ({', '.join(self.instance_types)})" if self.instance_types else ""
        return f"EC2{' Spot' if self.spot else ''} instances{types}, {sizes}"

    def price_of(
        self, prices: PriceTable, size: WorkerSize, *, spot: bool, public_ip: bool, region: str
    ) -> WorkerPrice:
        """Return the list price of the cheapest instance that has so much, with its disk."""
        return assumed_price(
            prices,
            size,
            arch=self.arch,
            spot=spot,
            disk_gib=self.disk_gib,
            public_ip=public_ip,
            region=region,
            instance_type=self.instance_types[0] if len(self.instance_types) == 1 else "",
        )

    def __repr__(self) -> str:
        return f"EC2(profile={self.profile!r}, {self.describe()})"


def _types(given: str | Sequence[str] | None, arch: str) -> tuple[str, ...]:
    """Check names of instance types, as far as their form tells."""
    if given is None:
        return ()
    types = (given,) if isinstance(given, str) else tuple(given)
    if not types or not all(isinstance(each, str) for each in types):
        raise ConfigError(f"instance_types must be names, such as ['c7i.large'], not {given!r}")
    known = PriceTable.built_in().instances
    for each in types:
        found = _TYPE.fullmatch(each)
        if found is None or not _SIZES.fullmatch(found[1]):
            near = difflib.get_close_matches(each, known, n=1, cutoff=0.5)
            hint = f"; do you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"an instance type is called like 'c7i.large' or 'g6.xlarge', not {each!r}{hint}"
            )
        if bool(_ARM.match(each)) != (arch == "arm64"):
            other = "x86_64" if arch == "arm64" else "arm64"
            raise ConfigError(f"the instance type {each!r} is of arch={other!r}, not of {arch!r}")
    return types


EC2.__module__ = "cloudexec"
