"""Notes when each step of an executor's start is done, in all of its processes.

The code of cloudexec is unchanged; only the functions that begin or end a step are wrapped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

FILE = "BENCHMARK_STEPS"
"""Environment variable with the path of the file for the steps."""


def note(step: str) -> None:
    """Write the time at which a step is done, by the clock of all processes of the machine."""
    line = f"{time.perf_counter()} {step}\n".encode()
    fd = os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line)
    os.close(fd)


def read() -> dict[str, float]:
    """Return when each step was done for the first time, by the clock of ``time.perf_counter``."""
    found: dict[str, float] = {}
    with open(os.environ[FILE]) as file:
        for line in file:
            at, _, step = line.strip().partition(" ")
            found.setdefault(step, float(at))
    return found


def _wrap(where: Any, name: str, *, before: str = "", after: str = "") -> None:
    inner: Callable[..., Any] = getattr(where, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            note(before)
        result = inner(*args, **kwargs)
        if after:
            note(after)
        return result

    setattr(where, name, wrapped)


def _wrap_coroutine(where: Any, name: str, after: str) -> None:
    inner: Callable[..., Any] = getattr(where, name)

    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = await inner(*args, **kwargs)
        note(after)
        return result

    setattr(where, name, wrapped)


def watch_client() -> None:
    """Note the steps of this process, and make workers note theirs."""
    from cloudexec._launchers import local
    from cloudexec._submission import Submitter
    from cloudexec.worker import copied

    forget = copied._forget_client

    def forget_and_watch() -> Any:
        found = forget()
        watch_worker()
        return found

    copied._forget_client = forget_and_watch
    _wrap(local.Local, "begin", after="client: worker's process launched")
    _wrap(Submitter, "_start_server", after="client: server up")
    _wrap(local.Local, "_launch", after="client: worker told whom to dial")
    here = os.path.dirname(os.path.abspath(__file__))
    last = "from cloudexec.worker.__main__ import main;"
    assert last in local._BOOT
    watched = f"sys.path.insert(0,{here!r});import _steps;_steps.watch_worker();sys.path.pop(0);"
    local._BOOT = local._BOOT.replace(last, watched + last)


def watch_worker() -> None:
    """Note the steps of a worker's processes."""
    note("worker: process")
    from cloudexec.worker import slot

    note("worker: what all its processes need imported")
    from cloudexec.worker import __main__ as worker
    from cloudexec.worker import zygote

    def told(client: Any) -> Any:
        from cloudexec.worker.session import Session

        note("worker: ready for the address")
        _wrap_coroutine(Session, "enrol", "worker: enrolled")
        return second_line(client)

    second_line = worker._second_line
    worker._second_line = told
    _wrap(zygote, "_fork_slot", before="zygote: ready, and a slot asked for")
    _wrap(slot.Slot, "run", before="slot: forked")
    _wrap(slot.Slot, "_on_batch", before="slot: first task there", after="slot: first task done")
