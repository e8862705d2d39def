"""Faults of tasks that Amazon ECS runs without AWS Batch, and choices of its behaviour.

AWS documents some behaviour in two ways, or not at all. A test can choose each of them.
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
        tasks_stop_without_capacity: Whether RunTask starts a task without capacity, which then
            stops before it runs. Otherwise RunTask lists it among its failures.
        tokens_conflict: Whether a repeated request with the same client token is refused with
            ConflictException, which names the task. Otherwise the answer is the same.
        spot_stop_code: The stop code of reclaimed tasks on Fargate Spot. The guide's sample event
            has ``"TerminationNotice"``, users report ``"SpotInterruption"``.
        quota_is_an_error: Whether RunTask is refused beyond the vCPU quota. Otherwise it lists the
            task among its failures.
        deprovisioning: Seconds for which a task whose containers have ended is DEPROVISIONING,
            before it is STOPPED.
        largest_mib: Largest memory of a task for which there is capacity; ``None``: there is
            capacity for all sizes.
        definitions_stay: Why task definitions cannot be deleted, which DeleteTaskDefinitions lists
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
        """Let RunTask fail to start tasks.

        Args:
            reason: The reason in its answer, such as ``"RESOURCE:ENI"``.
            count: Number of tasks that fail; ``None``: all.
            code: Code of the error that RunTask answers with, such as
                ``"InvalidParameterException"``; empty: it lists a failure, with HTTP status 200.
        """
        with self._lock:
            self._failures.append([(reason, code), count])

    def tasks_go_missing(self, count: int | None = None) -> None:
        """Let DescribeTasks say that tasks are MISSING, even if it has described them before.

        Args:
            count: Number of answers about a task; ``None``: all.
        """
        with self._lock:
            self._missing.append([True, count])

    def is_missing(self) -> bool:
        """Return whether DescribeTasks says that this task is MISSING, and count it."""
        with self._lock:
            return bool(take(self._missing, lambda _: True))

    def failure(self) -> tuple[str, str]:
        """Return why RunTask cannot start this task, and the code of the error, and count it.

        Without a reason, the task starts. Without a code, RunTask lists a failure.
        """
        with self._lock:
            found = take(self._failures, lambda _: True)
            return ("", "") if found is None else cast("tuple[str, str]", found)
