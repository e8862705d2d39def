"""The settings that all launchers on AWS share, with their checks: sizes, image, account, price."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloudexec._aws.limits import (
    FARGATE_MOST_VCPUS,
    WorkerSize,
    default_memory,
    fargate_size,
    fargate_size_for,
    instance_size,
    instance_size_for,
    more_memory,
)
from cloudexec._aws.requests import check_environment, check_tags
from cloudexec._config import WorkerCapacity, check_count, check_positive
from cloudexec._environment.packages import Packages
from cloudexec._errors import ConfigError
from cloudexec._launchers.base import Cost
from cloudexec._launchers.platform_launcher import PlatformLauncher

if TYPE_CHECKING:
    from cloudexec._aws.prices import PriceTable
    from cloudexec._pricing import WorkerPrice

__all__ = ["DAY", "AwsLauncher"]

DAY = 86400.0
_LONGEST = 14 * DAY
"""Fargate may end jobs that run longer. AWS Batch User Guide, "Job timeouts"."""
_RELAY_GRACE = 120.0
"""Seconds in which another relay starts, and for which workers dial a client by default
(``orphan_timeout``)."""
_FARGATE_TIMEOUT = 300.0
_EC2_TIMEOUT = 900.0
"""Longer, as a first instance takes minutes. AWS Batch User Guide, "AWS Batch on Fargate"."""


class AwsLauncher(PlatformLauncher):
    """The settings that launchers on AWS share. Each launcher describes them for its users.

    Args:
        vcpus: vCPUs of each worker.
        memory: Memory of each worker, or several sizes.
        spot: Whether workers run on spare capacity.
        compute: ``"fargate"`` or ``"ec2"``.
        arch: ``"x86_64"`` or ``"arm64"``.
        slots_per_worker: Tasks that one worker runs at once.
        profile: Name of a profile.
        by_hand: Whether the user has given a queue or cluster, so that no profile is needed.
        image: Image of the workers.
        packages: Packages from which an image is made.
        job_role: ARN of the role that tasks have.
        execution_role: ARN of the role that pulls the image.
        region: AWS region.
        assign_public_ip: Whether workers get a public address.
        ephemeral_gib: Disk of each Fargate worker.
        environment: Environment variables of every worker.
        tags: Tags of every job.
        modules: Whether the user's modules are sent to workers, or the names of those that are.
        project: Value of a tag.
        relay: How workers reach a machine that accepts no connections.
        max_runtime: Seconds after which a worker is ended.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    most_vcpus = FARGATE_MOST_VCPUS
    """vCPUs of the largest worker on Fargate that the service accepts (AWS Batch or Amazon ECS)."""

    def __init__(
        self,
        *,
        vcpus: float,
        memory: str | int | Sequence[str | int] | None,
        spot: bool | str,
        compute: str,
        arch: str,
        slots_per_worker: int | None,
        profile: str | None,
        by_hand: bool,
        image: str | None,
        packages: str | Path | Packages | None,
        job_role: str | None,
        execution_role: str | None,
        region: str | None,
        assign_public_ip: bool | None,
        ephemeral_gib: int | None,
        environment: Mapping[str, str] | None,
        tags: Mapping[str, str] | None,
        modules: bool | Sequence[str],
        project: str,
        relay: str | bool | None,
        max_runtime: float,
    ) -> None:
        if arch not in ("x86_64", "arm64"):
            raise ConfigError(f"arch must be 'x86_64' or 'arm64', not {arch!r}")
        if not isinstance(spot, bool) and not (isinstance(spot, str) and spot == "prefer"):
            raise ConfigError(f"spot must be True, False or 'prefer', not {spot!r}")
        check_texts(
            profile=profile,
            image=image,
            job_role=job_role,
            execution_role=execution_role,
            region=region,
            relay=None if isinstance(relay, bool) else relay,
        )
        if not isinstance(project, str):
            raise ConfigError(f"project must be a string, not {project!r}")
        if assign_public_ip is not None and not isinstance(assign_public_ip, bool):
            raise ConfigError(f"assign_public_ip must be True or False, not {assign_public_ip!r}")
        several = (modules,) if isinstance(modules, str) else modules
        if not isinstance(several, bool) and not (
            isinstance(several, (list, tuple, set, frozenset))
            and all(isinstance(name, str) for name in several)
        ):
            raise ConfigError(f"modules must be True, False or names of modules, not {modules!r}")
        if packages is not None and not isinstance(packages, Packages):
            packages = Packages(source=packages)
        if packages is not None and image is not None:
            raise either_packages_or("image")
        if slots_per_worker is not None:
            check_count("slots_per_worker", slots_per_worker, least=1)
        check_positive("vcpus", vcpus)
        check_positive("max_runtime", max_runtime)
        if max_runtime > _LONGEST:
            raise ConfigError(f"max_runtime must be {_LONGEST:.0f} s or less, not {max_runtime!r}")
        if ephemeral_gib is not None:
            check_count("ephemeral_gib", ephemeral_gib, least=21)
            if ephemeral_gib > 200:
                raise ConfigError(f"ephemeral_gib must be 200 or less, not {ephemeral_gib!r}")
            if compute == "ec2":
                raise ConfigError(
                    f"ephemeral_gib={ephemeral_gib} is for Fargate: on EC2, the launch template of "
                    f"the compute environment says how much disk an instance has"
                )
        for name, given in (("environment", environment), ("tags", tags)):
            if given is None:
                continue
            if not isinstance(given, Mapping) or not all(
                isinstance(part, str) for pair in given.items() for part in pair
            ):
                raise ConfigError(f"{name} must map strings to strings, not {given!r}")
        check_environment(environment or {})
        if "CLOUDEXEC_KEY" in (environment or {}):
            # Amazon ECS starts no container that has a secret and a variable of the same name.
            raise ConfigError(
                "environment must not have CLOUDEXEC_KEY, which is cloudexec's own variable"
            )
        check_tags(tags or {})
        self.compute = compute
        self.sizes = self._ladder(vcpus, memory)
        self.launch_timeout = _FARGATE_TIMEOUT if compute == "fargate" else _EC2_TIMEOUT
        self.spot = spot
        self.arch = arch
        if profile is None and not by_hand:
            named = os.environ.get("CLOUDEXEC_PROFILE", "")
            profile = named if named not in ("", "local") else "default"
        self.profile = profile
        self.image = image
        self.packages = packages
        self.job_role = job_role
        self.execution_role = execution_role
        self.region = region
        self.assign_public_ip = assign_public_ip
        self.ephemeral_gib = ephemeral_gib
        self.environment = dict(environment or {})
        self.tags = dict(tags or {})
        self.project = project
        self.relay = _relay(relay)
        self.modules = several if isinstance(several, bool) else tuple(several)
        self.max_runtime = max_runtime
        self.slots = slots_per_worker or max(1, int(vcpus))
        self._most_slots = slots_per_worker

    def _ladder(
        self, vcpus: float, memory: str | int | Sequence[str | int] | None
    ) -> tuple[WorkerSize, ...]:
        """Check the sizes of workers, one or several, and return them."""
        return _sizes(vcpus, memory, self.compute, self.most_vcpus)

    @property
    def may_start_relay(self) -> bool:
        """Whether the settings or the profile allow the launcher to start a relay."""
        relay = self.relay
        if relay is None and self.profile is not None:
            from cloudexec._aws.profile import Profile

            with contextlib.suppress(ConfigError):  # ``connect`` raises it, too
                relay = Profile.load(self.profile).relay
        return relay in (True, "auto")

    @property
    def reconnect_grace(self) -> float:  # type: ignore[override]
        """Seconds in which a worker may reconnect; more if another relay may have to start."""
        return _RELAY_GRACE if self.may_start_relay else PlatformLauncher.reconnect_grace

    def capacities(self) -> Sequence[WorkerCapacity]:
        """Return the resources of a worker of each size of the ladder."""
        return [_capacity(size) for size in self.sizes]

    def size_of(self, size: int) -> WorkerSize:
        """Return the vCPUs, memory and GPUs of a size, of the ladder or made for a task."""
        found = self._catalogue[size]
        return WorkerSize(memory_mib=found.memory >> 20, vcpus=found.cpus, gpus=found.gpus)

    def most_slots(self, size: int) -> int:
        """Return how many tasks a worker may run at once: ``slots_per_worker``, if it is given."""
        return self._most_slots or super().most_slots(size)

    def capacity_for(self, cpus: float, memory: int, gpus: int) -> WorkerCapacity:
        """Return the smallest size on AWS for a task that fits no size of the ladder.

        Raises:
            ConfigError: If no worker can be that large; the message names the nearest size.
        """
        if gpus and self.compute == "fargate":
            raise ConfigError(
                f"gpus={gpus} cannot be had on Fargate, which has no GPUs: "
                f"Batch(compute='ec2') has them"
            )
        mib = -(-memory // 2**20)
        if self.compute == "fargate":
            return _capacity(fargate_size_for(cpus, mib, self.most_vcpus))
        return _capacity(instance_size_for(cpus, mib, gpus))

    def size_name(self, size: int) -> str:
        """Describe the resources of a worker of a size in a few words."""
        return str(self.size_of(size))

    def more_memory(self, size: int) -> str:
        """Return the settings that give a worker of a size more memory."""
        return more_memory(self.size_of(size), self.compute, self.most_vcpus)

    def fingerprint(self) -> str:
        """Return a text that differs if workers would differ."""
        return repr((self.describe(), *self.of_workers()))

    def of_workers(self) -> tuple[object, ...]:
        """Return the settings that make workers differ and that ``describe`` does not name."""
        return (
            self.arch,
            self.profile,
            self.image,
            self.packages,
            self.region,
            sorted(self.environment.items()),
        )

    def estimate(self, workers: int, seconds: float) -> Cost:
        """Estimate the cost of workers before any is launched.

        Args:
            workers: Number of workers, of the first size.
            seconds: Seconds that each worker runs, from the start of its image's download; AWS
                charges at least a minute.

        Returns:
            The cost of all workers as ``accrued_usd``, and their cost per hour.

        Raises:
            ConfigError: If there is no such profile.
        """
        from cloudexec._aws.prices import PriceTable
        from cloudexec._aws.profile import Profile

        check_count("workers", workers, least=0)
        check_positive("seconds", seconds, zero=True)
        profile = Profile.load(self.profile) if self.profile is not None else None
        region = self.region or (profile.region if profile is not None else "")
        prices = PriceTable.load(region) if region else PriceTable.built_in()
        public_ip = self.assign_public_ip
        if public_ip is None:
            public_ip = profile is None or profile.assign_public_ip
        spot = bool(self.spot)
        price = self.price_of(prices, self.sizes[0], spot=spot, public_ip=public_ip, region=region)
        return Cost(
            accrued_usd=workers * price.cost(seconds),
            per_hour_usd=workers * price.per_hour,
            note=f"estimated from the {prices}",
        )

    def price_of(
        self, prices: PriceTable, size: WorkerSize, *, spot: bool, public_ip: bool, region: str
    ) -> WorkerPrice:
        """Return the list price of a worker.

        Args:
            prices: The price list.
            size: The worker's size.
            spot: Whether it runs on Spot.
            public_ip: Whether it has a public address.
            region: The region, which the note names if the list is not for it.
        """
        return prices.worker(
            vcpus=size.vcpus,
            memory_mib=size.memory_mib,
            gpus=size.gpus,
            arch=self.arch,
            compute=self.compute,
            spot=spot,
            ephemeral_gib=self.ephemeral_gib,
            public_ip=public_ip,
            region=region,
        )


def ids_of(name: str, given: Sequence[str] | None, least: int = 0) -> tuple[str, ...] | None:
    """Return ids that a setting names, after a check; ``None`` if it is not given.

    Raises:
        ConfigError: If they are no ids, or fewer than ``least``.
    """
    if given is None:
        return None
    ids = (given,) if isinstance(given, str) else tuple(given)
    if len(ids) < least or not all(isinstance(each, str) and each.strip() for each in ids):
        raise ConfigError(f"{name} must be ids, such as ['subnet-0abc'], not {given!r}")
    return ids


def check_texts(**texts: str | None) -> None:
    """Refuse settings that are neither ``None`` nor a string with visible characters.

    Raises:
        ConfigError: Naming the first such setting.
    """
    for name, text in texts.items():
        if text is not None and (not isinstance(text, str) or not text.strip()):
            raise ConfigError(f"{name} must be a string that is not empty, not {text!r}")


def either_packages_or(name: str) -> ConfigError:
    """Return the error for ``packages`` together with a setting that excludes it."""
    return ConfigError(
        f"give either packages or {name}, not both: an image of its own is made for packages"
    )


def _relay(given: str | bool | None) -> str | bool | None:
    """Return the value of ``relay=``, or of the variable; ``None`` if the profile decides."""
    relay = given
    if given is None:
        named = os.environ.get("CLOUDEXEC_RELAY", "")
        relay = {"": None, "true": True, "false": False}.get(named.lower(), named)
    if isinstance(relay, str) and relay != "auto":
        from cloudexec._relay.process import check_relay

        check_relay(relay)
    return relay


def _capacity(size: WorkerSize) -> WorkerCapacity:
    return WorkerCapacity(cpus=size.vcpus, memory=size.memory_mib * 2**20, gpus=size.gpus)


def _sizes(
    vcpus: float,
    memory: str | int | Sequence[str | int] | None,
    compute: str,
    most_vcpus: float,
) -> tuple[WorkerSize, ...]:
    """Return the sizes of a ladder, one or several, after a check."""
    if memory is None:
        ladder: Sequence[str | int] = (default_memory(vcpus, compute),)
    elif isinstance(memory, (str, int)):
        ladder = (memory,)
    elif isinstance(memory, Sequence) and not isinstance(memory, (bytes, bytearray)):
        ladder = memory
    else:
        raise ConfigError(
            f"memory must be like '2GiB', a whole number of MiB, or a list of such, not {memory!r}"
        )
    if not ladder:
        raise ConfigError("memory must be a size, or several, not an empty sequence")
    sizes = tuple(
        instance_size(vcpus, each) if compute == "ec2" else fargate_size(vcpus, each, most_vcpus)
        for each in ladder
    )
    if any(a.memory_mib >= b.memory_mib for a, b in itertools.pairwise(sizes)):
        raise ConfigError(f"the sizes of memory= must grow, not {memory!r}")
    return sizes
