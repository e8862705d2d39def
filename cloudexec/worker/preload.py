"""Imports modules that tasks will need in the zygote, so that all slots share them.

Slots are forked afterwards, and two things need care in a fork. First, threads do not exist in the
child, and locks that they held stay locked. A module that starts threads when it is imported is
therefore left to the slots, unless it ends them itself around a fork, as OpenBLAS does. Second,
random generators continue alike in every child. Generators that modules share are seeded anew in
each slot.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from cloudexec import _nesting
from cloudexec._forked import count_threads, count_threads_after_fork

__all__ = ["can_import_again", "preload", "seed_generators"]

_TRIAL_SECONDS = 0.5
"""Seconds that importing the user's modules may take in the trial. If it takes longer, starting a
fresh interpreter costs no more."""

_generators: list[Any] = []


def preload(names: Sequence[str], argv: Sequence[str]) -> str:
    """Import modules. Failures are ignored: a task that needs the module reports the error.

    Args:
        names: The names of the modules.
        argv: The ``sys.argv`` that the modules see.

    Returns:
        The first module that has started threads which would not survive a fork, so that this
        process cannot be used; empty if there is none.
    """
    sys.argv[:] = argv
    gc.disable()
    loading = _nesting.loading
    loading.watch("a worker", __name__)
    try:
        for name in names:
            # A module that starts an executor when it is imported fails here, as it does in a slot.
            loading.active = True
            try:
                import_module(name)
            except BaseException:
                pass
            finally:
                loading.active = False
                loading.ended()
            if _has_threads():
                return name
        _find_generators()
    finally:
        # The garbage collector ignores the present objects from now on. It would write to them, and
        # the slots would get copies of their memory pages.
        gc.freeze()
        gc.enable()
    return ""


def _has_threads() -> bool:
    """Say whether this process has threads, other than those that end themselves around a fork."""
    if threading.active_count() > 1:
        return True
    return count_threads() > 1 and count_threads_after_fork() > 1


def can_import_again(names: Sequence[str]) -> bool:
    """Say whether modules can be imported a second time, in a copy of a process that has them.

    Some modules register themselves with a library that accepts each name only once, or warns. So
    they are imported for a trial in a process that is forked for that.

    Args:
        names: The names of the user's own modules.
    """
    if not names:
        return True
    pid = os.fork()
    if not pid:
        _try_to_import(names)
    ends = time.monotonic() + _TRIAL_SECONDS
    while time.monotonic() < ends:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status == 0
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _try_to_import(names: Sequence[str]) -> NoReturn:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (1, 2):
            os.dup2(null, fd)
        signal.set_wakeup_fd(-1)
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        loading = _nesting.loading
        loading.active = True
        for name in names:
            import_module(name)
        from cloudexec.worker.process import leave

        leave()
    finally:
        os._exit(1)


def _find_generators() -> None:
    kinds: set[type] = {random.Random}
    if "numpy.random" in sys.modules:
        numpy_random = sys.modules["numpy.random"]
        kinds |= {numpy_random.RandomState, numpy_random.Generator}
    found = {
        id(value): value
        for module in list(sys.modules.values())
        for value in list(getattr(module, "__dict__", {}).values())
        if type(value) in kinds
    }
    _generators[:] = found.values()


def seed_generators() -> None:
    """Seed the random generators that modules share anew, to give this process its own sequence."""
    for generator in _generators:
        if hasattr(generator, "bit_generator"):
            state = type(generator.bit_generator)().state
            generator.bit_generator.state = state
        else:
            generator.seed()
