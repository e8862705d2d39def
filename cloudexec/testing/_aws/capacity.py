"""What there is room for: environments, quotas, instances that must boot, rates of launches.

Everything belongs to the engine's lock.
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
"""Type of compute environment -> the quota that bounds it."""


class Capacity:
    """Counts vCPUs.

    Args:
        faults: The account's quotas.
        later: Calls something after so many seconds.
        changed: To be called when there may be more room.
        max_running: Attempts that run at a time at most, whatever AWS's capacity is.
        boot: Seconds until a new EC2 instance runs jobs.
        launch_rate: Tasks that Fargate starts at once, and per second after that, of each kind.
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
        """By environment, vCPUs of instances that run; and of those that are on their way."""
        self._booting: dict[str, float] = {}
        self._launches: dict[str, TokenBucket] = {}
        if launch_rate is not None:
            burst, rate = launch_rate
            self._launches = {
                kind: TokenBucket(rate, burst) for kind in ("FARGATE", "FARGATE_SPOT")
            }

    def used(self, arn: str) -> float:
        """vCPUs in use in an environment."""
        return self._used.get(arn, 0.0)

    def take(self, arn: str, kind: str, vcpus: float, most: float) -> bool:
        """Take room for one attempt, if there is any.

        Args:
            arn: Of the environment.
            kind: Its type.
            vcpus: How many are needed.
            most: How many it may have in use.
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
        """Free the room of one attempt."""
        self._count(arn, kind, -vcpus, -1)

    def _count(self, arn: str, kind: str, vcpus: float, attempts: int) -> None:
        self._placed += attempts
        self._used[arn] = self.used(arn) + vcpus
        self._used_of_quota[_QUOTAS[kind]] += vcpus

    def _has_instances(self, arn: str, kind: str, vcpus: float) -> bool:
        """Whether instances for so many vCPUs more run; if not, they are started."""
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
        """Whether Fargate starts one more task now; if not, it is asked again."""
        bucket = self._launches.get(kind)
        if bucket is None or bucket.take():
            return True
        self._later(bucket.interval, self._changed)
        return False
