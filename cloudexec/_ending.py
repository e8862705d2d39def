"""The end of executors: at shutdown, at the end of the interpreter, and in a forked child."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from cloudexec._server.driver import Driver

__all__ = ["drivers", "finish", "kill", "submitters", "wait_for_end"]

_EXIT_LOOK = 0.25
"""Seconds between two checks of what the end of the interpreter still waits for."""
_EXIT_ALONE = 1.0
"""Seconds in which a future of another executor must be done once all other work is done."""
_EXIT_PATIENCE = 30.0
"""Seconds instead of these while other threads run, as one of them may yet complete the future."""


class Forkable(Protocol):
    """An object that must be told when it was copied into a forked child."""

    def forget_after_fork(self) -> None:
        """Refuse further use: in a forked child everything belongs to the parent process."""


submitters: weakref.WeakSet[Forkable] = weakref.WeakSet()
drivers: dict[Driver, None] = {}
exiting = False
forked_from_user = False
_kept: list[object] = []


def finish(driver: Driver) -> None:
    """Let the submitted calls finish, then stop the workers."""
    from cloudexec._core.events import ShutdownRequested

    driver.post(ShutdownRequested())


def kill(driver: Driver) -> None:
    """Cancel the calls that are left, and kill the workers."""
    from cloudexec._core.events import ShutdownRequested

    driver.post(ShutdownRequested(cancel=True, kill=True))


def wait_for_end(driver: Driver, *, at_exit: bool = False) -> None:
    """Wait until all calls are done and the workers have ended."""
    if driver.portal.is_this_thread:
        return
    try:
        if at_exit:
            _outlast(driver)
        driver.finished.wait()
    except BaseException:
        kill(driver)
        driver.finished.wait(10.0)
        raise
    driver.join()
    drivers.pop(driver, None)


def _outlast(driver: Driver) -> None:
    """Wait for the end, but not for futures that no thread is left to complete."""
    waited = 0.0
    while not driver.finished.wait(_EXIT_LOOK):
        foreign = list(driver.dependencies.foreign)
        if not foreign or driver.machine.open_tasks:
            waited = 0.0
            continue
        waited += _EXIT_LOOK
        main = threading.main_thread()
        alone = not any(each.machine.open_tasks for each in drivers) and all(
            thread.daemon or thread is main for thread in threading.enumerate()
        )
        if not alone and any(future.running() for future in foreign):
            continue
        if waited >= (_EXIT_ALONE if alone else _EXIT_PATIENCE):
            driver.portal.post(driver.dependencies.give_up_foreign)
            waited = 0.0


def _at_exit() -> None:
    """Finish the submitted calls before the interpreter ends, as the standard library does."""
    global exiting
    exiting = True
    interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    for driver in list(drivers):
        if interrupted:
            kill(driver)
        else:
            finish(driver)
    for driver in list(drivers):
        wait_for_end(driver, at_exit=True)


def _forget_after_fork() -> None:
    global forked_from_user
    forked_from_user = forked_from_user or "cloudexec._server.network" in sys.modules
    for submitter in list(submitters):
        submitter.forget_after_fork()
    # Also those whose executor is gone: gRPC's destructors are not to run in this process.
    _kept.extend(drivers)
    drivers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)

# As concurrent.futures.process does: before the threads that we wait for are joined.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
