"""Decides whether there is capacity for a job: limits of environments, quotas, instances, rates.

All state here is protected by the engine's lock.
"""

from __future__ import annotations

from collections.abc import Callable

from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.token_bucket import TokenBucket

__all__ = ["Capacity"]

_QUOTAS = {
    "FARGATE": "fargate",
    "FARGATE_SPOT": "fargate_spot",
    "EC2": "ec2",
    "SPOT": "ec2_spot",
}
"""By type of compute environment: the quota that limits it."""


class Capacity:
    """Counts vCPUs.

    Args:
        faults: The account's quotas.
        later: Calls a function after a number of seconds.
        changed: Called when there may be more capacity.
        max_running: Largest number of attempts that run at a time, whatever AWS's capacity is.
        boot: Seconds until a new EC2 instance runs jobs.
        launch_rate: Number of tasks that Fargate starts at once, and per second after that, for
            each kind of capacity.
    """

    def __init__(
        self,
        faults: Faults,
        later: Callable[[float, Callable[[], None]], None],
        changed: Callable[[], None],
        *,
        max_running: int,
        boot: float,
        launch_rate: tuple[int, float] | None,
    ) -> None:
        self._faults = faults
        self._later = later
        self._changed = changed
        self._max_running = max_running
        self._boot = boot
        self._placed = 0
        self._used: dict[str, float] = {}
        self._used_of_quota = dict.fromkeys(_QUOTAS.values(), 0.0)
        self._instances: dict[str, float] = {}
        """By environment: vCPUs of running instances, and of instances that boot."""
        self._booting: dict[str, float] = {}
        self._launches: dict[str, TokenBucket] = {}
        if launch_rate is not None:
            burst, rate = launch_rate
            self._launches = {
                kind: TokenBucket(rate, burst) for kind in ("FARGATE", "FARGATE_SPOT")
            }

    def used(self, arn: str) -> float:
        """Return the vCPUs of an environment that are in use."""
        return self._used.get(arn, 0.0)

    def refuses(self, arn: str, kind: str, vcpus: float) -> str:
        """Take capacity for a task that waits in no queue, or return what is lacking.

        Returns:
            Empty if the capacity was taken; else ``"quota"``, ``"rate"`` or ``"capacity"``.
        """
        quota = self._faults.quota(_QUOTAS[kind])
        if quota is not None and self._used_of_quota[_QUOTAS[kind]] + vcpus > quota:
            return "quota"
        if self._placed >= self._max_running:
            return "capacity"
        bucket = self._launches.get(kind)
        if bucket is not None and not bucket.take():
            return "rate"
        self._count(arn, kind, vcpus, 1)
        return ""

    def take(self, arn: str, kind: str, vcpus: float, most: float) -> bool:
        """Take capacity for one attempt, and return whether there was enough.

        Args:
            arn: The environment's ARN.
            kind: The environment's type.
            vcpus: vCPUs that are needed.
            most: vCPUs that the environment may have in use.
        """
        quota = self._faults.quota(_QUOTAS[kind])
        if (
            self._placed >= self._max_running
            or self.used(arn) + vcpus > most
            or (quota is not None and self._used_of_quota[_QUOTAS[kind]] + vcpus > quota)
            or not self._has_instances(arn, kind, vcpus)
            or not self._may_launch(kind)
        ):
            return False
        self._count(arn, kind, vcpus, 1)
        return True

    def give_back(self, arn: str, kind: str, vcpus: float) -> None:
        """Free the capacity of one attempt."""
        self._count(arn, kind, -vcpus, -1)

    def _count(self, arn: str, kind: str, vcpus: float, attempts: int) -> None:
        self._placed += attempts
        self._used[arn] = self.used(arn) + vcpus
        self._used_of_quota[_QUOTAS[kind]] += vcpus

    def _has_instances(self, arn: str, kind: str, vcpus: float) -> bool:
        """Return whether running instances have ``vcpus`` more; if not, start instances."""
        if kind.startswith("FARGATE") or not self._boot:
            return True
        missing = self.used(arn) + vcpus - self._instances.get(arn, 0.0)
        if missing <= 0:
            return True
        ordered = missing - self._booting.get(arn, 0.0)
        if ordered > 0:
            self._booting[arn] = self._booting.get(arn, 0.0) + ordered
            self._later(self._boot, lambda: self._booted(arn, ordered))
        return False

    def _booted(self, arn: str, vcpus: float) -> None:
        self._booting[arn] -= vcpus
        self._instances[arn] = self._instances.get(arn, 0.0) + vcpus
        self._changed()

    def _may_launch(self, kind: str) -> bool:
        """Return whether Fargate starts one more task now; if not, try again later."""
        bucket = self._launches.get(kind)
        if bucket is None or bucket.take():
            return True
        self._later(bucket.interval, self._changed)
        return False
