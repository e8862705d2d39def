"""What goes wrong with tasks that Amazon ECS is asked for directly, and how it does what it does.

AWS documents some of that in two ways, or in none. A test can choose each of them.
"""

from __future__ import annotations

import threading
from typing import Literal, cast

from cloudexec.testing._aws.counted import take

__all__ = ["EcsFaults"]

StopCode = Literal["SpotInterruption", "TerminationNotice"]


class EcsFaults:
    """The faults of Amazon ECS. Every method may be called from any thread, at any time.

    Attributes:
        tasks_stop_without_capacity: Whether a task for which there is no capacity is taken, and
            stops before it runs. Otherwise RunTask has it among its failures.
        tokens_conflict: Whether a request that is made again with its client token is refused with
            ConflictException, which names the task. Otherwise the answer is the same.
        spot_stop_code: The stop code of tasks on Fargate Spot that are reclaimed. The guide's
            sample event has ``"TerminationNotice"``, users see ``"SpotInterruption"``.
        quota_is_an_error: Whether RunTask is refused beyond the vCPU quota. Otherwise that is among
            its failures.
        deprovisioning: Seconds for which a task whose containers have ended is DEPROVISIONING,
            before it is STOPPED.
        largest_mib: Memory of the largest tasks for which there is capacity; ``None``: there is for
            all.
        definitions_stay: Why task definitions cannot be deleted, which DeleteTaskDefinitions has
            among its failures, with HTTP status 200; empty: they can.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Undo every fault and choice."""
        self.tasks_stop_without_capacity = False
        self.tokens_conflict = False
        self.spot_stop_code: StopCode = "SpotInterruption"
        self.quota_is_an_error = False
        self.deprovisioning = 0.0
        self.largest_mib: int | None = None
        self.definitions_stay = ""
        self._failures: list[list[object]] = []
        self._missing: list[list[object]] = []

    def run_task_fails(self, reason: str, count: int | None = None, *, code: str = "") -> None:
        """Let RunTask say that it could not start a task.

        Args:
            reason: What it says, such as ``"RESOURCE:ENI"``.
            count: How many tasks fail; ``None``: all.
            code: The code of the error with which it says so, such as
                ``"InvalidParameterException"``; empty: among its failures, with HTTP status 200.
        """
        with self._lock:
            self._failures.append([(reason, code), count])

    def tasks_go_missing(self, count: int | None = None) -> None:
        """Let DescribeTasks not know tasks, also those that it has told of: its answers go back.

        Args:
            count: How many answers about a task; ``None``: all.
        """
        with self._lock:
            self._missing.append([True, count])

    def is_missing(self) -> bool:
        """Say whether DescribeTasks does not know this task, and count it."""
        with self._lock:
            return bool(take(self._missing, lambda _: True))

    def failure(self) -> tuple[str, str]:
        """Return why RunTask cannot start this task, and the code of the error, and count it.

        No reason: it can. No code: that is among its failures.
        """
        with self._lock:
            found = take(self._failures, lambda _: True)
            return ("", "") if found is None else cast("tuple[str, str]", found)
