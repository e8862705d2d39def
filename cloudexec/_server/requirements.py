"""The terms of a task on its worker: environment variables, limit of memory, and GPUs."""

from __future__ import annotations

from cloudexec._core.machine import Machine
from cloudexec._core.tasks import Task
from cloudexec._server.outcomes import name_of

__all__ = ["name_at", "requirements_of", "shares_gpus"]


def requirements_of(machine: Machine, worker: str, task: Task) -> tuple[dict[str, str], int, bool]:
    """Say what a worker must know of a task that has requirements.

    Returns:
        The environment variables, the bytes of memory that the task may take (0 for no limit), and
        whether the slot's process must end after the task.
    """
    requirements, known = task.requirements, machine.workers.get(worker)
    assert requirements is not None
    options = requirements.options
    env = dict(options.env or {})
    gpus = () if known is None else known.allocation.heavy.get(task.lease, ())
    if gpus:
        env.setdefault("CUDA_VISIBLE_DEVICES", ",".join(gpus))
    # A task that runs on a larger worker than it asked for has no limit but the worker's memory.
    memory = options.memory_bytes or 0
    return env, memory if not task.size else 0, bool(gpus)


def shares_gpus(machine: Machine, task: Task) -> bool:
    """Say whether a task uses GPUs of a worker that has several, and others may use the rest."""
    known = machine.workers.get(task.worker or "")
    if known is None or known.allocation.capacity.gpus < 2:
        return False
    return bool(known.allocation.heavy.get(task.lease))


def name_at(machine: Machine, worker: str, lease: int) -> str:
    """Return the name of the task of a lease, or an empty string."""
    known = machine.workers.get(worker)
    task = None if known is None else known.leases.get(lease)
    return "" if task is None else name_of(task)
