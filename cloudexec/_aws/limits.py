"""Limits of AWS for sizes of workers and requests, which are checked before anything is sent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cloudexec._config import check_count, parse_bytes
from cloudexec._errors import ConfigError

__all__ = [
    "ARRAY_LARGEST",
    "DEFINITION_BYTES",
    "DESCRIBE_JOBS",
    "ECS_MOST_VCPUS",
    "FARGATE_MOST_VCPUS",
    "LEAST_ATTEMPT_SECONDS",
    "OVERRIDE_CHARACTERS",
    "SUBMIT_BYTES",
    "TAGS",
    "USUAL_DISK_GIB",
    "WorkerSize",
    "check_instance_disk",
    "default_memory",
    "fargate_disk",
    "fargate_memories",
    "fargate_size",
    "fargate_size_for",
    "format_memory",
    "instance_size",
    "instance_size_for",
    "more_memory",
    "parse_memory",
]

ARRAY_LARGEST = 10_000
"""Most children of one array job. AWS Batch User Guide, "Array jobs"."""
SUBMIT_BYTES = 30 * 1024
"""Largest SubmitJob request. AWS Batch User Guide, "Service quotas"."""
DEFINITION_BYTES = 24 * 1024
"""Largest job definition. AWS Batch User Guide, "Service quotas"."""
OVERRIDE_CHARACTERS = 8192
"""Most characters of overrides in JSON for Amazon ECS, with those that AWS Batch adds."""
DESCRIBE_JOBS = 100
"""Most job ids in one DescribeJobs call. AWS Batch API Reference."""
LEAST_ATTEMPT_SECONDS = 60
"""Least ``attemptDurationSeconds``. AWS Batch User Guide, "Job timeouts"."""
TAGS = 50

_GIB = 1024
# vCPU -> memory in MiB. AWS Batch API Reference, "ResourceRequirement".
_FARGATE: dict[float, tuple[int, ...]] = {
    0.25: (512, 1 * _GIB, 2 * _GIB),
    0.5: tuple(gib * _GIB for gib in range(1, 5)),
    1: tuple(gib * _GIB for gib in range(2, 9)),
    2: tuple(gib * _GIB for gib in range(4, 17)),
    4: tuple(gib * _GIB for gib in range(8, 31)),
    8: tuple(gib * _GIB for gib in range(16, 61, 4)),
    16: tuple(gib * _GIB for gib in range(32, 121, 8)),
    32: (60 * _GIB, 120 * _GIB, 244 * _GIB),
}
FARGATE_MOST_VCPUS = 32.0
"""Most vCPUs of a worker on Fargate with AWS Batch. Amazon ECS alone allows fewer."""
ECS_MOST_VCPUS = 16.0
"""Most vCPUs with Amazon ECS alone. Its API Reference, "RegisterTaskDefinition", ``cpu``."""
_MOST_MIB = 32 * 1024 * 1024
"""More memory than any machine of AWS has."""
_MOST_VCPUS = 1920
_MOST_GPUS = 16
"""Most GPUs of an instance. Amazon EC2, "Instance types": u7inh-32tb.480xlarge, p2.16xlarge."""
_FARGATE_DISKS = range(20, 201)
USUAL_DISK_GIB = 30
"""Disk of an instance that is asked for without AWS Batch: as large as the image of its system."""
_MOST_DISK_GIB = 65536
"""Of a gp3 volume. Amazon EBS User Guide, "General Purpose SSD volumes"."""
_LEAST_MIB = 256
"""The least memory of a worker: what its own processes need, and a little more."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class WorkerSize:
    """The size of one worker."""

    memory_mib: int
    vcpus: float
    gpus: int = 0

    def __str__(self) -> str:
        gpus = f" and {self.gpus} GPU{'s' * (self.gpus != 1)}" if self.gpus else ""
        return f"{self.vcpus:g} vCPU with {format_memory(self.memory_mib)}{gpus}"


def format_memory(mib: int) -> str:
    """Format an amount of memory for people."""
    return f"{mib / _GIB:g} GiB" if mib >= _GIB and mib % 256 == 0 else f"{mib} MiB"


def parse_memory(memory: str | int) -> int:
    """Parse an amount of memory.

    Args:
        memory: ``"2GiB"``, ``"512 MiB"``, ``"2g"``; ``"2GB"`` is 2,000,000,000 bytes, and units
            without a B count in powers of 1024. An integer is MiB, as in AWS Batch.

    Returns:
        MiB, rounded up.

    Raises:
        ConfigError: If it cannot be parsed, or is not positive.
    """
    if isinstance(memory, int) and not isinstance(memory, bool):
        mib = memory
    else:
        mib = -(-parse_bytes(memory) // 2**20)
    if mib <= 0:
        raise ConfigError(f"memory must be more than 0, not {memory!r}")
    if mib > _MOST_MIB:
        raise ConfigError(f"memory must be 32 TiB or less, not {memory!r}: no worker has more")
    return mib


def fargate_memories(vcpus: float) -> tuple[int, ...]:
    """Return the amounts of memory, in MiB, that Fargate offers with so many vCPUs. The result is
    empty if Fargate has no such number of vCPUs."""
    return _FARGATE.get(vcpus, ())


def _fargate_offers(most_vcpus: float) -> dict[float, tuple[int, ...]]:
    return {vcpus: each for vcpus, each in _FARGATE.items() if vcpus <= most_vcpus}


def fargate_size(
    vcpus: float, memory: str | int, most_vcpus: float = FARGATE_MOST_VCPUS
) -> WorkerSize:
    """Check a size, which must be one that Fargate offers.

    Args:
        vcpus: 0.25, 0.5, 1, 2, 4, 8, 16 or 32.
        memory: As ``parse_memory`` takes it.
        most_vcpus: Most vCPUs of a worker in the service that runs it.

    Raises:
        ConfigError: If Fargate does not offer it. The message names the nearest sizes.

    References:
        AWS Batch API Reference, "ResourceRequirement".
    """
    mib = parse_memory(memory)
    if isinstance(vcpus, bool) or not isinstance(vcpus, (int, float)) or not vcpus > 0:
        raise ConfigError(f"vcpus must be a positive number, not {vcpus!r}")
    offers = _fargate_offers(most_vcpus)
    if mib in offers.get(vcpus, ()):
        return WorkerSize(memory_mib=mib, vcpus=vcpus)
    every = [
        WorkerSize(memory_mib=offered, vcpus=cpus)
        for cpus, memories in offers.items()
        for offered in memories
    ]
    enough = [size for size in every if size.vcpus >= vcpus and size.memory_mib >= mib]
    nearest: list[WorkerSize] = []
    if vcpus in offers:
        same = offers[vcpus]
        below = [offered for offered in same if offered < mib]
        above = [offered for offered in same if offered > mib]
        nearest += [WorkerSize(memory_mib=m, vcpus=vcpus) for m in below[-1:] + above[:1]]
    if enough:
        least = min(enough, key=lambda size: (size.vcpus, size.memory_mib))
        if least not in nearest:
            nearest.append(least)
    fewer = [cpus for cpus in offers if cpus < vcpus]
    if vcpus not in offers and fewer:
        memories = offers[max(fewer)]
        closest = min(memories, key=lambda offered: abs(offered - mib))
        nearest.append(WorkerSize(memory_mib=closest, vcpus=max(fewer)))
    if not nearest:
        nearest.append(every[-1])
    names = ", or ".join(map(str, nearest))
    if mib in _FARGATE.get(vcpus, ()):
        raise ConfigError(
            f"Amazon ECS takes workers of up to {most_vcpus:g} vCPU on Fargate, so not of "
            f"{vcpus:g} vCPU with {format_memory(mib)}; the nearest: {names}. Batch(...) has that "
            f"size"
        )
    raise ConfigError(
        f"Fargate has no size of {vcpus:g} vCPU with {format_memory(mib)}; the nearest: {names}"
    )


def fargate_size_for(
    cpus: float, memory_mib: int, most_vcpus: float = FARGATE_MOST_VCPUS
) -> WorkerSize:
    """Return the smallest size of Fargate with at least so many vCPUs and so much memory.

    Args:
        cpus: vCPUs.
        memory_mib: MiB.
        most_vcpus: Most vCPUs of a worker in the service that runs it.

    Raises:
        ConfigError: If there is none. The message names the largest sizes, and where to get more.
    """
    offers = _fargate_offers(most_vcpus)
    enough = [
        WorkerSize(memory_mib=mib, vcpus=vcpus)
        for vcpus, memories in offers.items()
        for mib in memories
        if vcpus >= cpus - 1e-9 and mib >= memory_mib
    ]
    if not enough:
        most_cpus, most_memory = max(offers), max(max(each) for each in offers.values())
        nearest = WorkerSize(memory_mib=most_memory, vcpus=most_cpus)
        raise ConfigError(
            f"Fargate has no worker for a task with cpus={cpus:g} and "
            f"memory={format_memory(memory_mib)!r}; the nearest, and its largest, is {nearest}. "
            f"Batch(compute='ec2') has more"
        )
    return min(enough, key=lambda size: (size.vcpus, size.memory_mib))


def instance_size(vcpus: float, memory: str | int) -> WorkerSize:
    """Check a size of a worker on EC2: whole vCPUs, and any memory.

    Args:
        vcpus: 1 to 1920.
        memory: As ``parse_memory`` takes it.

    Raises:
        ConfigError: If there is no such size. The message names the nearest sizes.

    References:
        AWS Batch API Reference, "ResourceRequirement": VCPU is a whole number on EC2.
    """
    mib = parse_memory(memory)
    if isinstance(vcpus, bool) or not isinstance(vcpus, (int, float)) or not vcpus > 0:
        raise ConfigError(f"vcpus must be a positive number, not {vcpus!r}")
    whole = {max(1, math.floor(min(vcpus, _MOST_VCPUS))), math.ceil(min(vcpus, _MOST_VCPUS))}
    least = max(mib, _LEAST_MIB)
    if vcpus not in whole or least != mib:
        names = ", or ".join(str(WorkerSize(memory_mib=least, vcpus=n)) for n in sorted(whole))
        raise ConfigError(
            f"a worker on EC2 has 1 to {_MOST_VCPUS} whole vCPUs and {format_memory(_LEAST_MIB)} "
            f"or more, not {vcpus:g} vCPU with {format_memory(mib)}; the nearest: {names}"
        )
    return WorkerSize(memory_mib=mib, vcpus=vcpus)


def fargate_disk(gib: int | None) -> int | None:
    """Return the size of a disk as definitions for Fargate have it; ``None``: that without one.

    Raises:
        ConfigError: If there is none of this size.

    References:
        Amazon ECS API Reference, "EphemeralStorage": 21 to 200 GiB, and 20 by default.
    """
    if gib is None or gib == _FARGATE_DISKS[0]:
        return None
    if gib not in _FARGATE_DISKS:
        raise ConfigError(
            f"disks on Fargate have {_FARGATE_DISKS[0]} to {_FARGATE_DISKS[-1]} GiB, not {gib}: "
            f"--on ec2 has larger ones"
        )
    return gib


def check_instance_disk(gib: int) -> None:
    """Complain if an instance cannot have a disk of this size.

    Raises:
        ConfigError: If it cannot.
    """
    check_count("disk_gib", gib, least=USUAL_DISK_GIB)
    if gib > _MOST_DISK_GIB:
        raise ConfigError(f"disk_gib must be {_MOST_DISK_GIB} or less, not {gib}")


def instance_size_for(cpus: float, memory_mib: int, gpus: int) -> WorkerSize:
    """Return the smallest size of a worker on EC2 for these needs: whole vCPUs, any memory.

    Raises:
        ConfigError: If no instance of AWS has that.

    References:
        AWS Batch API Reference, "ResourceRequirement": VCPU is a whole number on EC2.
    """
    if cpus > _MOST_VCPUS or memory_mib > _MOST_MIB or gpus > _MOST_GPUS:
        raise ConfigError(
            f"no EC2 instance holds a task with cpus={cpus:g}, "
            f"memory={format_memory(memory_mib)!r} and gpus={gpus}: the most there is are "
            f"{_MOST_VCPUS} vCPUs, {format_memory(_MOST_MIB)} and {_MOST_GPUS} GPUs"
        )
    return WorkerSize(
        memory_mib=max(memory_mib, _LEAST_MIB), vcpus=max(1, math.ceil(cpus - 1e-9)), gpus=gpus
    )


def default_memory(vcpus: float, compute: str) -> int:
    """Return the default MiB of a worker: 2 GiB per vCPU, or a little more."""
    wanted = math.ceil(2 * _GIB * min(vcpus, _MOST_VCPUS))
    if compute == "ec2":
        return wanted
    return next((mib for mib in fargate_memories(vcpus) if mib >= wanted), wanted)


def more_memory(size: WorkerSize, compute: str, most_vcpus: float = FARGATE_MOST_VCPUS) -> str:
    """Say which settings give a worker more memory. They name sizes that AWS offers.

    Args:
        size: The worker that had too little.
        compute: ``"fargate"`` or ``"ec2"``.
        most_vcpus: Most vCPUs on Fargate in the service that runs the worker.
    """
    vcpus, mib = size.vcpus, size.memory_mib
    if compute == "ec2":
        offered: tuple[int, ...] = (min(2 * mib, _MOST_MIB),)
    else:
        offered = fargate_memories(vcpus)
    above = [each for each in offered if each > mib]
    if above:
        larger = next((each for each in above if each >= 2 * mib), above[-1])
        return (
            f"give memory= a larger size, or several to climb: memory=({_as_setting(mib)!r}, "
            f"{_as_setting(larger)!r})"
        )
    if compute == "ec2":
        return "no instance of AWS has more memory: divide the task"
    for cpus, memories in _fargate_offers(most_vcpus).items():
        larger = next((each for each in memories if each >= 2 * mib), memories[-1])
        if cpus > vcpus and larger > mib:
            return (
                f"{vcpus:g} vCPU have {format_memory(mib)} at the most on Fargate: give "
                f"vcpus={cpus:g} and memory={_as_setting(larger)!r}"
            )
    if most_vcpus < FARGATE_MOST_VCPUS:
        # A launcher for Amazon ECS alone has no setting compute=.
        return (
            f"Amazon ECS takes no worker with more than {format_memory(mib)} on Fargate: use "
            f"Batch(compute='ec2', memory={_as_setting(2 * mib)!r})"
        )
    return (
        f"Fargate has no worker with more than {format_memory(mib)}: give compute='ec2' and "
        f"memory={_as_setting(2 * mib)!r}"
    )


def _as_setting(mib: int) -> str:
    return f"{mib // _GIB}GiB" if mib % _GIB == 0 else f"{mib}MiB"
