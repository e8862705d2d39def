"""Settings, as frozen dataclasses that check themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cloudexec._errors import ConfigError

__all__ = ["RetryPolicy", "ScalingPolicy", "SendingPolicy", "ServerConfig", "TaskOptions"]


def check_positive(name: str, value: float | None, *, zero: bool = False) -> None:
    """Refuse a value that is not a positive number (``None`` passes).

    Raises:
        ConfigError: Naming the setting, its value and the range.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{name} must be a number, not {value!r}")
    try:
        value = float(value)
    except OverflowError:
        raise ConfigError(f"{name} must be a number that a float can hold") from None
    if math.isnan(value):
        raise ConfigError(f"{name} must be a number, not {value!r}")
    if value < 0 or (value == 0 and not zero):
        bound = "0 or more" if zero else "greater than 0"
        raise ConfigError(f"{name} must be {bound}, not {value!r}")


def check_count(name: str, value: int, *, least: int) -> None:
    """Refuse a value that is not an integer of at least ``least``.

    Raises:
        ConfigError: Naming the setting, its value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, not {value!r}")
    if value < least:
        raise ConfigError(f"{name} must be {least} or more, not {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """What holds for one task; ``BatchExecutor.with_options()`` changes it for a view."""

    timeout: float | None = None
    """Seconds a task may run before its slot is killed; ``None``: no limit."""
    retries: int = 2
    """How often a task is run again after an attempt was lost. 0: at most once."""

    def __post_init__(self) -> None:
        check_positive("timeout", self.timeout)
        check_count("retries", self.retries, least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How lost launches are tried again."""

    launch_failures: int = 3
    """Launches that may fail in a row before waiting tasks fail with ``LaunchError``."""
    backoff: float = 0.5
    """Seconds before the launch after the first failure; doubled for each further one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingPolicy:
    """How many workers run when."""

    max_slots: int
    """Tasks that may run at once."""
    min_slots: int = 0
    """Slots that are kept although there is nothing to do."""
    slots_per_worker: int = 1
    """Slots that share one worker."""
    idle_timeout: float | None = 60.0
    """Seconds after which a worker without work is stopped; ``None``: never."""
    launch_timeout: float = 60.0
    """Seconds in which a launched worker must have dialed back."""
    max_tasks_per_worker: int | None = None
    """Tasks after which a worker is replaced; ``None``: no limit."""
    max_worker_lifetime: float | None = None
    """Seconds after which a worker is replaced; ``None``: no limit."""
    rungs: int = 1
    """Worker sizes to climb when a task was lost to memory, from 0."""

    def __post_init__(self) -> None:
        check_count("max_workers", self.max_slots, least=1)
        check_count("min_workers", self.min_slots, least=0)
        check_count("slots_per_worker", self.slots_per_worker, least=1)
        check_positive("idle_timeout", self.idle_timeout, zero=True)
        check_positive("launch_timeout", self.launch_timeout)
        if self.max_tasks_per_worker is not None:
            check_count("max_tasks_per_worker", self.max_tasks_per_worker, least=1)
        check_positive("max_worker_lifetime", self.max_worker_lifetime)
        check_count("rungs", self.rungs, least=1)
        if self.min_slots > self.max_slots:
            raise ConfigError(
                f"min_workers must not exceed max_workers ({self.max_slots}), not {self.min_slots}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SendingPolicy:
    """How far ahead of need tasks are sent to a worker."""

    lookahead: float = 0.05
    """Seconds of estimated work that may wait on a worker, per slot."""
    max_lookahead: int = 2048
    """Tasks that may wait on a worker, per slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything that the core decides by."""

    scaling: ScalingPolicy
    sending: SendingPolicy = SendingPolicy()
    retry: RetryPolicy = RetryPolicy()
    lease_timeout: float = 60.0
    """Seconds of silence after which a connected worker counts as lost."""
