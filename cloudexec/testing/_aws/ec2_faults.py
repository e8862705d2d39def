"""What goes wrong with EC2 instances that are asked for directly, and how AWS does what it does."""

from __future__ import annotations

import threading
from typing import Protocol, cast

from cloudexec.testing._aws.counted import take

__all__ = ["Ec2Faults"]


class Machines(Protocol):
    """The instances that faults are about; see ``instances.Instances``."""

    def reclaim(self, instance: str, notice: float) -> None:
        """See ``Ec2Faults.reclaim``."""

    def vanish(self, instance: str) -> None:
        """See ``Ec2Faults.vanish``."""

    def out_of_memory(self, instance: str) -> None:
        """See ``Ec2Faults.out_of_memory``."""

    def forget_ended(self) -> list[str]:
        """See ``Faults.forget_ended``."""


class Ec2Faults:
    """The faults of EC2 instances. Every method may be called from any thread, at any time.

    That there is no capacity for any instance says ``Faults.no_capacity``, with ``"EC2"`` or
    ``"SPOT"``; how many vCPUs may run ``Faults.vcpu_quota`` with ``compute="ec2"``.

    Attributes:
        room: How many more instances can be started; ``None``: any number.
        full_types: Types of which there is no capacity.
        ends_without_capacity: Whether instances are named in the answer and end while they are
            pending, for which there is no capacity. Otherwise the answer has an error.
        answers_once: Whether a request that is made again with its client token is answered without
            the instances that it has started. Otherwise the answer is the same. AWS documents that
            nothing is started twice, and not what a fleet's answer is.
        scripts_hang: Whether instances do not run their scripts.
        engine_starts_first: Whether the container engine starts before the script in the user data
            runs, as it may on other systems than the ECS-optimised one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._machines: Machines | None = None
        self.clear()

    def clear(self) -> None:
        """Undo every fault and choice."""
        self.room: int | None = None
        self.full_types: frozenset[str] = frozenset()
        self.ends_without_capacity = False
        self.answers_once = False
        self.scripts_hang = False
        self.engine_starts_first = False
        self._failures: list[list[object]] = []
        self._missing: list[list[object]] = []

    def attach(self, machines: Machines) -> None:
        """Say which instances the faults are about."""
        self._machines = machines

    def fleet_fails(self, code: str, message: str = "", count: int | None = None) -> None:
        """Let CreateFleet have an error instead of instances, with HTTP status 200.

        Args:
            code: Such as ``"InvalidParameterValue"``.
            message: AWS's words.
            count: How many calls fail; ``None``: all.
        """
        with self._lock:
            self._failures.append([(code, message), count])

    def instances_go_missing(self, count: int | None = None) -> None:
        """Let DescribeInstances not know instances, also those that it has told of.

        Args:
            count: How many answers about an instance; ``None``: all.
        """
        with self._lock:
            self._missing.append([True, count])

    def reclaim(self, instance: str, *, notice: float = 120.0) -> None:
        """Take the machine of a Spot instance back, after a notice.

        Args:
            instance: Its id.
            notice: Seconds for which the metadata have the notice before. AWS gives 120.

        Raises:
            ValueError: If it does not run, or is not Spot.
        """
        assert self._machines is not None
        self._machines.reclaim(instance, notice)

    def vanish(self, instance: str) -> None:
        """Let the machine under an instance fail, without a notice."""
        assert self._machines is not None
        self._machines.vanish(instance)

    def out_of_memory(self, instance: str) -> None:
        """Kill the container of an instance, as the kernel does when memory runs out."""
        assert self._machines is not None
        self._machines.out_of_memory(instance)

    def forget_ended(self) -> list[str]:
        """Let DescribeInstances not know instances that have ended; return their ids."""
        return [] if self._machines is None else self._machines.forget_ended()

    def failure(self) -> tuple[str, str]:
        """Return the error of this call of CreateFleet, and count it; an empty code: none."""
        with self._lock:
            found = take(self._failures, lambda _: True)
            return ("", "") if found is None else cast("tuple[str, str]", found)

    def is_missing(self) -> bool:
        """Say whether DescribeInstances does not know this instance, and count it."""
        with self._lock:
            return bool(take(self._missing, lambda _: True))
