"""Settings, as frozen dataclasses that check the range of their values when they are made.

``_core`` decides by these settings.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cloudexec._errors import ConfigError
from cloudexec._record_class import record, replace

__all__ = [
    "RetryPolicy",
    "ScalingPolicy",
    "SendingPolicy",
    "ServerConfig",
    "TaskOptions",
    "WorkerCapacity",
    "format_bytes",
    "parse_bytes",
]

_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(k|m|g|t)(i?b?)\s*", re.IGNORECASE)
_MOST_BYTES = 1 << 60


def check_positive(name: str, value: float | None, *, zero: bool = False) -> None:
    """Refuse a value that is neither a positive number nor ``None``.

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


def check_addresses(listen: str | None, advertise: str | None) -> None:
    """Refuse addresses that cannot be listened on or dialled.

    Raises:
        ConfigError: Naming the address.
    """
    if listen is not None and (not isinstance(listen, str) or ":" not in listen):
        raise ConfigError(f"listen must be 'host:port', such as '127.0.0.1:0', not {listen!r}")
    if listen is not None and not listen.startswith("unix:"):
        port = listen.rpartition(":")[2]
        if not (port.isascii() and port.isdigit() and int(port) < 2**16):
            raise ConfigError(f"the port of listen={listen!r} must be a number from 0 to 65535")
    if advertise is not None and (not isinstance(advertise, str) or not advertise.strip()):
        raise ConfigError(
            f"advertise must be a host or 'host:port' that workers can dial, not {advertise!r}"
        )


def check_count(name: str, value: int, *, least: int) -> None:
    """Refuse a value that is not an integer of at least ``least``.

    Raises:
        ConfigError: Naming the setting, its value and the range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, not {value!r}")
    if value < least:
        raise ConfigError(f"{name} must be {least} or more, not {value!r}")


def parse_bytes(memory: object) -> int:
    """Parse an amount of memory such as ``"2GiB"``, ``"512 MiB"``, ``"2g"`` or ``"2GB"``.

    Returns:
        Bytes, rounded up. ``"2GB"`` is 2,000,000,000; all other units are powers of 1024.

    Raises:
        ConfigError: If the text is no amount of memory.
    """
    found = _MEMORY.fullmatch(memory) if isinstance(memory, str) else None
    if found is None:
        raise ConfigError(f"memory must be like '2GiB' or '512MiB', not {memory!r}")
    base = 1000 if found[3].lower() == "b" else 1024
    unit = math.pow(base, 1 + "kmgt".index(found[2].lower()))
    return math.ceil(float(found[1]) * unit)


def format_bytes(size: float) -> str:
    """Return an amount of memory in bytes as text, such as ``"2 GiB"``."""
    if size >= 2**30:
        return f"{size / 2**30:.4g} GiB"
    return f"{size / 2**20:.4g} MiB"


Predicate = Callable[[BaseException], object]
"""Takes the exception of a task, and returns whether the task is run again."""


@record(kw_only=True)
class TaskOptions:
    """The options of one task, which ``BatchExecutor.with_options()`` changes for a view."""

    timeout: float | None = None
    """Seconds that a task may run before its process is killed; ``None`` means no limit."""
    retries: int = 2
    """How often a task is run again after lost attempts; with 0 it runs at most once."""
    cpus: float | None = None
    """Processors that the task needs; ``None`` means one slot's share of its worker."""
    memory: int | str | None = None
    """Memory that the task needs and may use, as bytes or text. ``None`` means one slot's share of
    its worker, without a limit."""
    gpus: int | None = None
    """GPUs that the task needs."""
    retry_on: tuple[type[BaseException], ...] | Predicate | None = None
    """Exceptions after which the task is run again."""
    name: str | None = None
    """The task's name in logs and reports; ``None`` means the name of its function."""
    priority: int = 0
    """Tasks with a higher priority are sent to workers first."""
    env: Mapping[str, str] | None = None
    """Environment variables that are set while the task runs."""
    keep: bool = False
    """Whether the result stays on the worker; the future then has a ``Ref`` that stands for it."""
    on_loss: str = "recompute"
    """Reaction to the loss of a kept result with its worker: ``"recompute"`` or ``"raise"``."""
    key: str | Callable[..., object] | None = None
    """Key of the call in a journal, or a function that returns the key for the call's arguments.
    ``None`` means a key that is made from the task's function and arguments."""

    def __post_init__(self) -> None:
        check_positive("timeout", self.timeout)
        check_count("retries", self.retries, least=0)
        check_positive("cpus", self.cpus)
        if self.cpus is not None and math.isinf(self.cpus):
            raise ConfigError("cpus must be finite")
        if self.memory is not None:
            object.__setattr__(self, "memory", _task_memory(self.memory))
        if self.gpus is not None:
            check_count("gpus", self.gpus, least=0)
        object.__setattr__(self, "retry_on", _retry_on(self.retry_on))
        if self.name is not None:
            _check_name(self.name)
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise ConfigError(f"priority must be an integer, not {self.priority!r}")
        if self.env is not None:
            object.__setattr__(self, "env", _task_env(self.env))
        if not isinstance(self.keep, bool):
            raise ConfigError(f"keep must be True or False, not {self.keep!r}")
        if self.on_loss not in ("recompute", "raise"):
            raise ConfigError(f"on_loss must be 'recompute' or 'raise', not {self.on_loss!r}")
        if self.key is not None and not isinstance(self.key, str) and not callable(self.key):
            raise ConfigError(
                f"key must be a string, or a function of the call's arguments, not {self.key!r}"
            )

    @property
    def memory_bytes(self) -> int | None:
        """Memory that the task may use, in bytes; ``None`` means no limit of its own."""
        return self.memory if isinstance(self.memory, int) else None

    def changed(self, changes: Mapping[str, Any]) -> TaskOptions:
        """Return a copy with some options changed; ``env`` is merged with the present variables.

        Raises:
            ConfigError: If an option is out of range.
        """
        options = replace(self, **changes)
        if changes.get("env") is not None and self.env:
            options = replace(options, env={**self.env, **(options.env or {})})
        return options


def _task_memory(memory: object) -> int:
    if isinstance(memory, bool) or not isinstance(memory, (int, str)):
        raise ConfigError(f"memory must be a number of bytes or a text like '2GiB', not {memory!r}")
    size = memory if isinstance(memory, int) else parse_bytes(memory)
    if size <= 0:
        raise ConfigError(f"memory must be greater than 0, not {memory!r}")
    if size > _MOST_BYTES:
        raise ConfigError(f"memory must be less than {memory!r}: no machine has that much")
    return size


def _retry_on(given: object) -> tuple[type[BaseException], ...] | Predicate | None:
    if given is None:
        return None
    if isinstance(given, type):
        given = (given,)
    if isinstance(given, (tuple, list, set, frozenset)):
        for each in given:
            if not (isinstance(each, type) and issubclass(each, BaseException)):
                raise ConfigError(f"retry_on must hold types of exceptions, not {each!r}")
        return tuple(given) or None
    if callable(given):
        return given
    raise ConfigError(
        f"retry_on must be types of exceptions, or a function that takes one, not {given!r}"
    )


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"name must be a string that is not empty, not {name!r}")
    if len(name) > 200 or not name.isprintable():
        raise ConfigError(f"name must be one line of up to 200 characters, not {name[:50]!r}...")


def _task_env(env: object) -> dict[str, str]:
    if not isinstance(env, Mapping):
        raise ConfigError(f"env must map names of variables to their values, not {env!r}")
    for name, value in env.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise ConfigError(
                f"env must have names that are not empty and without '=', not {name!r}"
            )
        if not isinstance(value, str) or "\0" in value:
            raise ConfigError(f"env must have strings as values; that of {name} is {value!r}")
        for text in (name, value):
            try:
                text.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                raise ConfigError(f"env has text that no environment can hold: {name!r}") from None
    return dict(env)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCapacity:
    """The resources that one worker has for its tasks, or all workers of a machine together."""

    cpus: float
    memory: int = 0
    """Bytes; 0 if the amount is not known."""
    gpus: int = 0
    gpu_ids: tuple[str, ...] = ()
    """Names of the GPUs for ``CUDA_VISIBLE_DEVICES``; if empty, they are called by number."""


@record(kw_only=True)
class RetryPolicy:
    """How failed launches, and tasks that raised, are tried again."""

    launch_failures: int = 3
    """Launches that may fail in a row before waiting tasks fail with ``LaunchError``. Workers that
    were requested together and could not be started count once. A worker that was started and did
    not connect within ``launch_timeout`` counts on its own."""
    backoff: float = 0.5
    """Seconds before the launch after the first failure; doubled for each further failure."""
    task_backoff: float = 0.1
    """Seconds before a task is run again that raised an exception of ``retry_on``; doubled for each
    further exception."""
    longest_backoff: float = 10.0
    """Largest number of seconds that these doublings reach."""


@record(kw_only=True)
class ScalingPolicy:
    """How many workers are started, and when they are started and stopped."""

    max_slots: int
    """Slots of all workers together. A slot is a process that runs one task at a time, so this is
    how many tasks may run at once."""
    min_slots: int = 0
    """Slots that are kept while there is no work."""
    slots_per_worker: int = 1
    """Slots in one worker."""
    idle_timeout: float | None = 60.0
    """Seconds after which a worker without work is stopped; ``None`` means never."""
    launch_timeout: float = 60.0
    """Seconds within which a launched worker must connect to the client."""
    max_tasks_per_worker: int | None = None
    """Tasks after which a worker is replaced; ``None`` means no limit."""
    max_worker_lifetime: float | None = None
    """Seconds after which a worker is replaced; ``None`` means no limit."""
    size_count: int = 1
    """Number of worker sizes. A task that ran out of memory is run again on the next larger one."""
    sizes: tuple[WorkerCapacity, ...] = ()
    """Resources of a worker of each size, smallest first; empty if they are not known."""
    one_machine: bool = False
    """Whether all workers share the resources of the first size, as they run on one machine."""

    def __post_init__(self) -> None:
        check_count("max_workers", self.max_slots, least=1)
        check_count("min_workers", self.min_slots, least=0)
        check_count("slots_per_worker", self.slots_per_worker, least=1)
        check_positive("idle_timeout", self.idle_timeout, zero=True)
        check_positive("launch_timeout", self.launch_timeout)
        if self.max_tasks_per_worker is not None:
            check_count("max_tasks_per_worker", self.max_tasks_per_worker, least=1)
        check_positive("max_worker_lifetime", self.max_worker_lifetime)
        check_count("size_count", self.size_count, least=1)
        if self.min_slots > self.max_slots:
            raise ConfigError(
                f"min_workers must not exceed max_workers ({self.max_slots}), not {self.min_slots}"
            )


@record(kw_only=True)
class SendingPolicy:
    """How many tasks are sent to a worker before it is ready to run them."""

    lookahead: float = 0.05
    """Seconds of estimated work that may wait on a worker, per slot."""
    max_lookahead: int = 2048
    """Tasks that may wait on a worker, per slot."""


@record(kw_only=True)
class ServerConfig:
    """All settings that the decisions in ``_core`` depend on."""

    scaling: ScalingPolicy
    sending: SendingPolicy = SendingPolicy()
    retry: RetryPolicy = RetryPolicy()
    lease_timeout: float = 60.0
    """Seconds of silence after which a connected worker counts as lost."""
    reconnect_grace: float = 30.0
    """Seconds in which a worker whose connection was cut may reconnect; 0 means lost at once."""
    last_words: float = 0.1
    """Seconds, after a worker's connection has ended, in which the launcher may say why."""

    def __post_init__(self) -> None:
        check_positive("reconnect_grace", self.reconnect_grace, zero=True)


def usable_cpus() -> int:
    """Return how many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0)) or 1
    except AttributeError:
        return os.cpu_count() or 1
